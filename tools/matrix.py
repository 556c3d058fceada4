"""Try all pairs of choices, and random whole recipes, on tiny models of many families.

    python tools/matrix.py                     # everything: an hour or more on two cores
    python tools/matrix.py --families llama mistral --only cache attention
    python tools/matrix.py --table             # write plugins/MATRIX.md from what was tried so far

What was tried is kept in the work folder, by the state of the code: the same command goes on where
it was interrupted, and `--again wrong late` tries those once more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from engine.hookspecs import SLOTS  # noqa: E402
from tests import matrix  # noqa: E402
from tests.models import FAMILIES, tiny_model  # noqa: E402

TABLE = ROOT / "plugins" / "MATRIX.md"
VERDICTS = ("right", "refused", "wrong", "late")
SIGNS = {"right": "yes", "refused": "-", "wrong": "WRONG", "late": "LATE"}
HEAD = """# What goes together

Written by `python tools/matrix.py`, which tries every choice, every pair of choices for two slots,
and random whole recipes, on tiny random models of every family below, against plain transformers in
float32, eager, on the same weights. *Right*: the same tokens, or within the choice's stated error,
for single prompts and for a padded batch. *Refused*: `engine check` says why, before anything
loads. *Wrong* and *late* (an error after check had nothing to say) must not be.

{total} tried: {right} right, {refused} refused, {wrong} wrong, {late} late.
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument(
        "--only", nargs="*", default=[], help="slots, or parts of names: all given must occur"
    )
    parser.add_argument("--combos", type=int, default=200, help="random whole recipes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to try once more")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "engine-matrix")
    parser.add_argument("--table", action="store_true", help="only write the table")
    return parser.parse_args(argv)


def cells(arguments: argparse.Namespace) -> list[matrix.Cell]:
    """Return what is to be tried."""
    every = [*matrix.pairs(arguments.families)]
    every += matrix.combos(arguments.combos, families=arguments.families)
    every += matrix.compiled() if arguments.combos else []
    every.sort(key=lambda cell: hashlib.sha256(cell.name.encode()).digest())  # in no order
    unique = {cell.name: cell for cell in every}
    return [c for name, c in unique.items() if all(part in name for part in arguments.only)]


def read(work: Path) -> dict[str, dict[str, str]]:
    """Return what was tried before, by the cell's name; the last time counts."""
    file = work / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["cell"]: entry for entry in map(json.loads, lines)}


def try_one(job: tuple[matrix.Cell, Path]) -> dict[str, Any]:
    """Judge a cell; the models are made once, for all processes."""
    cell, work = job
    start = time.perf_counter()
    result = matrix.judge(cell, (work / "models").__truediv__)
    return {"cell": cell.name, "family": cell.family, "choices": [v.name for v in cell.variants],
            "verdict": result.verdict, "why": result.why, "code": result.code,
            "seconds": round(time.perf_counter() - start, 3)}  # fmt: skip


def _start() -> None:
    import torch
    from transformers import utils

    torch.set_num_threads(1)
    logging: Any = utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def run(arguments: argparse.Namespace) -> None:
    """Try what was not tried yet."""
    work = arguments.work
    done = {n for n, e in read(work).items() if e["verdict"] not in arguments.again}
    todo = [cell for cell in cells(arguments) if cell.name not in done]
    for family in (*{cell.family: None for cell in todo}, matrix.DRAFT):
        if not (work / "models" / family / "tokenizer.json").exists():
            tiny_model(family, work / "models" / family)
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        (work / "results.jsonl").open("a") as file,
        context.Pool(arguments.jobs, _start, maxtasksperchild=500) as pool,
    ):
        jobs = [(cell, work) for cell in todo]
        for index, entry in enumerate(pool.imap_unordered(try_one, jobs), 1):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            counts[entry["verdict"]] += 1
            if entry["verdict"] in ("wrong", "late"):
                print(f"{entry['verdict']}: {entry['cell']}\n    {entry['why'][:300]}", flush=True)
            if index % 100 == 0:
                rate = index / (time.perf_counter() - start)
                print(f"{index} of {len(todo)}, {dict(counts)}, {rate:.1f}/s", flush=True)
    print(f"{len(todo)} tried: {dict(counts)}")


def table(tried: Sequence[dict[str, Any]]) -> str:
    """Return the page: what each choice does on each family, and each pair."""
    counts = Counter(entry["verdict"] for entry in tried)
    names = [variant.name for variant in matrix.variants()]
    alone = {(e["family"], *e["choices"]): e for e in tried if len(e["choices"]) == 1}
    pairs: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in tried:
        if len(entry["choices"]) == 2:
            pairs[tuple(entry["choices"])][entry["verdict"]] += 1
        if entry["verdict"] != "right" and len(entry["choices"]) <= 2:
            why = entry["why"].split(" | ")[0].replace(entry["family"], "MODEL")
            reasons[entry["code"], why].add(entry["cell"])
    lines = [HEAD.format(total=len(tried), **{v: counts[v] for v in VERDICTS})]
    lines += [
        "## Each choice alone",
        "",
        _row(["", *FAMILIES]),
        _row(["---"] * (len(FAMILIES) + 1)),
    ]
    for name in names:
        found = [alone.get((family, name)) for family in FAMILIES]
        lines.append(_row([f"`{name}`", *(SIGNS[e["verdict"]] if e else "" for e in found)]))
    lines += ["", "## Pairs", "", "Families on which the pair is right; - is refused on all.", ""]
    for one, other in combinations(SLOTS, 2):
        rows = [n for n in names if n.startswith(f"{one}=")]
        columns = [n for n in names if n.startswith(f"{other}=")]
        if not rows or not columns:
            continue
        short = [f"`{name.partition('=')[2]}`" for name in columns]
        lines += [_row([f"{one}, {other}", *short]), _row(["---"] * (len(columns) + 1))]
        for row in rows:
            cells = [_cell(pairs[row, column]) for column in columns]
            lines.append(_row([f"`{row.partition('=')[2]}`", *cells]))
        lines.append("")
    lines += ["## Why not", "", _row(["code", "reason", "cells"]), _row(["---"] * 3)]
    for (code, why), where in sorted(reasons.items()):
        lines.append(_row([f"`{code}`", why.replace("|", "/"), str(len(where))]))
    return "\n".join(lines) + "\n"


def _row(words: Sequence[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _cell(counts: Counter[str]) -> str:
    bad = counts["wrong"] + counts["late"]
    return (str(counts["right"] or "-") if counts else "") + (f" ({bad} BAD)" if bad else "")


def main() -> None:
    """Run, and sum up."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        run(arguments)
    names = {cell.name for cell in cells(parse([]))}
    tried = [entry for name, entry in read(arguments.work).items() if name in names]
    TABLE.write_text(table(tried), encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)}: {len(tried)} of {len(names)} cells")


if __name__ == "__main__":
    main()

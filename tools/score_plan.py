"""Score plans against runs on this machine: speed, first token and peak memory, recipe by recipe.

    .venv/bin/python tools/score_plan.py                     # half an hour on two cores
    .venv/bin/python tools/score_plan.py --only nf4 --rounds 3

A machine that others use as well is faster in one minute than in the next. So the stand-ins of
`engine calibrate` and the two models whose plans are scored, the embedded one and one of random
weights, take turns in one process, and medians of the turns are compared. Then `engine run` answers
with each model, alone in its process, as a user has it: this tells the peak of memory, and how far
plans are off at another moment. Raw numbers go to tools/measured/, a file for each time that this
ran; what is printed is the geometric mean of all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import date
from importlib import metadata
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.builder import build
from engine.cli.plan_tables import console
from engine.contexts import Figures
from engine.planning.calibrating import remember, standing_in
from engine.recipe import compose, shipped_folder
from engine.target import detect

FOLDER = Path(__file__).resolve().parent / "measured"

RECIPES: Mapping[str, tuple[str, ...]] = {
    "float32": ("model.dtype=float32",),
    "bfloat16": ("model.dtype=bfloat16",),
    "eager": ("model.dtype=float32", "attention=eager"),
    "chunked": ("model.dtype=float32", "attention=chunked-small"),
    "window": ("model.dtype=float32", "attention=window", "attention.size=128"),
    "alibi": ("model.dtype=float32", "position_encoding=alibi"),
    "multi-query": ("model.dtype=float32", "heads=mqa"),
    "bfloat16, multi-query": ("model.dtype=bfloat16", "heads=mqa"),
    "no cache": ("model.dtype=float32", "cache=none"),
    "static cache": ("model.dtype=float32", "cache=static"),
    "int8 cache": ("model.dtype=float32", "cache=int8"),
    "nf4": ("model.dtype=bfloat16", "quantize=nf4"),
    "LLM.int8": ("model.dtype=float32", "quantize=int8"),
    "torchao-int8": ("model.dtype=bfloat16", "quantize=torchao-int8"),
    "quanto-int8": ("model.dtype=bfloat16", "quantize=quanto-int8"),
}
"""Name → overrides of the recipe `base`."""

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}
"""Of the random model: the layers of GPT-2 as a Llama, with the embedded model's vocabulary."""

PROMPT = '''class Parser:
    def __init__(self, text):
        self.text = text
        self.position = 0

''' + "\n".join(
    f'''    def read_{name}(self, default=None):
        if self.position >= len(self.text):
            return default
        start = self.position
        self.position += 1
        return self.text[start:self.position]
'''
    for name in ("name", "number", "string", "comment")
)  # fmt: skip
NEW = 48
"""Tokens of the answers."""

MEASURES = {
    "tokens_per_second": "decode tokens/s",
    "time_to_first_token": "first token ms",
    "peak_memory_bytes": "peak MiB",
}
UNITS = {"tokens_per_second": 1.0, "time_to_first_token": 1e3, "peak_memory_bytes": 1 / 2**20}
MODELS = ("embedded", "116 million")


def main() -> None:
    """Measure, write the raw numbers, print the table; or print what was measured."""
    parser = argparse.ArgumentParser(description="Score plans against runs on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model")
    parser.add_argument("--only", default="", help="one recipe; nothing is written")
    parser.add_argument("--show", action="store_true", help="print what was measured before")
    arguments = parser.parse_args()
    if arguments.show:
        show(pooled())
        return
    names = [name for name in RECIPES if arguments.only in ("", name)]
    with tempfile.TemporaryDirectory() as folder:
        runs = list(measured(Path(folder), names, arguments.rounds))
    result: dict[str, Any] = {
        "device": detect().name,
        "cores": os.cpu_count(),
        "measured": str(date.today()),
    }
    result |= {"versions": versions(), "prompt": PROMPT, "new": NEW, "runs": runs}
    if arguments.only:
        show(runs)
        return
    file = FOLDER / f"plans-cpu-{len(files()) + 1}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"raw numbers: {file}")
    show(pooled())


def files() -> list[Path]:
    """Return where the raw numbers of each time are."""
    return sorted(FOLDER.glob("plans-cpu-*.json"))


def pooled() -> list[dict[str, Any]]:
    """Return the runs of all times as one each: geometric means of plans, and of medians."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in files():
        for run in json.loads(file.read_text("utf-8"))["runs"]:
            found.setdefault((run["recipe"], run["model"]), []).append(run)

    def mean(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
        # What was planned is a number, what was measured a list of turns.
        return {
            measure: statistics.geometric_mean(
                statistics.median(one if isinstance(one, list) else [one])
                for one in (run[kind][measure] for run in runs)
            )
            for measure in MEASURES
        }

    def turns(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[float]]:
        return {measure: [value] for measure, value in mean(runs, kind).items()}

    return [
        {"recipe": recipe, "model": model, "planned": mean(runs, "planned")}
        | {kind: turns(runs, kind) for kind in ("measured", "alone")}
        for (recipe, model), runs in found.items()
    ]


def measured(folder: Path, names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure recipe by recipe, with both models."""
    random = written(folder / "random")
    homes = {"XDG_CACHE_HOME": str(folder), "XDG_STATE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    os.environ.update(homes)
    for name in track(names, console=Console(stderr=True)):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
            turns = process.submit(in_turns, name, random, rounds).result()
        for model, words in recipes(name, random).items():
            found = engine("run", *words, "-p", PROMPT, "--json")
            alone = found["plan"]["measured"]
            yield {
                "recipe": name,
                "model": model,
                "prompt_tokens": found["figures"]["prompt_tokens"],
                "new_tokens": found["figures"]["new_tokens"],
                "planned": found["plan"]["planned"],
                "measured": turns[model] | {"peak_memory_bytes": [alone["peak_memory_bytes"]]},
                "alone": {measure: [alone[measure]] for measure in MEASURES},
            }


def in_turns(name: str, random: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Calibrate and answer with both models, in turns; return what each turn of these took."""
    words = recipes(name, random)
    both = {model: compose(base, more) for model, (base, *more) in words.items()}
    with ExitStack() as stack:
        stand_ins = stack.enter_context(standing_in(both[MODELS[1]]))
        sessions = {model: stack.enter_context(build(recipe)) for model, recipe in both.items()}
        for session in sessions.values():
            session.generate(PROMPT)
        runs: dict[str, list[Figures]] = {model: [] for model in MODELS}
        for _ in range(rounds):
            for stand_in in stand_ins.values():
                stand_in.run()
            for model, session in sessions.items():
                runs[model].append(session.generate(PROMPT).figures)
        remember(both[MODELS[1]], stand_ins)
    return {
        model: {
            measure: [float(getattr(figures, measure)) for figures in found]
            for measure in MEASURES if measure != "peak_memory_bytes"
        }
        for model, found in runs.items()
    }  # fmt: skip


def recipes(name: str, random: Path) -> dict[str, list[str]]:
    """Return what to type for a recipe with each of the models."""
    words = ["base", *RECIPES[name], f"decode.max_new_tokens={NEW}"]
    drawn = ["load=random", "load.on_device=true", f"model.path={random}"]
    more = (["model.path=recipes://embedded"], drawn)
    return {model: [*words, *each] for model, each in zip(MODELS, more, strict=True)}


def written(folder: Path) -> Path:
    """Write config and tokenizer of the random model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(CONFIG)), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_folder() / "embedded" / name, folder / name)
    return folder


def engine(*words: str) -> dict[str, Any]:
    """Run the command line in a process of its own, and return the object that it prints."""
    command = [str(Path(sys.executable).with_name("engine")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    names = ("torch", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "recipe-engine")
    return {name: metadata.version(name) for name in names}


def show(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print planned against measured, for every model and measure."""
    out = console()
    for model in MODELS:
        out.print(table(runs, model))
    for model in MODELS:
        for measure, title in MEASURES.items():
            out.print(f"{model}, {title}: {verdict(runs, model, measure)}")
            if measure != "peak_memory_bytes":
                out.print(f"  alone: {verdict(runs, model, measure, 'alone')}")


def table(runs: Sequence[Mapping[str, Any]], model: str) -> Table:
    """Return medians of a model's turns, beside its plans."""
    made = Table(box=None, pad_edge=False, header_style="bold", title=model)
    made.add_column("recipe")
    for title in MEASURES.values():
        for column in (title, "plan", "off"):
            made.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        if run["model"] == model:
            cells = []
            for measure, unit in UNITS.items():
                plan, found = run["planned"][measure], statistics.median(run["measured"][measure])
                cells += [f"{found * unit:,.1f}", f"{plan * unit:,.1f}", f"{plan / found - 1:+.0%}"]
            made.add_row(run["recipe"], *cells)
    return made


def verdict(
    runs: Sequence[Mapping[str, Any]], model: str, measure: str, kind: str = "measured"
) -> str:
    """Say how far plans were off, and whether they order the recipes as the runs do.

    Args:
        kind: 'measured', in turns with the calibration, or 'alone'.
    """
    chosen = [run for run in runs if run["model"] == model]
    plans = [run["planned"][measure] for run in chosen]
    found = [statistics.median(run[kind][measure]) for run in chosen]
    errors = [plan / value - 1 for plan, value in zip(plans, found, strict=True)]
    limit = 0.05 if measure == "peak_memory_bytes" else 0.2
    off = [run["recipe"] for run, error in zip(chosen, errors, strict=True) if abs(error) > limit]
    beyond = f"; beyond: {', '.join(off)}" if off else ""
    middle = statistics.median(abs(error) for error in errors)
    tau = f", Kendall's tau {kendall(plans, found):.2f}" if len(chosen) > 1 else ""
    within = len(chosen) - len(off)
    return f"{within} of {len(chosen)} within {limit:.0%}, median {middle:.1%}{tau}{beyond}"


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's rank correlation: the share of pairs in order less that of the others."""
    signs = [
        (first[one] - first[other]) * (second[one] - second[other])
        for one, other in combinations(range(len(first)), 2)
    ]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


if __name__ == "__main__":
    main()

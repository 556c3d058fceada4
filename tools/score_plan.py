"""Score plans against runs on this machine: calibrate, run, compare, recipe by recipe, in turns.

    .venv/bin/python tools/score_plan.py                     # twenty minutes on two cores
    .venv/bin/python tools/score_plan.py --only nf4 --rounds 1

Everything goes through the command line as a user's does, each in a process of its own: `engine
calibrate` with the choices, then `engine run --json` with the embedded model and with one of 116
million random weights, whose shape is drawn here. A round does that for every recipe; printed are
medians over the rounds. Raw numbers go to tools/measured/. A machine that others use as well is not
the same from minute to minute: `spread` tells how far the rounds of one recipe lay apart.
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
from datetime import date
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from engine.recipe import shipped_folder
from engine.target import detect

FILE = Path(__file__).resolve().parent / "measured" / "plans-cpu.json"

RECIPES: Mapping[str, tuple[str, ...]] = {
    "float32": ("model.dtype=float32",),
    "bfloat16": ("model.dtype=bfloat16",),
    "eager": ("model.dtype=float32", "attention=eager"),
    "chunked": ("model.dtype=float32", "attention=chunked-small"),
    "window": ("model.dtype=float32", "attention=window", "attention.size=128"),
    "alibi": ("model.dtype=float32", "position_encoding=alibi"),
    "multi-query": ("model.dtype=float32", "heads=mqa"),
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
    parser.add_argument("--rounds", type=int, default=2, help="times that every recipe has a turn")
    parser.add_argument("--only", default="", help="one recipe; nothing is written")
    parser.add_argument("--show", action="store_true", help="print what was measured before")
    arguments = parser.parse_args()
    if arguments.show:
        show(json.loads(FILE.read_text("utf-8")))
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
    if not arguments.only:
        FILE.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"raw numbers: {FILE}")
    show(result)


def measured(folder: Path, names: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Calibrate and run every recipe with both models, round by round."""
    random = ("load=random", "load.on_device=true", f"model.path={written(folder / 'random')}")
    models = dict(zip(MODELS, (("model.path=recipes://embedded",), random), strict=True))
    home = {"XDG_CACHE_HOME": str(folder), "XDG_STATE_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    turns = [(turn, name) for turn in range(rounds) for name in names]
    for turn, name in track(turns, console=Console(stderr=True)):
        words = ("base", *RECIPES[name])
        engine(home, "calibrate", *words, f"model.path={folder / 'random'}", "--json")
        for model, more in models.items():
            asked = ("-p", PROMPT, f"decode.max_new_tokens={NEW}")
            found = engine(home, "run", *words, *more, *asked, "--json")
            entry = {"round": turn, "recipe": name, "model": model}
            yield entry | {
                "prompt_tokens": found["figures"]["prompt_tokens"],
                "new_tokens": found["figures"]["new_tokens"],
                "planned": found["plan"]["planned"],
                "measured": found["plan"]["measured"],
            }


def written(folder: Path) -> Path:
    """Write config and tokenizer of the random model."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(CONFIG)), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_folder() / "embedded" / name, folder / name)
    return folder


def engine(home: Mapping[str, str], *words: str) -> dict[str, Any]:
    """Run the command line in a process of its own, and return the object that it prints."""
    command = [str(Path(sys.executable).with_name("engine")), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    names = ("torch", "transformers", "bitsandbytes", "torchao", "optimum-quanto", "recipe-engine")
    return {name: metadata.version(name) for name in names}


def show(result: Mapping[str, Any]) -> None:
    """Print planned against measured, for every model and measure."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 130
    for model in MODELS:
        console.print(table(result["runs"], model))
    for model in MODELS:
        for measure, title in MEASURES.items():
            console.print(f"{model}, {title}: {verdict(result['runs'], model, measure)}")


def table(runs: Sequence[Mapping[str, Any]], model: str) -> Table:
    """Return medians of a model's runs, beside those of their plans."""
    made = Table(box=None, pad_edge=False, header_style="bold", title=model)
    made.add_column("recipe")
    for title in MEASURES.values():
        for column in (title, "plan", "off", "spread"):
            made.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(run["recipe"] for run in runs):
        cells = []
        for measure, unit in UNITS.items():
            found = values(runs, name, model, measure, "measured")
            plan = statistics.median(values(runs, name, model, measure, "planned"))
            middle = statistics.median(found)
            cells += [f"{middle * unit:,.1f}", f"{plan * unit:,.1f}", f"{plan / middle - 1:+.0%}"]
            cells.append(f"{(max(found) - min(found)) / middle:.0%}")
        made.add_row(name, *cells)
    return made


def verdict(runs: Sequence[Mapping[str, Any]], model: str, measure: str) -> str:
    """Say how far plans were off, and whether they order the recipes as the runs do."""
    names = list(dict.fromkeys(run["recipe"] for run in runs))
    pairs = [
        [statistics.median(values(runs, name, model, measure, kind)) for name in names]
        for kind in ("planned", "measured")
    ]
    errors = [plan / found - 1 for plan, found in zip(*pairs, strict=True)]
    limit = 0.05 if measure == "peak_memory_bytes" else 0.2
    off = [name for name, error in zip(names, errors, strict=True) if abs(error) > limit]
    beyond = f"; beyond: {', '.join(off)}" if off else ""
    middle = statistics.median(abs(error) for error in errors)
    tau = f", Kendall's tau {kendall(*pairs):.2f}" if len(names) > 1 else ""
    within = len(names) - len(off)
    return f"{within} of {len(names)} within {limit:.0%}, median {middle:.1%}{tau}{beyond}"


def values(
    runs: Sequence[Mapping[str, Any]], recipe: str, model: str, measure: str, kind: str
) -> list[float]:
    """Return a figure of every round."""
    return [run[kind][measure] for run in runs if run["recipe"] == recipe and run["model"] == model]


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's rank correlation: the share of pairs in order less that of the others."""
    signs = [
        (first[one] - first[other]) * (second[one] - second[other])
        for one, other in combinations(range(len(first)), 2)
    ]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


if __name__ == "__main__":
    main()

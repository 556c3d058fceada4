"""Measure the guide's OctoCoder on a GPU, with random weights, beside the plan and the guide.

    .venv/bin/python tools/gpu_guide.py                 # a GPU with 40 GB, eight minutes at most
    .venv/bin/python tools/gpu_guide.py --small         # anywhere: a dry run with a small shape

No network: config.json is the shipped shape (recipes/model/octocoder.yaml), the tokenizer that of
the embedded model. bfloat16, 8 and 4 bits answer a short prompt; in bfloat16 a long prompt goes
through eager attention and through SDPA. Raw numbers go to tools/measured/, a file for each GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import engine
from engine import generate
from engine.planning.planner import plan
from engine.recipe import compose, shipped_folder
from engine.session import Session
from engine.target import detect

ROOT = Path(__file__).resolve().parent
SHORT, LONG, NEW = 20, 5000, 60
"""Tokens of the prompts and of the answers. How long the guide's long prompt was, it does not say:
about as much, by the memory that it took."""

GIB = 2**30
HALF, INT8 = "model.dtype=bfloat16", ("model.dtype=float16", "quantize=bitsandbytes")

CASES: Mapping[str, tuple[int, tuple[str, ...], float, float | None]] = {
    "bfloat16": (SHORT, (HALF,), 29.026, None),
    "8 bits": (SHORT, (*INT8, "quantize.bits=8"), 15.219, None),
    "4 bits (fp4)": (
        SHORT,
        (*INT8, "quantize.quant_type=fp4", "quantize.compute_dtype=float32"),
        9.544,
        None,
    ),
    "long prompt, eager": (LONG, (HALF, "attention=eager"), 37.668, 10.97),
    "long prompt, sdpa": (LONG, (HALF, "attention=sdpa"), 32.617, 3.02),
}
"""Name → tokens of the prompt, overrides, and the guide's peak in GiB and seconds."""

SMALL = {"n_embd": 256, "n_head": 4, "n_inner": 1024, "n_layer": 2}


def main() -> None:
    """Measure every case, write the raw numbers, print the table."""
    parser = argparse.ArgumentParser(description="Measure the guide's OctoCoder on a GPU.")
    parser.add_argument("--small", action="store_true", help="a dry run with a small shape")
    parser.add_argument("--only", default="", help="one case")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --small is a dry run on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder), SMALL if arguments.small else {})
        cases = [name for name in CASES if arguments.only in ("", name)]
        found = {name: measured(Path(folder), name) for name in cases}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"device": device, "small": arguments.small, "versions": versions(), "cases": found}
    if not arguments.small:
        file = ROOT / "measured" / f"octocoder-{device.lower().replace(' ', '-')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"raw numbers: {file}")
    show(result)


def model(folder: Path, changes: Mapping[str, int]) -> None:
    """Write config and tokenizer of the model that will have random weights."""
    config = {**compose("base", ["model=octocoder"]).model.config, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_folder() / "embedded" / name, folder / name)


def measured(folder: Path, name: str) -> dict[str, Any]:
    """Run one case, three times, and return what it took and what was planned."""
    tokens, words, _, _ = CASES[name]
    recipe = compose(
        "base",
        [
            f"model.path={folder}", "load=random", "load.on_device=true", "target=auto",
            f"workload.prompt_tokens={tokens}", f"decode.max_new_tokens={NEW}", *words,
        ],
    )  # fmt: skip
    began = time.perf_counter()
    found = plan(recipe)
    with engine.build(recipe) as session:
        built = time.perf_counter() - began
        runs = list(answers(session, tokens))
    del session
    gc.collect()
    print(f"{name}: {time.perf_counter() - began:.0f} s, {built:.0f} of them to build", flush=True)
    return {
        "recipe": list(words),
        "prompt_tokens": tokens,
        "new_tokens": NEW,
        "runs": runs,
        "plan": {key: found.as_dict()[key] for key in PLANNED},
    }


PLANNED = (
    "prefill", "decode", "tensor_bytes", "peak_bytes", "decode_tokens_per_second",
    "time_to_first_token", "binds", "seconds", "rates", "target",
)  # fmt: skip


def answers(session: Session, tokens: int) -> Iterator[dict[str, float]]:
    """Answer the same prompt three times; the first one warms up."""
    ids = torch.arange(tokens).remainder(2000).add(3).tolist()
    for _ in range(3):
        values, _room = generate.begin(session, ids)
        clock = generate.Clock(session)
        last = None
        for step in generate.steps(session, [ids], values.cache, NEW, clock):
            last = step
        figures = clock.figures(tokens, NEW, last)
        yield {
            "peak_bytes": figures.peak_memory_bytes,
            "seconds": figures.seconds,
            "time_to_first_token": figures.time_to_first_token,
            "tokens_per_second": figures.tokens_per_second or 0.0,
        }


def versions() -> dict[str, str]:
    """Return the versions of what ran."""
    names = ("torch", "transformers", "bitsandbytes", "recipe-engine")
    return {name: metadata.version(name) for name in names} | {"target": detect().name}


def show(result: Mapping[str, Any]) -> None:
    """Print measured, planned, and the guide's."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=str(result["device"]))
    for title in (
        "", "peak GiB", "plan", "guide", "seconds", "plan", "guide", "tokens/s", "plan",
    ):  # fmt: skip
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, case in result["cases"].items():
        run, found, (_, _, peak, seconds) = case["runs"][-1], case["plan"], CASES[name]
        speed, first = found["decode_tokens_per_second"], found["time_to_first_token"]
        whole = None if speed is None else first + (NEW - 1) / speed
        table.add_row(
            name,
            f"{run['peak_bytes'] / GIB:.3f}",
            f"{found['tensor_bytes'] / GIB:.3f}",
            f"{peak:.3f}",
            f"{run['seconds']:.2f}",
            "" if whole is None else f"{whole:.2f}",
            "" if seconds is None else f"{seconds:.2f}",
            f"{run['tokens_per_second']:.1f}",
            "" if speed is None else f"{speed:.1f}",
        )
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 110
    console.print(table)


if __name__ == "__main__":
    main()

"""`engine calibrate`: measure this machine, for plans to reckon with."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from engine.cli import common

if TYPE_CHECKING:
    from engine.builder import Progress
    from engine.planning.calibration import Calibration
    from engine.recipe import Recipe


def calibrate(arguments: common.Recipes = None, json: common.Json = False) -> None:
    """Measure bandwidth, arithmetic and what starting an operator takes; and remember it.

    Runs small stand-ins for the model, from twenty seconds to a few minutes for each recipe: plain
    choices in the number formats that this machine computes in, or the choices of the recipes that
    are named. It is this machine that is measured, whatever their target.

    engine calibrate

    engine calibrate tiny-4bit-gqa tiny-8bit-cache

    engine plan tiny-4bit-gqa
    """
    import dataclasses

    from engine.planning import calibration
    from engine.planning.calibrating import calibrate as measure
    from engine.target import detect

    found: dict[str, Calibration] = {}
    with common.progress() as tell:
        for name, recipe in _recipes(arguments).items():
            if not sys.stderr.isatty():
                print(f"{name}: measuring", file=sys.stderr, flush=True)
            found[name] = measure(recipe, progress=partial(_told, tell, name))
    if json:
        entries = {name: dataclasses.asdict(entry) for name, entry in found.items()}
        common.print_json({"file": str(calibration.file()), "calibrations": entries})
        return
    for name, entry in found.items():
        print(f"{name}, on {detect().name}:")
        print(f"  an operator takes {entry.launch * 1e6:.1f} us, a pass {entry.fixed * 1e3:.2f} ms")
        for point in entry.points:
            print(
                f"  with {point.bytes / 2**20:,.0f} MiB of weights: {point.bandwidth / 1e9:,.1f} "
                f"GB/s, {point.flops / 1e9:,.0f} GFLOP/s"
            )
        if entry.reserve is not None:
            print(
                f"  the process takes {entry.reserve / 2**20:,.0f} MiB, and {entry.retained:.1f} "
                "bytes for each that passes"
            )
        if not entry.steady:
            print(
                f"  note: the slowest turn took {entry.spread:.1f} times as long as the fastest: "
                "plans will be as far off. Measure again when the machine has nothing else to do"
            )
    print(f"kept in {calibration.file()}")


def _told(tell: Progress, name: str, step: str) -> None:
    tell(f"{name}: {step}")


def _recipes(arguments: list[str] | None) -> dict[str, Recipe]:
    if arguments:
        return common.compose_all(arguments)
    from engine.recipe import compose
    from engine.target import detect

    formats = ["float32", "bfloat16"] if "target.bfloat16" in detect().traits else ["float32"]
    return {
        name: compose("base", ["model.path=recipes://embedded", f"model.dtype={name}"])
        for name in formats
    }

"""What most tests need tried of packed layers: all of it at once, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from engine.quantizing import libraries, remembered, trial
from engine.quantizing.trial import Case

SIZES = {
    f"{outputs} x {inputs}": (outputs, inputs)
    for outputs, inputs in (
        (1, 64), (8, 64), (16, 64), (24, 64), (32, 64), (64, 32), (64, 64), (64, 128), (64, 256),
        (96, 24), (96, 64), (128, 16), (128, 64), (192, 64), (256, 64),
    )
}  # fmt: skip
"""Of the layers of tiny models."""

Attempt = Callable[[Sequence[Case]], tuple[dict[Case, str], Sequence[Case]]]


def usual() -> Iterator[Case]:
    """Yield what most tests ask for."""
    for dtype in ("float32", "bfloat16", "float16"):
        for make, library, options in _kinds(dtype):
            yield from trial.cases(SIZES, dtype, make, library, **options).values()
        for name, (_, inputs) in SIZES.items():
            block = inputs if inputs <= 128 else 128
            sizes = {name: SIZES[name]}
            options = {"bits": 4, "block": block}
            yield from trial.cases(
                sizes, dtype, libraries.quanto, "optimum-quanto", **options
            ).values()


def _kinds(dtype: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    yield libraries.quanto, "optimum-quanto", {"bits": 8, "block": None}
    for name in ("Int8WeightOnly", "Float8WeightOnly", "Int8DynamicActivationInt8Weight"):
        yield libraries.torchao, "torchao", {"config": f"{name}Config"}
    yield libraries.bitsandbytes_8_bits, "bitsandbytes", {"threshold": 6.0}
    computes = [dtype] if dtype != "float32" else ["bfloat16", "float32"]
    for compute in computes:
        for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
            options = {"quant_type": kind, "double_quant": double, "compute_dtype": compute}
            yield libraries.bitsandbytes_4_bits, "bitsandbytes", options


def filling(attempt: Attempt, folder: Path) -> Attempt:
    """Return what does the same as `attempt`, but begins with the usual cases, once per folder."""
    done = folder / "trials.done"

    def filled(cases: Sequence[Case]) -> tuple[dict[Case, str], Sequence[Case]]:
        with FileLock(folder / "trials.lock"):
            rest: Sequence[Case] = [] if done.exists() else list(usual())
            while rest:
                found, rest = attempt(rest)
                remembered.add(found)
            done.touch()
        known = remembered.read(cases)
        if known:
            return known, [case for case in cases if case not in known]
        return attempt(cases)

    filled.unfilled = attempt  # type: ignore[attr-defined]
    return filled

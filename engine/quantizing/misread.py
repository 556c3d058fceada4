"""Which layers bitsandbytes reads wrongly in 4 bits on a CPU, and their refusal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.errors import Problem, RecipeError
from engine.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64
"""Weights that share a scale, one after the other, across rows."""

MISREAD = Rule(
    code="int4-cpu-rows",
    why="its kernel for CPUs with AVX-512 looks scales up as if a row of inputs were whole blocks "
    "of 64, and reads other values without a word",
    hint="quantize.bits=8",
    source="dequantizeBlockwise4bitCpu in csrc/cpu_ops.cpp of bitsandbytes",
    seen="bitsandbytes 0.50.2, 2026-11-22",
)


def misread(rows: int, columns: int) -> bool:
    """Tell whether the values of a weight come out wrong; other widths go by another way."""
    ragged = columns % 16 == 0 and columns % BLOCK != 0
    return ragged and rows > 1 and rows * columns > BLOCK


def problems(
    weights: Mapping[str, tuple[int, int]], skip: Collection[str] | None
) -> Iterator[Problem]:
    """Refuse weights that would be misread, and name them.

    Args:
        weights: layers that are packed → rows and columns.
        skip: patterns of layers that are left alone already; None where the checkpoint came packed.
    """
    wrong = {name: size[1] for name, size in weights.items() if misread(*size)}
    if not wrong:
        return
    right = weights.keys() - wrong.keys()
    ends = {_end(name, right): columns for name, columns in wrong.items()}
    layers = ", ".join(f"{end} ({columns} inputs)" for end, columns in sorted(ends.items()))
    rule, who = MISREAD, "quantize=bitsandbytes in 4 bits"
    if skip is None:
        who = "the checkpoint, which bitsandbytes packed in 4 bits,"
        rule = replace(rule, hint="quantize=bitsandbytes, and the original checkpoint: model.path")
    elif right:
        skipped = ",".join([*skip, *sorted(ends)])
        rule = replace(rule, hint=f"quantize.skip_modules=[{skipped}]")
    yield rule.problem("quantize", f"{who} does not work with target.cpu in {layers}")


def refuse_misread(model: PreTrainedModel, skip: Collection[str] | None) -> None:
    """Refuse a model whose layers were not known before it was loaded."""
    from bitsandbytes.nn.modules import Linear4bit

    packed = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu"
    }
    found = list(problems(packed, skip))
    if found:
        raise RecipeError(found)


def _end(name: str, others: Collection[str]) -> str:
    """Return the shortest end of a name that none of the others has."""
    parts = name.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next((end for end in ends if not any(each.endswith(end) for each in others)), name)

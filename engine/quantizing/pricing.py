"""What a model's weights take in memory, plain and packed: told by names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.contexts import EstimateContext, Term
from engine.quantizing.packing import matches

if TYPE_CHECKING:
    from engine.blueprint.drawing import Weight
    from engine.shape import ModelShape

RELICS = re.compile(r"\.attn(\.attention)?\.bias$|\.masked_bias$|rotary_emb\.inv_freq$")
"""Buffers in old checkpoints that models compute by themselves."""

Packed = Callable[[int, int, int], tuple[int, int]]
"""(rows, columns, bytes of a plain value) → bytes of the codes, and of all scales beside them."""


def terms(
    context: EstimateContext,
    pack: Packed,
    *,
    kinds: Collection[str],
    skip: Sequence[str],
    bias_bytes: int | None = None,
) -> Iterator[Term]:
    """Price every weight where they are known: packed ones, their scales, and those left plain.

    Args:
        bias_bytes: what a number in a bias of a packed layer takes, where a library casts it.
    """
    if context.shape.quantization or not context.shape.weights:
        yield from plain(context)
        return
    packed = set(to_pack(context.shape, kinds=kinds, skip=skip))
    codes, scales, left = 0, 0, 0
    for weight in context.shape.weights:
        size = value_bytes(context, weight)
        if weight.module in packed and weight.matrix:
            code, beside = pack(weight.rows, weight.columns, size)
            codes, scales = codes + code, scales + beside
        elif weight.module in packed and bias_bytes:
            left += weight.numbers * bias_bytes
        else:
            left += weight.numbers * size
    yield Term(name="weights", bytes=left)
    yield Term(name="packed weights", bytes=codes)
    yield Term(name="scales", bytes=scales)


def plain(context: EstimateContext) -> Iterator[Term]:
    """Price every weight in the model's number format; of packed checkpoints, as stored."""
    shape = context.shape
    if shape.quantization:
        stored = [each.nbytes for name, each in shape.tensors.items() if not RELICS.search(name)]
        size = sum(stored)
    else:
        size = sum(weight.numbers * value_bytes(context, weight) for weight in shape.weights)
    if size:
        yield Term(name="weights", bytes=size)


def to_pack(
    shape: ModelShape, *, kinds: Collection[str], skip: Sequence[str]
) -> Mapping[str, Weight]:
    """Return the layers that will be packed, each with its matrix, as far as known."""
    drawn = shape.blueprint
    kept = () if drawn is None else drawn.stated["_keep_in_fp32_modules"]
    return {
        weight.module: weight
        for weight in shape.weights
        if weight.matrix
        and not weight.head
        and (drawn is None or weight.kind in kinds)
        and not matches(weight.module, [*skip, *kept])
    }


def value_bytes(context: EstimateContext, weight: Weight) -> int:
    """Return the bytes of a number: in the format of the model, or that its class insists on."""
    size, drawn = context.value_bytes, context.shape.blueprint
    if drawn is None or size != 2:
        return size
    strict = drawn.stated["_keep_in_fp32_modules_strict"]
    if context.dtype == "float16":
        strict |= drawn.stated["_keep_in_fp32_modules"]
    kept = any(re.search(each.replace("*", ".*"), weight.name) for each in strict)
    return 4 if kept else size

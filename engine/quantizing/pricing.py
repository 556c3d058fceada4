"""What a model's weights take in memory, plain and packed: told by names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.contexts import UNPACKING, EstimateContext, Term
from engine.quantizing.packing import matches

if TYPE_CHECKING:
    from engine.blueprint.drawing import Weight
    from engine.shape import ModelShape

RELICS = re.compile(r"\.attn(\.attention)?\.bias$|\.masked_bias$|rotary_emb\.inv_freq$")
"""Buffers in old checkpoints that models compute by themselves."""

ROUTED = 8
"""Operators that multiply by the experts of a layer, which are one tensor together."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a library keeps a layer's weights, and multiplies by them."""

    bytes: Callable[[int, int, int], tuple[int, int]]
    """(rows, columns, bytes of a plain value) → bytes of the codes, and of all scales beside."""
    launches: float = 1.0
    """Operators of a product."""
    unpacked: float = 0.0
    """Bytes per weight that are written and read again where a product needs plain weights."""
    flops: float = 0.0
    """Operations per weight to unpack it."""
    rounding: float = 0.0
    """Bytes that are moved per input and per output of a layer, to round and to scale them."""
    rate: str = ""
    """Number format of the products; '' for the model's."""
    workspace: Callable[[int, int, int], int] = lambda tokens, rows, columns: 0
    """(tokens, rows, columns) → bytes that a product holds for itself."""


def terms(
    context: EstimateContext,
    packing: Packing,
    *,
    kinds: Collection[str],
    skip: Sequence[str],
    bias_bytes: int | None = None,
) -> Iterator[Term]:
    """Price all weights and their products: of packed layers, of scales, of what is left plain.

    Args:
        bias_bytes: what a number in a bias of a packed layer takes, where a library casts it.
    """
    if context.shape.quantization or not context.shape.weights:
        yield from plain(context)
        return
    packed = to_pack(context.shape, kinds=kinds, skip=skip)
    codes, scales, left, space = 0, 0, 0, 0
    others: list[Weight] = []
    value_bytes = sizes(context)
    for weight in context.shape.weights:
        size = value_bytes(weight)
        if weight.module in packed and weight.matrix:
            code, beside = packing.bytes(weight.rows, weight.columns, size)
            codes, scales = codes + code, scales + beside
            space = max(space, packing.workspace(context.rows, weight.rows, weight.columns))
        elif weight.module in packed and bias_bytes:
            left += weight.numbers * bias_bytes
        else:
            left += weight.numbers * size
            others.append(weight)
    numbers = sum(weight.numbers for weight in packed.values())
    ends = sum(weight.rows + weight.columns for weight in packed.values())
    yield Term(name="weights", bytes=left)
    yield Term(
        name="packed weights",
        bytes=codes,
        launches=packing.launches * len(packed),
        moved=codes + scales + packing.rounding * context.rows * ends,
    )
    yield Term(name="scales", bytes=scales)
    yield Term(
        name="products by weights",
        flops=2 * context.rows * numbers,
        rate=packing.rate or context.dtype or "float32",
    )
    yield Term(
        name="workspace of products",
        bytes=space,
        during="pass",
        moved=packing.unpacked * numbers,
        flops=packing.flops * numbers,
        rate=UNPACKING,
    )
    yield from products(context, others)


def plain(context: EstimateContext) -> Iterator[Term]:
    """Price every weight in the model's number format; of packed checkpoints, as stored."""
    shape = context.shape
    if shape.quantization:
        stored = [each.nbytes for name, each in shape.tensors.items() if not RELICS.search(name)]
        size = sum(stored)
    else:
        value_bytes = sizes(context)
        size = sum(weight.numbers * value_bytes(weight) for weight in shape.weights)
    if size:
        yield Term(name="weights", bytes=size)
        yield from products(context, shape.weights)


def products(context: EstimateContext, weights: Iterable[Weight]) -> Iterator[Term]:
    """Price reading plain weights, and the products by them; of experts, those that are visited.

    The output layer's is not among them, whose weight may be the embedding's too. Reading and
    multiplying are two terms: published rows of few tokens are as slow as both together.
    """
    launches, moved, flops = 0.0, 0.0, 0.0
    visited = experts_visited(context.shape.config)
    for weight in weights:
        if weight.matrix and not weight.head:
            launches += 1
            moved += weight.numbers * context.value_bytes
            flops += 2 * context.rows * weight.numbers
        elif len(weight.shape) == 3 and "experts" in weight.name:
            share = min(visited / weight.shape[0], 1.0)
            launches += ROUTED
            moved += (1 - (1 - share) ** context.rows) * weight.numbers * context.value_bytes
            flops += 2 * context.rows * share * weight.numbers
    yield Term(name="weights", launches=launches, moved=moved)
    yield Term(name="products by weights", flops=flops, rate=context.dtype or "float32")


def experts_visited(config: Mapping[str, Any]) -> int:
    """Return how many experts a token visits; 1 where that is not said."""
    named = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    found = (part[name] for part in parts for name in named if isinstance(part.get(name), int))
    return next(found, 1)


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


def sizes(context: EstimateContext) -> Callable[[Weight], int]:
    """Tell the bytes of a weight's numbers: in the model's format, or that its class insists on."""
    size, drawn = context.value_bytes, context.shape.blueprint
    strict: frozenset[str] = frozenset()
    if drawn is not None and size == 2:
        strict = drawn.stated["_keep_in_fp32_modules_strict"]
        if context.dtype == "float16":
            strict |= drawn.stated["_keep_in_fp32_modules"]
    if not strict:
        return lambda weight: size
    kept = re.compile("|".join(each.replace("*", ".*") for each in sorted(strict)))
    return lambda weight: 4 if kept.search(weight.name) else size

"""What attention costs, fused or in plain operators: what the choices of `attention` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.contexts import EstimateContext, Term
from engine.shape import WINDOWED, WITHOUT_ATTENTION

if TYPE_CHECKING:
    from engine.shape import ModelShape

FUSED, WRITTEN_OUT = 2, 9
"""Operators of a layer's attention: a kernel and its mask; the formula in plain operators."""

SCORE_PASSES = 8
"""How often plain operators read or write each score in float32: product, scale, mask, softmax,
product."""

ROTATIONS, ANGLES = 16, 40
"""Operators of a layer that rotate its queries and keys; and of a pass that make the angles."""

ROTATION_PASSES, ROTATED = 10, 3
"""How often these read or write what they rotate; and tensors as large as the keys meanwhile."""

FLOAT32 = 4


def fused(context: EstimateContext, window: int | None = None) -> Iterator[Term]:
    """Price a kernel that never has the scores in memory.

    Args:
        window: keys that a query sees at most, whatever the model says.
    """
    shape, size = context.shape, context.value_bytes
    keys = _keys(context, window)
    queries = shape.heads * shape.head_dim
    # A prompt sees itself up to the diagonal, and kernels skip what lies beyond.
    seen = 0.5 if 1 < context.new == context.tokens else 1.0
    yield Term(
        name="attention",
        bytes=2 * context.rows * queries * size,
        during="attention",
        launches=FUSED * len(keys),
        moved=context.batch * _kept(shape, keys) * size,
        flops=4 * seen * context.rows * queries * sum(keys),
        rate=context.dtype or "float32",
    )


def formula(context: EstimateContext) -> Iterator[Term]:
    """Price the model's own plain operators, or the engine's where positions need these.

    The engine's multiply by keys and values that heads share as they are; positions that make the
    scores themselves get keys for every head.
    """
    copies = 2
    if special(context) or rotated(context):
        copies = 1 if "position.scores" in _provided(context) else 0
    yield from written_out(context, copies=copies)


def written_out(context: EstimateContext, *, copies: int = 2) -> Iterator[Term]:
    """Price plain operators, which have every score in memory, more than once while softmax runs.

    As they came, in float32, and as weights. A model's own code, or sinks, hold them once more.

    Args:
        copies: how many of keys and values are copied for every query head that shares them.
    """
    shape, size = context.shape, context.value_bytes
    keys = _keys(context, None)
    queries = shape.heads * shape.head_dim
    copied = context.batch * copies * queries * size if shape.kv_heads < shape.heads else 0
    most = max(keys, default=0)
    own = "model.attention_interface" not in shape.traits or "model.sinks" in shape.traits
    # torch converts scores to float32 before softmax, but for float16 on CUDA, where that is fused.
    converted = size == 2 and not (context.dtype == "float16" and context.target.kind == "cuda")
    own_formula = special(context) or rotated(context)
    touched = _touched(size, converted=converted, special=own_formula)
    held = size * (1 + own) + FLOAT32 * (2 if converted else 1)
    yield Term(
        name="scores of attention",
        bytes=scores(context) * held + copied * most,
        during="attention",
        launches=WRITTEN_OUT * len(keys),
        moved=context.batch * _kept(shape, keys) * size
        + sum(keys) * (context.rows * shape.heads * touched + 2 * copied),
        flops=4 * context.rows * queries * sum(keys),
        rate=context.dtype or "float32",
    )
    if "position.bias" in _provided(context):
        yield from biases(context)
    elif context.new > 1:
        yield Term(
            name="mask", bytes=context.rows * context.met * (size + 1), during="pass", launches=10
        )


def _touched(size: int, *, converted: bool, special: bool) -> int:
    """Return the bytes of a score that plain operators read and write, one after the other.

    Args:
        size: bytes of a number of the model's.
        converted: whether an operator of its own makes it float32 for softmax.
        special: whether it is float32 already when it is scaled and masked, as in the engine's.
    """
    between = FLOAT32 if special else size
    cast = size + FLOAT32 if size < FLOAT32 else 0
    softmax = FLOAT32 + (FLOAT32 if converted else size)
    return size + 2 * 2 * between + cast * (1 + converted) + softmax + size


def biases(context: EstimateContext) -> Iterator[Term]:
    """Price a mask with a bias for every head, where there is one: each layer reads it."""
    if "position.bias" not in _provided(context):
        return
    size, numbers = context.value_bytes, context.rows * context.shape.heads * context.met
    cast = size + FLOAT32 if size < FLOAT32 else 0
    yield Term(
        name="biases",
        bytes=numbers * size,
        during="pass",
        launches=10,
        moved=numbers * (FLOAT32 + cast + (2 + context.shape.layers) * size),
    )


def rotating(context: EstimateContext) -> Iterator[Term]:
    """Price queries and keys that are rotated before attention, the cached ones in each pass."""
    if not rotated(context):
        return
    shape, size = context.shape, context.value_bytes
    # Latent keys are rotated when they are there for every head.
    heads = shape.heads if "model.latent_kv" in shape.traits else shape.kv_heads
    keys = _keys(context, None)
    turned = [heads * each + shape.heads * context.new for each in keys]
    part = shape.rotary_dim / shape.head_dim if shape.head_dim else 1.0
    whole = context.batch * shape.head_dim * size
    yield Term(
        name="rotated keys",
        bytes=int(ROTATED * whole * heads * max(keys, default=0)),
        during="attention",
        launches=ROTATIONS * len(keys) + ANGLES,
        moved=sum(turned) * whole * (ROTATION_PASSES * part + 2),
    )


def rotated(context: EstimateContext) -> bool:
    """Tell whether keys are cached unrotated."""
    kept = "cache.none" not in getattr(context.recipe.cache, "provides", ())
    return kept and "position.rotation" in _provided(context)


def special(context: EstimateContext) -> bool:
    """Tell whether positions bias or make the scores, which no model's own code does."""
    return not {"position.bias", "position.scores"}.isdisjoint(_provided(context))


def _provided(context: EstimateContext) -> tuple[str, ...]:
    return tuple(getattr(context.recipe.position_encoding, "provides", ()))


def scores(context: EstimateContext) -> int:
    """Return the scores of the layer whose queries meet most keys: of each query, head and key."""
    return context.rows * context.shape.heads * max(_keys(context, None), default=0)


def _keys(context: EstimateContext, window: int | None) -> list[int]:
    """Return how many keys a query meets in each layer that attends."""
    shape, met = context.shape, context.met if window is None else min(context.met, window)
    own = shape.sliding_window or met
    return [
        min(met, own) if kind in WINDOWED else met
        for kind in shape.layer_types
        if kind not in WITHOUT_ATTENTION
    ]


def _kept(shape: ModelShape, keys: list[int]) -> int:
    """Return the numbers of the keys and values that are read."""
    values = [each for each in shape.kv_values if each]
    return sum(keys) * max(values, default=0)

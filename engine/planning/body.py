"""What a pass costs whatever the choices are: activations, logits, and operators in between.

Widths are read from the model's blueprint. How many tensors of a width are alive at once follows
from the order in which the layers of transformers make them and let go of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from engine.contexts import EstimateContext, Term
from engine.families import family
from engine.quantizing.pricing import experts_visited

if TYPE_CHECKING:
    from engine.blueprint.drawing import Blueprint, Weight
    from engine.target import Target

ATTENTION = re.compile(r"attn|attention|mixer")
"""In the path of a module that belongs to attention."""

LOOP = 60
"""Operators of a step outside of the model: preparing inputs, picking the token, bookkeeping."""

RMS_NORM, LAYER_NORM = 6, 1
"""Operators of a norm in plain torch, and of torch's own."""

ROTATION, VIEWS, ADDITIONS, ACTIVATION, ROUTING = 10, 10, 2, 2, 30
"""Operators of a layer: rotating queries and keys, views and copies around attention, the two
residual additions, the activation and its product, choosing experts."""

ROTATED = 4
"""Tensors as large as the queries that are alive while these are rotated."""

GATED, PLAIN = 3, 2
"""Tensors of the inner width that are alive in a feed-forward layer with a gate, and in one
without."""

GATED_EXPERTS = 2
"""The same for each expert that a token visits, in units of gate and values together."""

WRITTEN_OUT = {"gelu_new": 4, "gelu_fast": 4, "gelu_python": 4, "quick_gelu": 3}
"""The same where the activation is written out in plain operators."""


WORKSPACES, WORKSPACE, HOPPER_WORKSPACE = 2, 8519680, 32 * 2**20
"""How often torch takes a workspace (cuBLAS, cuBLASLt), its bytes, and those on Hopper and newer:
`parseChosenWorkspaceSize` in aten/src/ATen/cuda/CublasHandlePool.cpp."""


@dataclass(frozen=True)
class Widths:
    """What decides how much a pass holds, and how many operators it is."""

    inner: int
    """Numbers per token that a feed-forward layer holds beside its input and output, at most."""
    operators: int
    """Of all layers together, apart from linear ones and from attention itself."""


def terms(context: EstimateContext) -> Iterator[Term]:
    """Price a pass, apart from what the choices are responsible for."""
    shape, rows, size = context.shape, context.rows, context.value_bytes
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.blueprint is not None:
        yield Term(name="buffers", bytes=shape.blueprint.buffers)
    yield Term(name="workspace of cuBLAS", bytes=_workspace(context.target))
    visited = experts_visited(shape.config)
    widths = _widths(shape.blueprint, shape.layers, hidden, _activation(shape.config), visited)
    # The embeddings stay until the end; so do learned positions, or the angles of rotary ones.
    embedded = hidden * (2 if shape.position == "learned" else 1) + 2 * shape.rotary_dim
    yield Term(name="activations", bytes=rows * size * embedded, during="pass")
    yield Term(
        name="activations",
        bytes=rows * size * (2 * hidden + ROTATED * queries + 2 * keys),
        during="attention",
        launches=widths.operators,
        # Those that are views move nothing, the others read and write: about once each.
        moved=widths.operators * rows * size * hidden,
    )
    yield Term(
        name="activations",
        bytes=rows * size * (3 * hidden + widths.inner),
        during="feed-forward",
    )
    every = "logits_to_keep" not in family(shape.model_type).model_code and shape.blueprint
    rated = context.batch * (context.new if every else 1)
    yield Term(
        name="logits",
        # In the model's format and in float32; before them the last hidden states, normalized.
        bytes=rated * vocabulary * size + context.batch * vocabulary * 4 + 2 * rows * size * hidden,
        during="logits",
        launches=LOOP,
        moved=vocabulary * hidden * size + rated * vocabulary * (size + 8),
        flops=2 * rated * vocabulary * hidden,
        rate=context.dtype or "float32",
    )


def _workspace(target: Target) -> int:
    """Return what torch takes for the matrix products of a CUDA device, once for each library."""
    if target.kind != "cuda":
        return 0
    return WORKSPACES * (HOPPER_WORKSPACE if float(target.capability or 0) >= 9 else WORKSPACE)


def _activation(config: object) -> str:
    found = re.search(r"'(?:hidden_act|activation_function)': '(\w+)'", str(config))
    return found[1] if found else ""


@lru_cache(maxsize=64)
def _widths(
    drawn: Blueprint | None, layers: int, hidden: int, activation: str, visited: int
) -> Widths:
    per_layer = VIEWS + ADDITIONS + ACTIVATION
    if drawn is None:  # as most models are
        return Widths(GATED * 4 * hidden, layers * (per_layer + ROTATION + 2 * RMS_NORM))
    norms = [kind for _, kind in drawn.modules if kind.endswith("Norm")]
    operators = sum(LAYER_NORM if kind == "LayerNorm" else RMS_NORM for kind in norms)
    if any(kind.endswith("RotaryEmbedding") for _, kind in drawn.modules):
        per_layer += ROTATION
    siblings: dict[str, list[Weight]] = {}
    inner = 0
    for weight in drawn.weights:
        if weight.matrix and not weight.head and not ATTENTION.search(weight.module):
            siblings.setdefault(weight.module.rpartition(".")[0], []).append(weight)
        elif len(weight.shape) == 3 and "experts" in weight.name:
            width = weight.numbers // weight.shape[0] // hidden  # of gate and values, or of one
            inner = max(inner, visited * (GATED_EXPERTS * width + 2 * hidden))
    if inner:
        operators += layers * ROUTING
    for matrices in siblings.values():
        inner = max(inner, _inner(matrices, hidden, activation))
    return Widths(inner, operators + layers * per_layer)


def _inner(matrices: list[Weight], hidden: int, activation: str) -> int:
    """Return the numbers per token that a module with these matrices holds inside."""
    wider = [each.rows for each in matrices if each.columns == hidden and each.rows > hidden]
    back = [each.columns for each in matrices if each.rows == hidden and each.columns != hidden]
    if not wider:
        return 0
    fused = bool(back) and max(wider) == 2 * max(back)  # gate and values in one matrix
    if fused:
        return (GATED + 1) * max(back)
    return max(wider) * (GATED if len(wider) > 1 else WRITTEN_OUT.get(activation, PLAIN))

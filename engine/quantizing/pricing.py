"""What a checkpoint's weights take in memory, plain and packed: told by names and sizes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from engine.contexts import EstimateContext, Term
from engine.quantizing.layers import Place, source
from engine.quantizing.packing import matches

if TYPE_CHECKING:
    from engine.shape import ModelShape, TensorSize

FLOATS = ("F64", "F32", "F16", "BF16")
RELICS = re.compile(r"\.attn(\.attention)?\.bias$|\.masked_bias$|rotary_emb\.inv_freq$")
"""Buffers in old checkpoints that models compute by themselves."""

UNQUANTIZED = re.compile(r"embed|\.wte\.|\.wpe\.|lm_head|output_layer|experts|norm|ln_|vision")
"""What is no linear layer, or the last one, in models whose code is not known."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the checkpoint, as it will be in memory before it is packed."""

    name: str
    shape: tuple[int, ...]
    value_bytes: int
    place: Place | None

    @property
    def rows(self) -> int:
        """Return the outputs of a linear layer."""
        return self.shape[1 if self.place and self.place.kind == "Conv1D" else 0]

    @property
    def columns(self) -> int:
        """Return the inputs of a linear layer."""
        return self.shape[0 if self.place and self.place.kind == "Conv1D" else 1]


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
    """Price every tensor where the checkpoint's are known: the weights, and the scales apart.

    Args:
        bias_bytes: what a number in a bias of a packed layer takes, where a library casts it.
    """
    if not context.shape.tensors:
        return
    weights, scales = 0, 0
    for weight in in_memory(context):
        numbers = prod(weight.shape)
        packed = _is_packed(context.shape.model_type, weight, kinds, skip)
        if packed and len(weight.shape) == 2:
            codes, beside = pack(weight.rows, weight.columns, weight.value_bytes)
            weights, scales = weights + codes, scales + beside
        elif packed and bias_bytes and weight.name.endswith(".bias"):
            weights += numbers * bias_bytes
        else:
            weights += numbers * weight.value_bytes
    yield Term(name="weights", bytes=weights)
    yield Term(name="scales", bytes=scales)


def in_memory(context: EstimateContext) -> Iterator[Weight]:
    """Yield the checkpoint's tensors as the model will hold them.

    Without what it ignores and the second of two tied ones, with pooled heads, in its number
    format.
    """
    shape = context.shape
    pooling = _pooling(shape)
    for name, tensor, place in _read(shape):
        sizes = tensor.shape
        if pooling > 1 and _is_key_or_value(name):
            sizes = (sizes[0] // pooling, *sizes[1:])
        size = _value_bytes(context, name, tensor.dtype, tensor.nbytes // (prod(sizes) or 1))
        yield Weight(name=name, shape=tuple(sizes), value_bytes=size, place=place)


def to_pack(
    shape: ModelShape, *, kinds: Collection[str], skip: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the layers that will be packed, each with its rows and columns, as far as known."""
    found = {}
    for name, tensor, place in _read(shape):
        weight = Weight(name=name, shape=tuple(tensor.shape), value_bytes=0, place=place)
        if len(weight.shape) == 2 and _is_packed(shape.model_type, weight, kinds, skip):
            module = place.module if place else name.removesuffix(".weight")
            found[module] = (weight.rows, weight.columns)
    return found


def _read(shape: ModelShape) -> Iterator[tuple[str, TensorSize, Place | None]]:
    """Yield the tensors of the checkpoint that the model reads, and where they belong."""
    code = source(shape.model_type)
    ignored = [re.compile(each) for each in code.listed("_keys_to_ignore_on_load_unexpected")]
    for name, tensor in shape.tensors.items():
        place = code.place(name)
        beyond = place is None or not place.exact or _layer(name) >= shape.layers
        if RELICS.search(name) or (beyond and any(each.search(name) for each in ignored)):
            continue
        if not (shape.tied and place and place.head):
            yield name, tensor, place


def _is_packed(
    model_type: str, weight: Weight, kinds: Collection[str], skip: Sequence[str]
) -> bool:
    place = weight.place
    if not source(model_type).classes:  # the code comes with the checkpoint, or is not known
        plain = weight.name.endswith(".weight") and not UNQUANTIZED.search(weight.name)
        return plain and not matches(weight.name.removesuffix(".weight"), skip)
    if place is None or place.head or place.kind not in kinds:
        return False
    kept = source(model_type).listed("_keep_in_fp32_modules")
    return not matches(place.module, [*skip, *kept])


def _value_bytes(context: EstimateContext, name: str, stored: str, stored_bytes: int) -> int:
    """Return the bytes of a number: of the model's format, or of what its class keeps in float32.

    Integers, and all of a checkpoint that comes quantized, stay as they are stored.
    """
    if stored not in FLOATS or context.shape.quantization:
        return stored_bytes
    size, code = context.value_bytes, source(context.shape.model_type)
    strict = code.listed("_keep_in_fp32_modules_strict")
    if context.dtype == "float16":
        strict |= code.listed("_keep_in_fp32_modules")
    if size == 2 and any(re.search(each.replace("*", ".*"), name) for each in strict):
        return 4
    return size


def _layer(name: str) -> int:
    """Return which layer a tensor is of; -1 for none."""
    return int(next((part for part in name.split(".") if part.isdigit()), -1))


def _is_key_or_value(name: str) -> bool:
    return bool(re.search(r"\.[kv]_proj\.(weight|bias)$", name)) and "vision" not in name


def _pooling(shape: ModelShape) -> int:
    """Return how many key/value heads of the checkpoint become one."""
    rows = [tensor.shape[0] for name, tensor in shape.tensors.items() if _is_key_or_value(name)]
    kept = shape.kv_heads * shape.head_dim
    return min(rows) // kept if rows and kept and min(rows) % kept == 0 else 1

"""What the choices of a cache share: layers of our own, which model layers keep keys, and sizes.

A cache of transformers is a list of layers, one for each layer of the model. A choice replaces
those that keep every token; windows, recurrent states and shared keys stay as they are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from engine.contexts import Term
from engine.errors import Problem
from engine.shape import WINDOWED

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig

    from engine.contexts import CheckContext, EstimateContext
    from engine.shape import ModelShape

UNPACKING = 24
"""Operators that pack and unpack the keys and values of a layer."""

FULL = "full_attention"
"""The type of a layer that keeps the keys and values of every token, and nothing else."""


class Layer:
    """Keep the keys and values of one layer of a model.

    Everything is in `parts`: tensors by name, the batch in front, so that beams and batches are
    picked alike from all. It does not inherit from transformers' layers, which would import them;
    `cache_of` makes it count as one.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.parts: dict[str, torch.Tensor] = {}
        self.seen = 0
        self.dtype: torch.dtype | None = None
        """The model's number format, once it is known."""

    @property
    def is_initialized(self) -> bool:
        """Tell whether anything was kept yet."""
        return bool(self.parts)

    @property
    def is_croppable(self) -> bool:
        """Tell whether the last tokens can be forgotten again."""
        return True

    @property
    def held(self) -> int:
        """Return how many tokens are kept, of those seen."""
        return self.seen

    @property
    def nbytes(self) -> int:
        """Return the bytes of the memory behind the tensors."""
        return sum(part.untyped_storage().nbytes() for part in self.parts.values())

    @property
    def plain_bytes(self) -> int:
        """Return what the kept tokens would take in the model's own number format."""
        return self.nbytes

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values `[batch, heads, tokens, size]`; give all to attend to."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Return the tokens seen: positions count from there."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `query_length` new tokens will meet, and the column of the first."""
        return self.held + query_length, self.seen - self.held

    def get_max_length(self) -> int:
        """Return -1: there is no end."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.parts, self.seen = {}, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these rows of the batch, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.parts = {
            name: part.index_select(0, indices.to(part.device)) for name, part in self.parts.items()
        }

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.parts = {
            name: part.repeat_interleave(repeats, dim=0) for name, part in self.parts.items()
        }


class TokenCount(Layer):
    """Count the tokens of a cache that holds none of them, but what a state keeps of all."""

    @property
    def held(self) -> int:
        """Return 0: there are neither keys nor values."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Count the last tokens no more."""
        self.seen -= abs(tokens_to_remove)


def rehearse(layer: Layer, tokens: int) -> Layer:
    """Return a copy of a layer in use, after `tokens` more of nothing but zeros."""
    trial = copy.deepcopy(layer)
    keys, values = (
        part.new_zeros((part.shape[0], part.shape[1], tokens, part.shape[3]), dtype=layer.dtype)
        for part in (layer.parts["keys"], layer.parts["values"])
    )
    trial.update(keys, values)
    return trial


def cache_of(config: PretrainedConfig, make: Callable[[], Layer]) -> Cache:
    """Return a cache whose layers that keep every token are made by `make`."""
    from transformers import Cache
    from transformers.cache_utils import (
        DYNAMIC_LAYER_TYPE_MAPPING,
        CacheLayerMixin,
        get_layer_types_and_kwargs,
    )

    CacheLayerMixin.register(Layer)
    types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    layers: list[Any] = [
        make() if kind == FULL else DYNAMIC_LAYER_TYPE_MAPPING[kind](**given)
        for kind, given in zip(types, options, strict=True)
    ]
    return Cache(layers=layers)


def refuse_without_full(context: CheckContext, choice: str, would: str) -> Iterator[Problem]:
    """Refuse a model none of whose layers keep every token: the choice would do nothing."""
    shape = context.shape
    if shape is None or FULL in shape.layer_types:
        return
    kinds = ", ".join(sorted(set(shape.layer_types)))
    yield Problem(
        slot="cache",
        code="does-nothing",
        message=f"cache={choice} {would} the layers that keep every token and nothing else, and "
        f"{shape.model_type} has none: its layers are {kinds}",
        hint="cache=dynamic",
    )


def refuse_other_layers(
    context: CheckContext, choice: str, known: frozenset[str]
) -> Iterator[Problem]:
    """Refuse a model with layers of types that a choice does not know."""
    shape = context.shape
    other = sorted(set(shape.layer_types) - known) if shape else []
    if shape and other:
        yield Problem(
            slot="cache",
            code="cache-unsupported",
            message=f"cache={choice} does not run {shape.model_type}: its layers of type "
            f"{', '.join(other)} keep keys in a way of their own",
            hint="cache=dynamic",
        )


def layers_kept(
    shape: ModelShape, tokens: int, *, newest: bool = False
) -> Iterator[tuple[str, int, int]]:
    """Yield for each layer its type, its numbers per token, and the tokens it keeps of a sequence.

    `newest` tells whether a window keeps its newest token too: a growing cache of transformers
    does not, because the next token takes its place.
    """
    window = shape.sliding_window or tokens + 1
    window -= 0 if newest else 1
    for kind, values in zip(shape.layer_types, shape.kv_values, strict=True):
        yield kind, values, min(tokens, window) if kind in WINDOWED else tokens


def kept_by_type(
    context: EstimateContext, kept: int, tokens: int, *, newest: bool = False
) -> Iterator[Term]:
    """Price keys and values that are kept: those of layers with a window by themselves.

    Args:
        kept: bytes of all layers together.
        tokens: that there is room for.
    """
    windows = sum(
        values * held
        for kind, values, held in layers_kept(context.shape, tokens, newest=newest)
        if kind in WINDOWED
    )
    size = context.batch * context.value_bytes * windows
    yield Term(name="KV cache", bytes=kept - size)
    yield Term(name="KV cache of sliding layers", bytes=size)


def growing(context: EstimateContext, kept: int) -> Iterator[Term]:
    """Price keys and values that are copied into longer tensors with each token, layer by layer."""
    layers = [values * tokens for _, values, tokens in layers_kept(context.shape, context.tokens)]
    size = context.batch * context.value_bytes
    yield from kept_by_type(context, kept, context.tokens)
    yield Term(name="KV cache", launches=2 * sum(map(bool, layers)), moved=2 * sum(layers) * size)
    # Of the layer at work, new keys are there before the old ones go.
    yield Term(name="longer keys", bytes=max(layers, default=0) * size // 2, during="attention")


def unpacking(context: EstimateContext, kept: int) -> Iterator[Term]:
    """Price keys and values that are made plain again, all of a layer's, in each pass."""
    layers = [values * tokens for _, values, tokens in layers_kept(context.shape, context.tokens)]
    plain = context.batch * context.value_bytes * sum(layers)
    packed = sum(map(bool, layers))
    yield from kept_by_type(context, kept, context.tokens)
    yield Term(name="KV cache", launches=UNPACKING * packed, moved=kept + 3 * plain)
    largest = max(layers, default=0) * context.batch * (context.value_bytes + 4)
    yield Term(name="unpacked keys and values", bytes=largest, during="attention")

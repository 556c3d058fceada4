"""What the choices of a cache share: layers of our own, which model layers keep keys, and sizes.

A cache of transformers is a list of layers, one for each layer of the model. A choice replaces
those that keep every token; windows, recurrent states and shared keys stay as they are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from engine.contexts import Receipt, Term
from engine.errors import Problem
from engine.shape import WINDOWED

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig

    from engine.contexts import CheckContext, EstimateContext
    from engine.session import Session
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


def measure(cache: Cache | None) -> dict[str, str | int]:
    """Return what a cache holds, as evidence: counted in its tensors."""
    layers = [one for one in getattr(cache, "layers", []) if not isinstance(one, TokenCount)]
    ours = [layer for layer in layers if isinstance(layer, Layer)]
    theirs = [
        tensor
        for layer in layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    size = sum(tensor.numel() * tensor.element_size() for tensor in theirs)
    states = sum(_state_bytes(layer) for layer in layers if not isinstance(layer, Layer))
    seen = int(cache.get_seq_length()) if cache is not None else 0
    lengths = [layer.held for layer in ours] or [min(seen, each.shape[-2]) for each in theirs[-2:]]
    return {
        "class": type(cache).__name__,
        "layers": len(layers),
        "kind of layer": ", ".join(sorted({type(layer).__name__ for layer in layers})),
        "bytes": size + sum(layer.nbytes for layer in ours),
        "bytes if unquantized": size + sum(layer.plain_bytes for layer in ours),
        **({"bytes of states": states} if states else {}),
        "tokens held": max(lengths, default=0),
        "tokens seen": seen,
    }


def _state_bytes(layer: Any) -> int:
    """Return the bytes that a layer of transformers keeps in dicts: its states, by their number."""
    from torch import Tensor

    held = [kept for kept in vars(layer).values() if isinstance(kept, dict)]
    return sum(
        state.numel() * state.element_size()
        for states in held
        for state in states.values()
        if isinstance(state, Tensor)
    )


def prove_states(session: Session, kind: type[Cache]) -> Receipt:
    """Show that states are kept where there are no keys, and that steps go on from them."""
    kept, passes = session.probe.kept, session.probe.tokens
    carrying = session.carrying
    return Receipt(
        slot="cache",
        claim="states are kept, of one size however long the text, and tokens go on from them",
        evidence={
            **kept,
            "tokens per forward pass": ", ".join(map(str, passes)),
            "lost of the past, token by token": round(carrying.lost_by_steps, 6),
        },
        ok=type(session.probe.cache) is kind
        and int(kept.get("bytes of states", 0)) > 0
        and passes[-1] == 1
        and kept["tokens seen"] == kept["tokens sent"]
        and carrying.by_steps,
    )


def prove_packed(
    session: Session, claim: str, kind: type[Layer], tokens: int = 0, **asked: int
) -> Receipt:
    """Measure the bytes of the probe's cache; where it is too short to pack, of a longer text.

    Args:
        kind: of layer, in place of those that keep every token.
        tokens: after which it must have packed some.
        asked: options of the layers.
    """
    kept = session.probe.kept
    layers = getattr(session.probe.cache, "layers", ())
    ours = [one for one in layers if isinstance(one, kind) and one.parts]
    size, plain, longer = kept["bytes"], kept["bytes if unquantized"], {}
    if tokens and ours:
        trial = rehearse(ours[0], tokens)
        size, plain = trial.nbytes, trial.plain_bytes
        longer = {
            f"bytes of {trial.seen} tokens in a layer": size,
            f"bytes of {trial.seen} tokens if unquantized": plain,
        }
    given = [vars(one).get(name) == value for one in ours for name, value in asked.items()]
    return Receipt(
        slot="cache",
        claim=claim,
        evidence={**kept, "packed layers": len(ours), **longer},
        ok=bool(ours)
        and all(given)
        and kept["tokens seen"] == kept["tokens sent"]
        and 0 < int(size) < int(plain),
    )

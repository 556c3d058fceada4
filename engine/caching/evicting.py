"""Forget old tokens exactly: a layer that keeps the first and the last, and the mask that fits it.

While a text is shorter than what is kept, or grows by one token, the keys that are there are those
to attend to. A longer prompt, or the next turn of a chat, needs a mask as well: each of its tokens
has a window of its own. And where a batch is padded, the first tokens of each row lie elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.attending.scores import true_positions
from engine.caching.layers import (
    FULL,
    Layer,
    layers_kept,
    refuse_other_layers,
    refuse_without_full,
    rehearse,
)
from engine.contexts import CheckContext, EstimateContext, Receipt
from engine.errors import Problem, RuntimeFailure
from engine.rules import Rule
from engine.shape import WINDOWED, WITHOUT_KEYS

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

    from engine.session import Session


class EvictingLayer(Layer):
    """Keep the first `sinks` tokens and, with the newest, the last `window`.

    Between two steps that is one less: the next token is the newest of its own window.
    """

    def __init__(self, window: int, sinks: int = 0) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.starts: torch.Tensor | None = None
        """First real column of each row `[batch, 1]`; None where nothing is padded."""

    @property
    def room(self) -> int:
        """Return how many tokens are kept between two steps."""
        return self.sinks + self.window - 1

    @property
    def held(self) -> int:
        """Return how many tokens are kept, of those seen."""
        return min(self.seen, self.room)

    @property
    def is_croppable(self) -> bool:
        """Tell whether nothing was forgotten yet: what is gone cannot come back."""
        return self.held == self.seen

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values; give them with the kept ones, then forget what is too old."""
        import torch

        # What comes may be a view of queries, keys and values together, and would keep them all.
        before = self.parts or {"keys": keys[:, :, :0], "values": values[:, :, :0]}
        new = {"keys": keys, "values": values}
        parts = {name: torch.cat([before[name], new[name]], -2) for name in new}
        offset, self.dtype = self.seen - self.held, keys.dtype
        self.seen += keys.shape[-2]
        self.parts = {name: self._keep(part, offset) for name, part in parts.items()}
        return parts["keys"], parts["values"]

    def _keep(self, part: torch.Tensor, offset: int) -> torch.Tensor:
        """Keep what the next token may see of `[batch, heads, tokens, size]`."""
        import torch

        there = part.shape[-2]
        if there <= self.room:
            return part
        recent = part[:, :, there - (self.window - 1) :]
        if not self.sinks:
            return recent.clone()  # a view would keep the memory of the whole
        if self.starts is None:
            return torch.cat([part[:, :, : self.sinks], recent], -2)
        # A row's first tokens may still lie among the recent ones, or not be here yet.
        columns = self.starts + torch.arange(self.sinks, device=part.device)
        own = torch.arange(self.sinks, device=part.device).expand_as(columns)
        moved = offset > 0
        slots = torch.where(columns >= offset + self.sinks * moved, columns - offset, own)
        slots = slots.clamp(max=there - 1)[:, None, :, None]
        first = part.gather(2, slots.expand(-1, part.shape[1], -1, part.shape[3]))
        return torch.cat([first, recent], -2)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; impossible once older ones were forgotten."""
        if not self.is_croppable:
            raise RuntimeError(f"tokens before the last {self.window} are gone for good")
        self.seen -= abs(tokens_to_remove)
        self.parts = {name: part[:, :, : self.seen] for name, part in self.parts.items()}

    def visible(self, queries: int) -> torch.Tensor | None:
        """Return which keys the next tokens see `[rows, queries, keys]`; None if all before them.

        Rows is 1 where nothing is padded.
        """
        import torch

        keys, offset = self.get_mask_sizes(queries)
        moved = self.sinks > 0 and offset > 0
        if (queries == 1 or keys <= self.window) and not (moved and self.starts is not None):
            return None
        device = next(iter(self.parts.values())).device if self.parts else None
        start = self.starts
        if start is None:
            start = torch.zeros(1, 1, dtype=torch.long, device=device)
        columns = (torch.arange(keys, device=start.device) + offset).expand(len(start), -1)
        here = columns >= start
        if moved:
            first = start + torch.arange(self.sinks, device=start.device)
            columns = torch.cat([first, columns[:, self.sinks :]], -1)
            # Not twice: while it is among the recent tokens, it is seen there.
            here = torch.cat([first < offset + self.sinks, here[:, self.sinks :]], -1)
        query = (torch.arange(queries, device=start.device) + self.seen)[:, None]
        column = columns[:, None, :]
        near = (column > query - self.window) | (column < start[..., None] + self.sinks)
        return here[:, None, :] & near & (column <= query)


def watch(model: PreTrainedModel) -> None:
    """Have each pass of the model hide what an evicting cache would not have kept."""
    model.register_forward_pre_hook(_hide, with_kwargs=True)


def _hide(
    model: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the layers where the rows begin, and give the model a mask where it needs one."""
    cache = given.get("past_key_values")
    layers = [one for one in getattr(cache, "layers", ()) if isinstance(one, EvictingLayer)]
    if not layers:
        return None
    mask: Any = given.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        starts = None if bool(mask.all()) else mask.long().argmax(-1, keepdim=True)
        for layer in layers:
            layer.starts = starts
    ids: Any = args[0] if args else given.get("input_ids", given.get("inputs_embeds"))
    visible = layers[0].visible(ids.shape[1])
    if visible is None:
        return None
    changed = dict(given)
    if changed.get("position_ids") is None:
        changed["position_ids"] = _positions(ids, mask, layers[0].seen)
    changed["attention_mask"] = _masks(model, cache, layers[0], ids, mask, visible)
    return args, changed


def _positions(ids: torch.Tensor, mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Return positions as generate() counts them; a model given a ready mask cannot."""
    import torch

    if mask is None:
        mask = torch.ones(ids.shape[0], seen + ids.shape[1], dtype=torch.long, device=ids.device)
    return true_positions(mask, ids.shape[1])


def _masks(
    model: Any,
    cache: Cache | None,
    layer: EvictingLayer,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    visible: torch.Tensor,
) -> Any:
    """Return the masks of all kinds of layers, as the model would make them but for ours."""
    import torch
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        and_masks,
        causal_mask_function,
        create_masks_for_generate,
    )

    config = model.config.get_text_config(decoder=True)
    rows, queries = ids.shape[:2]
    keys, offset = layer.get_mask_sizes(queries)
    sizes = torch.empty((rows, queries, 0), dtype=model.dtype, device=ids.device)
    make: Callable[..., Any] = getattr(
        model, "create_masks_for_generate", create_masks_for_generate
    )
    usual = make(config=config, inputs_embeds=sizes, attention_mask=mask, past_key_values=cache)
    table = visible.to(ids.device).expand(rows, -1, -1)
    ours = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=rows,
        q_length=queries,
        kv_length=keys,
        q_offset=layer.seen,
        kv_offset=offset,
        mask_function=and_masks(
            causal_mask_function,
            partial(_look_up, table, layer.seen, offset),
        ),
        attention_mask=None,  # what is padding, the table knows
        allow_is_causal_skip=False,
        dtype=model.dtype,
        config=config,
        use_vmap=False,
        device=ids.device,
    )
    if getattr(ours, "ndim", len(getattr(ours, "shape", ()))) != 4:
        raise RuntimeFailure(
            Problem(
                message=f"attention {config._attn_implementation} takes no mask of queries and "
                "keys, which a prompt longer than the cache's window needs",
                hint="attention=sdpa",
                code="mask-form",
                slot="attention",
            )
        )
    return {**usual, "full_attention": ours} if isinstance(usual, dict) else ours


def _look_up(
    table: torch.Tensor, seen: int, offset: int, row: Any, _head: Any, query: Any, key: Any
) -> Any:
    return table[row, query - seen, key - offset]


EXCLUDES: dict[str, str | Rule] = {
    "model.alibi_by_mask": Rule(
        code="evicting-alibi",
        why="the model makes its ALiBi biases for all tokens there are, not for those kept",
        hint="cache=dynamic",
        source="transformers, models/bloom/modeling_bloom.py, build_alibi_tensor",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "attention.flash": Rule(
        code="evicting-flash",
        why="flash attention takes no mask of queries and keys, and a prompt longer than the "
        "cache's window needs one",
        hint="attention=sdpa",
        source="transformers, masking_utils.flash_attention_mask",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "position.scores": Rule(
        code="evicting-scores",
        why="it needs the position of each key, and attention is not told which were kept",
        hint="cache=dynamic",
        source="transformers.AttentionInterface: position_ids are those of the queries",
        seen="transformers 5.23.0, 2026-11-22",
    ),
}
"""What no evicting cache goes with."""

SCATTERED: dict[str, str | Rule] = {
    "model.alibi": Rule(
        code="sinks-alibi",
        why="the model takes its ALiBi biases for keys in one piece, where the first tokens are "
        "not",
        hint="cache=sliding",
        source="transformers, models/mpt/modeling_mpt.py, MptAttention.forward",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "position.bias": Rule(
        code="sinks-bias",
        why="biases go by the distance of the keys, and masks take keys to be in one piece, where "
        "the first tokens are not",
        hint="cache=sliding",
        source="transformers, masking_utils: kv_offset is one number for all keys",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "position.rotation": Rule(
        code="sinks-rotation",
        why="keys are rotated late, by their positions, and masks take keys to be in one piece, "
        "where the first tokens are not",
        hint="cache=sliding",
        source="transformers, masking_utils: kv_offset is one number for all keys",
        seen="transformers 5.23.0, 2026-11-28",
    ),
    "attention.window": Rule(
        code="sinks-window",
        why="its window hides by distance, and masks take keys to be in one piece, where the first "
        "tokens are not: they would be hidden, or seen in the wrong place",
        hint="attention=sdpa: the cache itself hides what it does not keep",
        source="transformers, masking_utils: kv_offset is one number for all keys",
        seen="transformers 5.23.0, 2026-11-22",
    ),
}
"""What goes with no cache that keeps tokens from two places."""

MOST = 2**31
"""Tokens in a window, or before it; no text is as long."""

OWN_MASKS = frozenset({FULL, *WINDOWED, *WITHOUT_KEYS}) - {"hybrid_sliding"}
"""Types of layers whose masks do not depend on the layers that keep every token."""


def refuse(context: CheckContext, choice: str, window: int) -> Iterator[Problem]:
    """Refuse windows that are none, and models that cannot be made to forget."""
    shape = context.shape
    own = (shape.sliding_window if shape else None) or 1
    if window > MOST:
        yield Problem(
            slot="cache",
            code="value",
            message=f"cache.window={window} tokens are too many: the most is {MOST}",
            hint="cache=dynamic, which forgets nothing",
        )
    if window < max(own, 2):
        why = "a token would see itself alone" if window < 2 else f"the model's own has {own}"
        yield Problem(
            slot="cache",
            code="value",
            message=f"cache.window={window} tokens are too few: {why}",
            hint=f"cache.window={max(own, 1024)}",
        )
    other = list(refuse_other_layers(context, choice, OWN_MASKS))
    yield from other or refuse_without_full(context, choice, "forgets in")


def evicted_bytes(context: EstimateContext, layer: EvictingLayer) -> int:
    """Return the bytes between two steps, when `layer` stands for all that keep every token."""
    kept = sum(
        values * (min(tokens, layer.room) if kind == FULL else tokens)
        for kind, values, tokens in layers_kept(context.shape, context.tokens)
    )
    return context.batch * kept * context.value_bytes


def _weightless(layer: EvictingLayer) -> EvictingLayer:
    """Return a copy that takes no memory, however wide its window."""
    trial = copy.copy(layer)
    trial.parts = {name: part.to("meta") for name, part in layer.parts.items()}
    return trial


def prove(session: Session, claim: str, layer: EvictingLayer) -> Receipt:
    """Measure the probe's cache, and how much of a text that overflows it `layer` keeps."""
    kept = session.probe.kept
    layers = getattr(session.probe.cache, "layers", ())
    ours = [one for one in layers if isinstance(one, EvictingLayer)]
    longer = rehearse(_weightless(ours[0]), layer.room) if ours and ours[0].parts else layer
    left = longer.parts["keys"].shape[-2] if longer.parts else 0
    return Receipt(
        slot="cache",
        claim=claim,
        evidence={
            **kept,
            "layers that forget": len(ours),
            "of a longer text, tokens seen": longer.seen,
            "of a longer text, tokens held": left,
        },
        ok=bool(ours)
        and all(one.room == layer.room and one.seen == kept["tokens sent"] for one in ours)
        and left == layer.room < longer.seen,
    )

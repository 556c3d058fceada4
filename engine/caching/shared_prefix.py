"""A beginning that many prompts share: computed once, copied for each.

Right only where a text in two parts leaves the same keys and values as in one: caches that round
or forget do not, nor do weights whose rounding depends on the pass; these recompute. What is
shared is compared token by token with each prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.caching.carrying import ONE_BY_ONE
from engine.caching.continuing import common, cut, held_at_most, room_needed, tokens_held
from engine.generate import check_prompt, room_for
from engine.positions.rotary import frequency_set

if TYPE_CHECKING:
    from transformers import Cache

    from engine.contexts import KeyValues
    from engine.session import Session

UNSHARED = {
    "cache.none": "nothing is kept",
    "cache.quantized": "its rounding depends on the parts in which a text comes",
    "cache.evicting": "what it forgets depends on the parts in which a text comes",
    "cache.offloaded": "it cannot be copied",
    "weights.by_pass": "how its 8-bit products round depends on all tokens of a pass",
    "decode.beam": "beams need a cache of their own",
}
"""Trait → why a prefix is computed for each prompt."""


class SharedPrefix:
    """Tokens that prompts begin with, and the cache that holds them."""

    def __init__(self, session: Session, ids: Sequence[int]) -> None:
        """Know the tokens; `compute` runs them through the model.

        Raises:
            RuntimeFailure: when the model has no room for them.
        """
        check_prompt(session, ids)
        self._session = session
        self._ids = list(ids)
        self._values: KeyValues | None = None
        self.uses = 0
        """Prompts that began with a copy."""
        self.saved = 0
        """Tokens that did not go through the model, for they were in a copy."""
        self.refused = next((why for each, why in UNSHARED.items() if each in session.traits), "")
        """Why nothing is shared; '' where it is."""
        if not self.refused and not session.carrying.in_pieces:
            self.refused = ONE_BY_ONE

    def __len__(self) -> int:
        """Return the tokens that can be shared."""
        return len(self._ids)

    @property
    def cache(self) -> Cache | None:
        """Return the cache that copies are taken of."""
        return None if self._values is None else self._values.cache

    @property
    def tokens_held(self) -> int:
        """Return the tokens that the cache really holds."""
        return 0 if self.cache is None else tokens_held(self.cache)

    def compute(self, room: int = 0) -> None:
        """Send the tokens through the model, into a cache with room for at least `room`.

        Raises:
            RuntimeFailure: when the recipe's cache is too small for them.
        """
        import torch

        session: Any = self._session
        if self.refused:
            return
        room = max(room, room_needed(session, 2 * len(self._ids)))
        limit = session.context_tokens
        self._values = session.new_cache(1, room if limit is None else min(room, limit))
        room_for(session, self.cache, len(self._ids))
        ids = torch.tensor([self._ids], device=session.device)
        few = {"logits_to_keep": 1} if session.model._supports_logits_to_keep() else {}
        with torch.no_grad():
            session.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                use_cache=True,
                **few,
            )

    def begin(self, ids: Sequence[int]) -> Cache | None:
        """Return a cache that holds the beginning of a prompt; None where nothing can be shared."""
        found = self._copied(ids)
        if found is not None:
            self.uses += 1
            self.saved += tokens_held(found)
        return found

    def begin_batch(self, prompts: Sequence[Sequence[int]]) -> Cache | None:
        """Return a cache for prompts that are padded on the left; None if nothing can be shared.

        Row by row it holds the padding, and as much of the prefix as fits behind: the columns that
        all rows share go through the model no more.
        """
        longest = max(prompts, key=len)
        pads = [len(longest) - len(prompt) for prompt in prompts]
        shared = [self._keep(prompt) for prompt in prompts]
        columns = min(pad + kept for pad, kept in zip(pads, shared, strict=True))
        if len({self._frequencies(prompt) for prompt in prompts}) > 1:
            return None  # the frequencies of a batch are those of its longest row
        found = self._copied(longest, columns)
        if found is None or not _repeat(found, columns, pads):
            return None
        self.uses += len(prompts)
        self.saved += columns * len(prompts)
        return found

    def _frequencies(self, ids: Sequence[int]) -> int:
        return frequency_set(self._session.config, len(ids), of_pass=True)

    def _keep(self, ids: Sequence[int]) -> int:
        # Not even a complete match may stay complete: the model must be given one token at least.
        return min(common(self._ids, ids), len(ids) - 1)

    def _copied(self, ids: Sequence[int], columns: int | None = None) -> Cache | None:
        session, keep = self._session, self._keep(ids)
        keep = keep if columns is None else min(keep, columns)
        if self.refused or keep < 1:
            return None
        if self._frequencies(self._ids) != self._frequencies(ids):
            return None
        needed = room_needed(session, len(ids))
        room = None if self._values is None else held_at_most(session, self._values)
        if self._values is None or (room is not None and room < needed):
            self.compute(needed if room is None else max(needed, 2 * room))
        found = copy.deepcopy(self.cache)
        if found is None or cut(session, found, keep):
            return found
        if columns is not None:
            return None
        # It cannot be cut, so what is shared becomes shorter for all that follow.
        self._ids = self._ids[:keep]
        self.compute(needed)
        return copy.deepcopy(self.cache)


def _repeat(cache: Cache, columns: int, pads: Sequence[int]) -> bool:
    """Make a row of each padding; False where a layer holds more than a key and value per token."""
    from torch import Tensor, cat
    from torch.nn.functional import pad as padded

    def rows(tensor: Tensor) -> Tensor:
        return cat([padded(tensor[..., : columns - pad, :], (0, 0, pad, 0)) for pad in pads])

    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if {name for name, held in vars(layer).items() if _counts(held)} != {"keys", "values"}:
            return False
        whole = (columns + 1, 0) == tuple(layer.get_mask_sizes(1))
        if not whole or layer.keys.shape[-2] != columns:
            return False
    if min(pads) < 0 or max(pads) >= columns:
        return False
    for layer in layers:
        layer.keys, layer.values = rows(layer.keys), rows(layer.values)
    return True


def _counts(held: object) -> bool:
    """Tell whether something in a layer may be per token: neither a number nor a flag."""
    from torch import Tensor

    return held.dim() > 0 if isinstance(held, Tensor) else isinstance(held, dict | list)

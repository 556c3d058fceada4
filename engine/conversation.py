"""Carry a conversation from turn to turn, and its keys and values with it.

The token ids that were really processed are remembered, because a cache does not store them.
Each turn compares them with what the chat template makes of all messages: what agrees is kept,
the rest is cut off the cache, and only what is new goes through the model. Leaving any of this to
chance gives wrong text without an error (`generate` trusts the length of what it is given).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.contexts import KeyValues, Receipt
from engine.errors import RecipeError
from engine.generate import TextStream, capacity, check_prompt, room_for
from engine.template import render

if TYPE_CHECKING:
    from transformers import Cache

    from engine.session import Session

FIRST_CACHE_TOKENS = 4096
"""What a cache of fixed size starts with where the recipe does not say; it doubles when full."""


class Conversation:
    """Messages so far, the tokens they became, and the cache that holds them."""

    def __init__(self, session: Session) -> None:
        """Start empty.

        Raises:
            RecipeError: when the model has no chat template.
        """
        if not session.tokenizer.chat_template:
            raise RecipeError(
                f"{session.recipe.model.path} has no chat template: it completes text, and does "
                "not converse",
                hint="engine run instead, or put a chat_template.jinja beside its tokenizer",
            )
        self._session = session
        self._values: KeyValues | None = None
        self._ids: list[int] = []
        self._unread: TextStream | None = None
        self.messages: list[dict[str, str]] = []
        self.receipt: Receipt | None = None

    def send(self, message: str) -> TextStream:
        """Answer `message`. An answer that was not read to its end is broken off by the next.

        A message counts as said when its answer begins to be read.

        Raises:
            RuntimeFailure: when the conversation no longer fits the model's context.
        """
        if self._unread is not None:
            self._unread.close()
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = self._tokens(messages)
        check_prompt(self._session, ids)
        cache, why_anew = self._cache_for(ids)
        kept = int(cache.get_seq_length()) if cache is not None else 0
        room = room_for(self._session, cache, len(ids))
        self.receipt = None

        def finished(new: list[int], text: str, sent: int) -> None:
            self._ids = ids + new
            self._unread = None
            self.messages = [*messages, {"role": "assistant", "content": text}]
            if cache is not None:
                self.receipt = self._prove(len(ids), kept, len(new), sent, why_anew)

        self._unread = TextStream(self._session, ids, cache, room=room, finished=finished)
        return self._unread

    def _prove(self, total: int, kept: int, new: int, sent: int, why_anew: str) -> Receipt:
        # Each new token but the last is sent through the model to get the next.
        return Receipt(
            slot="cache",
            plugin=self._session.recipe.choices.get("cache", ""),
            claim="this turn processed only what was new"
            if not why_anew
            else f"this turn processed everything: {why_anew}",
            evidence={
                "conversation_tokens": total,
                "from_cache": kept,
                "new_tokens": new,
                "forwarded": sent,
            },
            ok=sent <= total - kept + new,
        )

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer = self._session.tokenizer
        text = render(tokenizer, messages)
        encoded = tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
        )
        whole = list(encoded["input_ids"])
        said = str(
            tokenizer.decode(
                self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if not self._ids or not tokenizer.is_fast or not text.startswith(said):
            return whole
        # Tokenizing an answer again can split it otherwise than the model wrote it: what was said
        # keeps its tokens, what follows is as it is in its place.
        spans = encoded["offset_mapping"]
        tail = next((i for i, (start, _) in enumerate(spans) if start >= len(said)), len(spans))
        if 0 < tail < len(spans) and spans[tail - 1][1] <= len(said):
            return self._ids + whole[tail:]
        return whole

    def _cache_for(self, ids: list[int]) -> tuple[Cache | None, str]:
        """Return a cache that holds a beginning of `ids`, never all, and why if it is a new one."""
        needed = len(ids) + self._session.recipe.decode.max_new_tokens
        limit = self._session.context_tokens
        needed = needed if limit is None else min(needed, limit)
        if self._values is None:
            self._values = self._allocate(max(needed, FIRST_CACHE_TOKENS))
            return self._values.cache, "the conversation begins"
        cache = self._values.cache
        if cache is None:
            return None, ""
        held = self._capacity(self._values)
        if held is None or held >= needed:
            larger = None
        else:
            larger = self._allocate(max(needed, 2 * held))
            grown = self._capacity(larger)
            if grown is not None and grown <= held and held > len(ids):
                larger = None  # no more is to be had: use what there is to its end
        if larger is None and self._cut(cache, ids):
            return cache, "" if int(cache.get_seq_length()) else "nothing of it was kept before"
        self._values = larger or self._allocate(max(needed, FIRST_CACHE_TOKENS))
        if larger is not None:
            return self._values.cache, "a larger cache was needed (cache.max_tokens sets its size)"
        choice = self._session.recipe.choices.get("cache")
        return self._values.cache, f"earlier text changed, and cache={choice} cannot be cut back"

    def _allocate(self, tokens: int) -> KeyValues:
        limit = self._session.context_tokens
        return self._session.new_cache(1, tokens if limit is None else min(tokens, limit))

    def _capacity(self, values: KeyValues) -> int | None:
        return capacity(values.cache, self._session.shape.sliding_window)

    def _cut(self, cache: Cache, ids: list[int]) -> bool:
        """Cut off what differs from `ids`; False when the cache cannot be cut."""
        held = int(cache.get_seq_length())
        known = min(held, len(self._ids))
        same = next(
            (i for i, (a, b) in enumerate(zip(self._ids[:known], ids, strict=False)) if a != b),
            min(known, len(ids)),
        )
        # Not even a complete match may stay complete: the model must be given one token at least.
        keep = min(same, len(ids) - 1)
        if keep == held:
            return True
        if not cache.is_croppable:
            return False
        try:
            cache.crop(keep - held)
        except RuntimeError:  # a sliding window that has already moved on
            return False
        return int(cache.get_seq_length()) == keep

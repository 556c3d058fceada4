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

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

    from engine.session import Session

FIRST_CACHE_TOKENS = 1024
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
        self.messages: list[dict[str, str]] = []
        self.receipt: Receipt | None = None

    def send(self, message: str) -> TextStream:
        """Answer `message`. Read the answer to its end, or close it, before the next.

        Raises:
            RuntimeFailure: when the conversation no longer fits the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = self._tokens(messages)
        check_prompt(self._session, ids)
        cache = self._cache_for(ids)
        kept = int(cache.get_seq_length()) if cache is not None else 0
        before = self._session.forwarded_tokens
        room = room_for(self._session, cache, len(ids))
        self.messages = messages
        self.receipt = None

        def finished(new: list[int], text: str) -> None:
            self._ids = ids + new
            self.messages.append({"role": "assistant", "content": text})
            if cache is not None:
                sent = self._session.forwarded_tokens - before
                self.receipt = self._prove(len(ids), kept, len(new), sent)

        return TextStream(self._session, ids, cache, room=room, finished=finished)

    def _prove(self, total: int, kept: int, new: int, sent: int) -> Receipt:
        # Each new token but the last is sent through the model to get the next.
        return Receipt(
            slot="cache",
            plugin=self._session.recipe.choices.get("cache", ""),
            claim="this turn processed only what was new",
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
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        said = str(
            tokenizer.decode(
                self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if self._ids and text.startswith(said):
            # Tokenizing an answer again can split it otherwise than the model wrote it.
            return self._ids + _encode(tokenizer, text[len(said) :])
        return _encode(tokenizer, text)

    def _cache_for(self, ids: list[int]) -> Cache | None:
        """Return a cache that holds a beginning of `ids` and nothing else, never all of them."""
        needed = len(ids) + self._session.recipe.decode.max_new_tokens
        limit = self._session.context_tokens
        needed = needed if limit is None else min(needed, limit)
        if self._values is not None:
            cache = self._values.cache
            if cache is None:
                return None
            held = capacity(cache)
            if (held is None or held >= needed) and self._cut(cache, ids):
                return cache
        size = max(needed, FIRST_CACHE_TOKENS, 2 * (capacity(self._last_cache) or 0))
        self._values = self._session.new_cache(1, size if limit is None else min(size, limit))
        return self._values.cache

    @property
    def _last_cache(self) -> Cache | None:
        return self._values.cache if self._values is not None else None

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


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

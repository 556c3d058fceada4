"""Turn tokens into text piece by piece: never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 5
"""Tokens of the prompt that are decoded along, so that the first new one keeps its space."""


class Detokenizer:
    """Turn token ids into text as they come, never showing half a character.

    A token's text depends on what stands before it, so each is decoded behind the previous ones,
    and the difference is what it adds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._start = 0
        self._shown = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that `token` completes, or '' in the middle of a character."""
        self._ids.append(token)
        return self._text(final=False)

    def finish(self) -> str:
        """Return what is left: an incomplete character, shown as U+FFFD."""
        return self._text(final=True)

    def _text(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

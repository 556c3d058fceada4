"""Turn tokens into text piece by piece: never half a character, never half a stop string."""

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


class StopStrings:
    """Cut text at the first stop string, holding back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what can be shown after `text` arrived."""
        self._held += text
        cuts = [self._held.find(stop) for stop in self._stops]
        if any(cut >= 0 for cut in cuts):
            self.found = True
            shown, self._held = self._held[: min(cut for cut in cuts if cut >= 0)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return what was held back for nothing."""
        shown, self._held = self._held, ""
        return shown


class StopFinder:
    """Look for stop strings in the new text of one row, so that nothing is generated behind."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stops: list[str]
    ) -> None:
        self._text = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)

    def push(self, token: int) -> bool:
        """Tell whether a stop string has come."""
        if not self._stops.found:
            self._stops.push(self._text.push(token))
        return self._stops.found


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""Find stop strings in what a model says: its text, and the special tokens that are no text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress
from typing import TYPE_CHECKING

from engine.decoding.detokenize import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Cut text at the first stop string, holding back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._shown: list[bool] = []
        """For each character that is held, whether it is part of the answer."""
        self.found = False

    def push(self, text: str, *, shown: bool = True) -> str:
        """Return what can be shown after `text` arrived.

        Args:
            shown: False for the name of a special token, which is matched and never shown.
        """
        self._held += text
        self._shown += [shown] * len(text)
        cuts = [cut for stop in self._stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self.found = True
            return self._take(min(cuts))
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - keep)

    def finish(self) -> str:
        """Return what was held back for nothing."""
        return self._take(len(self._held))

    def _take(self, length: int) -> str:
        text = "".join(compress(self._held[:length], self._shown))
        self._held, self._shown = self._held[length:], self._shown[length:]
        return text


class StoppingText:
    """Turn token ids into text as they come, cut at the first stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._text = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._special = special_tokens(tokenizer) if stops else {}

    @property
    def stopped(self) -> bool:
        """Tell whether a stop string has come."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Return the text that can be shown after `token`."""
        if self.stopped:
            return ""
        text = self._stops.push(self._text.push(token))
        if token in self._special and not self.stopped:
            text += self._stops.push(self._special[token], shown=False)
        return text

    def stops_at(self, token: int) -> bool:
        """Take a token, and tell whether a stop string has come."""
        self.push(token)
        return self.stopped

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        return self._stops.push(self._text.finish()) + self._stops.finish()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return what is left out of text: names such as '<|im_end|>', as they stand behind a word."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {index for index, token in added if token.special}.union(tokenizer.all_special_ids)
    names = _behind(tokenizer, sorted(ids))
    return {i: name for i, name in names.items() if name and not _decoded(tokenizer, [i])}


def never_produced(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[str]:
    """Return the stop strings that no sequence of the tokenizer's tokens contains."""
    doubtful = [stop for stop in stops if stop not in _round_trip(tokenizer, stop)]
    if not doubtful:
        return []
    ids = sorted(tokenizer.get_vocab().values())
    first = {_decoded(tokenizer, [each], skip=False) for each in ids}
    behind = {*_behind(tokenizer, ids).values()}
    return [stop for stop in doubtful if not _can_be_made(stop, first - {""}, behind - {""})]


def _behind(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[int, str]:
    """Return what each token adds to a text: some tokenizers put a space between two."""
    before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    start = len(_decoded(tokenizer, before, skip=False))
    return {each: _decoded(tokenizer, [*before, each], skip=False)[start:] for each in ids}


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _decoded(tokenizer, list(ids), skip=False)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, skip: bool = True) -> str:
    found = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return str(found)


def _can_be_made(stop: str, first: Collection[str], behind: Collection[str]) -> bool:
    """Tell whether a string lies within the text of some tokens, one after the other.

    Args:
        first: the texts of tokens that stand alone.
        behind: what each token adds behind another.
    """
    texts = {*first, *behind}
    if any(stop in text for text in texts):
        return True
    # A token that is part of a character shows as U+FFFD: several together make any that is not
    # ASCII, whose bytes are tokens of their own.
    parts = any("\ufffd" in text for text in texts)
    reached = {at for at in range(1, len(stop)) if any(text.endswith(stop[:at]) for text in texts)}
    reached |= {0} if parts else set()
    for at in range(len(stop)):
        if at not in reached:
            continue
        if parts and not stop[at].isascii():
            reached.add(at + 1)
        if at:
            reached |= {at + len(text) for text in behind if stop.startswith(text, at)}
            reached |= {len(stop)} if any(text.startswith(stop[at:]) for text in behind) else set()
    return len(stop) in reached


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

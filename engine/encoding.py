"""Turn text into a tokenizer's tokens, and tell what of it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

_ALONE = {"add_special_tokens": False}


@dataclass(frozen=True)
class Encoded:
    """A text as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Where in the text each token begins and ends; empty where the tokenizer does not tell."""
    unread: list[str]
    """Parts of the text that the model does not see: they have no token, or that for the unknown.
    """

    @property
    def notes(self) -> list[str]:
        """Say what the model does not see."""
        if not self.unread:
            return []
        some = ", ".join(f"{part!r:.30}" for part in self.unread[:5])
        more = f" and {len(self.unread) - 5} more" if len(self.unread) > 5 else ""
        return [f"the model's tokenizer cannot tell it of all of the prompt: {some}{more}"]


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> Encoded:
    """Return the tokens of a text. How many there may be is for others to say."""
    found = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        verbose=False,
        return_offsets_mapping=tokenizer.is_fast,
    )
    ids = list(found["input_ids"])
    spans = list(found["offset_mapping"]) if tokenizer.is_fast else []
    return Encoded(ids, spans, list(_unread(tokenizer, text, ids, spans)))


def _unread(
    tokenizer: Any, text: str, ids: list[int], spans: list[tuple[int, int]]
) -> Iterator[str]:
    unknown, name = tokenizer.unk_token_id, str(tokenizer.unk_token)
    if not spans:
        if unknown in ids and name not in text:
            yield name
        return
    read = [
        (start, end)
        for token, (start, end) in zip(ids, spans, strict=True)
        if token != unknown or text[start:end] == name
    ]
    gaps, at = [], 0
    for start, end in [*sorted(read), (len(text), len(text))]:
        # Spaces between words are often left to the tokens of the words.
        gaps += [gap] if (gap := text[at:start].strip()) else []
        at = max(at, end)
    if gaps and unknown is None:
        # What has no token is dropped, and what follows is said to stand in its place.
        letters = dict.fromkeys("".join(text.split()))
        yield from (each for each in letters if not tokenizer(each, **_ALONE)["input_ids"])
    else:
        yield from gaps

"""decode=prompt-lookup: guess what the text has said before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, DecodeContext, Decoder, Receipt
from engine.decoding.sampling import Sampling
from engine.decoding.speculation import EXCLUDES, Drafter, SpeculativeDecoder, refusals
from engine.errors import Problem
from engine.rules import Rule

if TYPE_CHECKING:
    import torch

    from engine.session import Session


@dataclass
class PromptLookup(Sampling):
    """Guess that the text goes on as it did where its last tokens stood before, and verify.

    The model verifies `num_draft_tokens` guesses in one pass, so that answers that repeat their
    prompt (edits of code, summaries, questions on a document) come in fewer passes, and are the
    same tokens. Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; verified as in
    Leviathan et al. 2023, arXiv 2211.17192, section 2. `max_ngram` is the longest end that is
    looked for; shorter ones follow.
    """

    num_draft_tokens: int = 8
    max_ngram: int = 3
    excludes: ClassVar[Mapping[str, Rule]] = EXCLUDES

    @property
    def provides(self) -> tuple[str, ...]:
        """Say that more than one token goes through the model at a time."""
        return (*super().provides, "decode.assisted")

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range, and what cannot forget rejected drafts."""
        yield from super().check(context)
        yield from refusals(context, self.num_draft_tokens)
        if not 1 <= self.max_ngram <= 64:
            yield self.out_of_range("max_ngram", "must be from 1 to 64", 3)

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Give a decoder."""
        return LookupDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show a short run on a prompt that repeats itself."""
        claim = "copies from the text are verified in fewer passes, and rejected ones cut off"
        yield session.built["decode"].receipt(session, claim)


class LookupDecoder(SpeculativeDecoder):
    """Draft from the ids so far."""

    options: PromptLookup

    def __init__(self, options: PromptLookup, context: DecodeContext) -> None:
        super().__init__(options, context)
        self.num_draft_tokens = options.num_draft_tokens

    def drafter(self) -> Drafter:
        """Return the search: it keeps nothing between steps."""
        return lambda ids, most: look_up(ids, most, self.options.max_ngram)


def look_up(ids: torch.Tensor, most: int, longest: int) -> torch.Tensor:
    """Return what followed where the last tokens stood before: `[1, drafts]`, or none.

    Of several places the last one counts that has `most` tokens behind it, else the first.
    """
    length = ids.shape[1]
    for size in range(min(longest, length - 1), 0, -1):
        windows = ids[0, :-1].unfold(0, size, 1)
        starts = (windows == ids[0, -size:]).all(-1).nonzero()[:, 0].tolist()
        if starts and most > 0:
            full = [start for start in starts if start + size + most <= length]
            start = (full[-1] if full else starts[0]) + size
            return ids[:, start : start + most]
    return ids[:, :0]

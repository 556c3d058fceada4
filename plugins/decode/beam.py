"""decode=beam: follow several answers at once, and give the likeliest."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    DecodeContext,
    Decoder,
    Generation,
    Receipt,
    Step,
)
from engine.decoding.loop import StepDecoder, Tally, generate, rehearsal
from engine.decoding.sampling import Limits
from engine.errors import Problem, RuntimeFailure
from engine.rules import Rule

if TYPE_CHECKING:
    from engine.session import Session

UNREPEATABLE = Rule(
    code="beam-unrepeatable-cache",
    why="each beam needs rows of its own in it, and it says that its rows cannot be repeated",
    hint="cache=dynamic",
    source="Fp8QuantizedLayer.batch_repeat_interleave of transformers, which repeats nothing",
    seen="transformers 5.23.0, 2026-11-22",
)


@dataclass
class Beam(Limits):
    """Search for a likely answer with `num_beams` candidates that grow side by side.

    transformers' own beam search (Wu et al. 2016, arXiv 1609.08144, section 7, has the length
    penalty that its `length_penalty` simplifies: scores are divided by length to that power, so
    above 0 longer answers win more easily). Answers come whole, when the search is over; `stop`
    cuts the answer that was found. Each turn of a chat is computed anew.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    provides: ClassVar[tuple[str, ...]] = ("decode.beam",)
    excludes: ClassVar[Mapping[str, Rule]] = {"cache.unrepeatable": UNREPEATABLE}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range: one beam is no search."""
        yield from super().check(context)
        if not 2 <= self.num_beams <= 64:
            yield self.out_of_range("num_beams", "must be from 2 to 64", 4)
        if not -10 <= self.length_penalty <= 10:
            yield self.out_of_range("length_penalty", "must be from -10 to 10", 1.0)

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Give a decoder."""
        return BeamDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show how many rows a short search sent through the model at a time."""
        rows, tokens = session.built["decode"].prove(session)
        yield Receipt(
            slot="decode",
            claim="several answers grow side by side",
            evidence={"rows in each pass": rows, "tokens of a short search": tokens},
            ok=rows == self.num_beams and tokens > 0,
        )


class BeamDecoder(StepDecoder):
    """Run transformers' search to its end, then hand out what it found."""

    options: Beam
    _proof: tuple[int, int] | None = None

    def more_settings(self) -> dict[str, Any]:
        """Return the options of the search."""
        return {
            "num_beams": self.options.num_beams,
            "length_penalty": self.options.length_penalty,
            "disable_compile": True,
        }

    def __call__(self, generation: Generation) -> Generator[Step, None, None]:
        """Yield steps that were all made when the search was over."""
        made = None
        with closing(super().__call__(generation)) as steps:
            for step in steps:
                step.time = made = step.time if made is None else made
                yield step

    def rows(self, generation: Generation, tally: Tally) -> Generator[list[int], None, None]:
        """Yield the tokens of the best answers, as if they had come one after the other."""
        before = generation.forwarded()
        if generation.cache is not None and int(generation.cache.get_seq_length()):
            raise RuntimeFailure(
                "a search needs a cache of its own for each beam, and this one is in use",
                hint="decode=generate",
            )
        found = generate(
            self.context.model,
            generation,
            self.settings(generation),
            copy.deepcopy(generation.cache),  # the search leaves the rows of all beams in it
            stopping_criteria=[lambda ids, scores, **_: self.closed],
        )
        sent = generation.forwarded() - before
        tally.discarded = sent - sent // self.options.num_beams
        yield from found[:, generation.input_ids.shape[1] :].T.tolist()

    def prove(self, session: Session) -> tuple[int, int]:
        """Return the rows that a short search sends in each pass, and its tokens; only once."""
        if self._proof is None:
            self._proof = self._search(session)
        return self._proof

    def _search(self, session: Session) -> tuple[int, int]:
        sent: list[int] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            sent.append(len(args[0] if args else kwargs["input_ids"]))

        counter = session.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            tokens = list(self(rehearsal(session, new=4)))
        finally:
            counter.remove()
        return min(sent, default=0), len(tokens)

"""Turn prompts into answers: limits, streaming text, figures. What all text tasks share."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contexts import Figures, Generation, KeyValues, Output, Step
from engine.decoding.stop_strings import StoppingText
from engine.encoding import Encoded
from engine.errors import Problem, RuntimeFailure
from engine.positions.rotary import frequency_set

if TYPE_CHECKING:
    from transformers import Cache

    from engine.recipe import Recipe
    from engine.session import Session


STRETCHING = ("yarn", "linear", "learned")
"""Choices of `position_encoding` by whose option `factor` the context grows, to be tried."""


class Answer:
    """One sequence's answer while it grows: its tokens, its text, its figures."""

    def __init__(
        self, session: Session, prompt: Sequence[int], clock: Clock, notes: Sequence[str] = ()
    ) -> None:
        self._session = session
        self._notes = notes
        self._prompt_tokens = len(prompt)
        self._clock = clock
        stops = getattr(session.recipe.decode, "stop", ())
        self._text = StoppingText(session.tokenizer, prompt, stops)
        self._last: Step | None = None
        self.tokens: list[int] = []
        self.text = ""

    @property
    def ended(self) -> bool:
        """Tell whether its end token or a stop string came."""
        return self._text.stopped or not self._session.end_ids.isdisjoint(self.tokens[-1:])

    def push(self, token: int, step: Step) -> str:
        """Take the token that `step` holds for this sequence, and return what can be shown."""
        self._last = step
        self.tokens.append(token)
        return self._show(self._text.push(token))

    def finish(self) -> str:
        """Return what was held back."""
        return self._show(self._text.finish())

    def output(self, limit: int, room: int) -> Output:
        """Return the whole answer."""
        reason = "length" if limit <= room else "context"
        if self.ended or len(self.tokens) < min(limit, room):
            reason = "stop"
        return Output(
            text=self.text,
            token_ids=self.tokens,
            finish_reason=reason,
            figures=self._clock.figures(self._prompt_tokens, len(self.tokens), self._last),
            notes=self._notes,
        )

    def _show(self, piece: str) -> str:
        self.text += piece
        return piece


class TextStream:
    """One answer while it grows: iterate for pieces of text, then read `output`."""

    output: Output

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        cache: Cache | None,
        *,
        room: int,
        notes: Sequence[str] = (),
        finished: Callable[[list[int], str, int], None] | None = None,
    ) -> None:
        """Prepare to answer.

        Args:
            prompt: all tokens of the sequence, those that `cache` holds included.
            room: new tokens that still fit into context and cache.
            notes: what the user should know of the prompt.
            finished: called with new tokens, text, and how many tokens went through the model for
                them, less what was tried and discarded; also when the answer was broken off.
        """
        self._session = session
        self._prompt = prompt
        self._cache = cache
        self._room = room
        self._notes = notes
        self._finished = finished
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        session = self._session
        wanted = session.recipe.decode.max_new_tokens
        clock = Clock(session)
        answer = Answer(session, self._prompt, clock, self._notes)
        session.observe("started", prompt_tokens=len(self._prompt))
        try:
            with reporting(session):
                limit = min(wanted, self._room)
                with closing(steps(session, [self._prompt], self._cache, limit, clock)) as found:
                    for step in found:
                        piece = answer.push(step[0], step)
                        if piece:
                            yield piece
                        if answer.ended:
                            break
                rest = answer.finish()
                if rest:
                    yield rest
                self.output = answer.output(wanted, self._room)
                session.observe(
                    "finished",
                    finish_reason=self.output.finish_reason,
                    **vars(self.output.figures),
                )
        finally:
            if self._finished is not None:
                self._finished(answer.tokens, answer.text, clock.forwarded - clock.discarded)


def answer_batch(
    session: Session, texts: Sequence[Encoded], cache: Cache | None = None
) -> list[Output]:
    """Answer prompts of different lengths together, padded on the left.

    Args:
        cache: holds the first columns of all rows, padding included; a new one where it is None.
    """
    if not texts:
        return []
    prompts = [text.ids for text in texts]
    for prompt in prompts:
        check_prompt(session, prompt)
    wanted = session.recipe.decode.max_new_tokens
    longest = max(prompts, key=len)
    if len({frequency_set(session.config, len(prompt) + wanted) for prompt in prompts}) > 1:
        # The longest text would set the rotary frequencies of all.
        return [answer_batch(session, [text])[0] for text in texts]
    if len(set(map(len, prompts))) > 1 and not session.carrying.padded:
        return [answer_batch(session, [text])[0] for text in texts]
    if cache is None:
        values, room = begin(session, longest, batch=len(prompts))
        cache = values.cache
    else:
        room = room_for(session, cache, len(longest))
    clock = Clock(session)
    answers = [Answer(session, text.ids, clock, text.notes) for text in texts]
    session.observe("started", prompt_tokens=sum(map(len, prompts)))
    with reporting(session):
        with closing(steps(session, prompts, cache, min(wanted, room), clock)) as found:
            growing = list(enumerate(answers))
            for step in found:
                for row, answer in growing:
                    answer.push(step[row], step)
                growing = [(row, answer) for row, answer in growing if not answer.ended]
                if not growing:
                    break
        for answer in answers:
            answer.finish()
        outputs = [answer.output(wanted, room) for answer in answers]
        session.observe("finished", sequences=len(outputs))
    return outputs


@contextmanager
def reporting(session: Session) -> Iterator[None]:
    """Tell the observers of what fails inside."""
    try:
        yield
    except Exception as error:
        session.observe("failed", error=f"{type(error).__name__}: {error}")
        raise


def begin(session: Session, prompt: list[int], *, batch: int = 1) -> tuple[KeyValues, int]:
    """Check a prompt, and return a cache for it and how many new tokens fit.

    Raises:
        RuntimeFailure: for a prompt that is empty, too long, or has unknown tokens.
    """
    check_prompt(session, prompt)
    wanted = len(prompt) + session.recipe.decode.max_new_tokens
    limit = session.context_tokens
    values = session.new_cache(batch, wanted if limit is None else min(wanted, limit))
    return values, room_for(session, values.cache, len(prompt))


def check_prompt(session: Session, prompt: Sequence[int]) -> None:
    """Refuse a prompt that the model cannot take.

    Raises:
        RuntimeFailure: with the numbers.
    """
    if not prompt:
        raise RuntimeFailure("the prompt is empty", hint='-p "some text"')
    if max(prompt) >= session.embedding_rows:
        raise RuntimeFailure(
            f"token {max(prompt)} is beyond the model's {session.embedding_rows} embeddings",
            hint="the tokenizer belongs to another model",
        )
    limit = session.context_tokens
    if limit is not None and len(prompt) >= limit:
        raise RuntimeFailure(
            Problem(
                message=f"the prompt has {len(prompt)} tokens; the model has positions for "
                f"{limit}, prompt and answer together",
                hint="shorten the prompt" + _or_farther(session, len(prompt)),
                code="context-length-exceeded",
            )
        )  # fmt: skip


def _or_farther(session: Session, tokens: int) -> str:
    """Return what to type for room for a prompt and its answer; '' where nothing gives that."""
    from engine.hints import first_that_works
    from engine.verdict import judge

    slot, plugin = "position_encoding", session.recipe.position_encoding
    needed = tokens + session.recipe.decode.max_new_tokens
    times = ceil(needed / (session.context_tokens or needed))
    now = {name: getattr(plugin, name, None) for name in ("factor", "group_size")}
    candidates = [
        *([f"{slot}.{k}={ceil(v * times)}"] for k, v in now.items() if isinstance(v, int | float)),
        *([f"{slot}={name}", f"{slot}.factor={times}"] for name in STRETCHING),
    ]

    def reaches(changed: Recipe) -> bool:
        found = judge(changed)
        limit = None if found.shape is None else found.shape.max_positions
        return found.ok and (limit is None or limit >= needed)

    found = first_that_works(session.recipe, candidates, reaches)
    return found and f", or stretch the positions: {found}"


def room_for(session: Session, cache: Cache | None, length: int) -> int:
    """Return how many new tokens fit behind `length`, by the model's context and the cache.

    Raises:
        RuntimeFailure: when the cache cannot hold even the prompt.
    """
    held = capacity(cache, session.shape.sliding_window)
    limits = [limit for limit in (session.context_tokens, held) if limit is not None]
    if not limits:
        return sys.maxsize
    # The last token is never written to the cache, so `limit` cached tokens end in one more.
    room = min(limits) - length
    if room < 1:
        raise RuntimeFailure(
            Problem(
                message=f"the prompt has {length} tokens, and the cache holds {min(limits)}",
                hint=f"cache.max_tokens={length + session.recipe.decode.max_new_tokens}, "
                "or cache=dynamic",
                code="cache-full",
                slot="cache",
            )
        )
    return room


def capacity(cache: Cache | None, window: int | None) -> int | None:
    """Return how many tokens a cache can hold, or None if it grows or slides.

    A layer slides only if it is as wide as the model's `window`: one that was allocated narrower
    drops tokens that the model still attends to.
    """
    if cache is None:
        return None
    fixed = [
        length
        for layer in cache.layers
        if (length := _length(layer)) > 0
        and not (getattr(layer, "is_sliding", False) and length >= (window or 0))
    ]
    return min(fixed, default=None)


def _length(layer: Any) -> int:
    """Return how many tokens a layer can hold, below 1 if it grows.

    Those of transformers that keep keys beside a state say that they grow where they do not.
    """
    return max(int(layer.get_max_length()), int(getattr(layer, "max_cache_len", -1)))


def steps(
    session: Session, prompts: list[list[int]], cache: Cache | None, limit: int, clock: Clock
) -> Generator[Step, None, None]:
    """Yield the tokens of each step, from the recipe's decoder."""
    one = session.hooks.slot("decode")
    with session.hooks.blaming(one, "decode"):
        found = session.built["decode"](_generation(session, prompts, cache, limit))
        try:
            for step in clock.stamped(found):
                if not isinstance(step, Step) or len(step) != len(prompts):
                    session.hooks.blame(
                        one, "decode", f"its decoder yielded {step!r:.80} where a list of "
                        f"{len(prompts)} token ids was due"
                    )  # fmt: skip
                yield step
        finally:
            # At once, and not when the last traceback that knows it is forgotten.
            getattr(found, "close", lambda: None)()


def _generation(
    session: Session, prompts: list[list[int]], cache: Cache | None, limit: int
) -> Generation:
    import torch

    longest = max(map(len, prompts))
    padding = session.tokenizer.pad_token_id
    padding = next(iter(session.end_ids), 0) if padding is None else padding
    ids = torch.full((len(prompts), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return Generation(
        input_ids=ids.to(session.device),
        attention_mask=mask.to(session.device),
        cache=cache,
        max_new_tokens=limit,
        forwarded=lambda: session.forwarded_tokens,
    )


class Clock:
    """Measure one run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._first: float | None = None
        self.forwarded = 0
        self.discarded = 0
        reset_peak_memory(session)
        self._start = time.perf_counter()

    def stamped(self, found: Iterable[Any]) -> Iterator[Any]:
        """Yield what a decoder yields, plain lists as a `Step` of now."""
        before, forwarded = self._session.forwarded_tokens, 0
        for step in found:
            # Only while the decoder is asked: what goes through in between is another run's.
            forwarded += self._session.forwarded_tokens - before
            if isinstance(step, list) and not isinstance(step, Step):
                step = Step(step, time=time.perf_counter(), forwarded=forwarded)
            if isinstance(step, Step):
                self.forwarded, self.discarded = step.forwarded, step.discarded
                self._first = step.time if self._first is None else self._first
            yield step
            before = self._session.forwarded_tokens

    def figures(self, prompt_tokens: int, new_tokens: int, last: Step | None) -> Figures:
        """Return what was measured until `last`."""
        ended = time.perf_counter() if last is None else last.time
        first = ended if self._first is None else self._first
        decoding = ended - first
        return Figures(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            forwarded_tokens=self.forwarded,
            seconds=ended - self._start,
            time_to_first_token=first - self._start,
            tokens_per_second=(new_tokens - 1) / decoding if new_tokens > 1 and decoding else None,
            peak_memory_bytes=peak_memory_bytes(self._session),
            drafted_tokens=None if last is None else last.drafted,
            accepted_tokens=None if last is None else last.accepted,
        )


def reset_peak_memory(session: Session) -> None:
    """Let the peak be counted anew from here, where the system can."""
    if session.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(session.device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(session: Session) -> int:
    """Return the peak since the last reset: of the device's allocator, or of the whole process."""
    if session.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(session.device))
    with suppress(OSError, LookupError, ValueError):
        found = re.search(
            r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

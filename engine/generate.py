"""Turn prompts into answers: limits, streaming text, figures. What all text tasks share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from engine.contexts import Figures, Generation, KeyValues, Output
from engine.errors import Problem, RuntimeFailure

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedTokenizerBase

    from engine.session import Session

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
        finished: Callable[[list[int], str], None] | None = None,
    ) -> None:
        """Prepare to answer.

        Args:
            prompt: all tokens of the sequence, those that `cache` holds included.
            room: new tokens that still fit into context and cache.
            finished: called with new tokens and text, also when the answer was broken off.
        """
        self._session = session
        self._prompt = prompt
        self._cache = cache
        self._room = room
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
        detokenizer = Detokenizer(session.tokenizer, self._prompt)
        stops = StopStrings(getattr(session.recipe.decode, "stop", ()))
        tokens: list[int] = []
        text: list[str] = []
        clock = Clock(session)
        session.observe("started", prompt_tokens=len(self._prompt))
        try:
            for (token,) in steps(session, [self._prompt], self._cache, min(wanted, self._room)):
                clock.tick()
                tokens.append(token)
                piece = stops.push(detokenizer.push(token))
                if piece:
                    text.append(piece)
                    yield piece
                if stops.found:
                    break
            rest = "" if stops.found else stops.push(detokenizer.finish()) + stops.finish()
            if rest:
                text.append(rest)
                yield rest
            reason = finish_reason(session, tokens, wanted, self._room, stopped=stops.found)
            self.output = Output(
                text="".join(text),
                token_ids=tokens,
                finish_reason=reason,
                figures=clock.figures(len(self._prompt), len(tokens)),
            )
            session.observe("finished", finish_reason=reason, **vars(self.output.figures))
        except Exception as error:
            session.observe("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            if self._finished is not None:
                self._finished(tokens, "".join(text))


def answer_batch(session: Session, prompts: list[list[int]]) -> list[Output]:
    """Answer prompts of different lengths together, padded on the left."""
    if not prompts:
        return []
    for prompt in prompts:
        check_prompt(session, prompt)
    wanted = session.recipe.decode.max_new_tokens
    values, room = begin(session, max(prompts, key=len), batch=len(prompts))
    clock = Clock(session)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    session.observe("started", prompt_tokens=sum(map(len, prompts)))
    for step in steps(session, prompts, values.cache, min(wanted, room)):
        clock.tick()
        for index in sorted(open_rows):
            rows[index].append(step[index])
            if step[index] in session.end_ids:
                open_rows.discard(index)
    outputs = []
    for prompt, tokens in zip(prompts, rows, strict=True):
        detokenizer = Detokenizer(session.tokenizer, prompt)
        stops = StopStrings(getattr(session.recipe.decode, "stop", ()))
        text = ""
        for count, token in enumerate(tokens, 1):
            text += stops.push(detokenizer.push(token))
            if stops.found:
                tokens = tokens[:count]
                break
        else:
            text += stops.push(detokenizer.finish()) + stops.finish()
        outputs.append(
            Output(
                text=text,
                token_ids=tokens,
                finish_reason=finish_reason(session, tokens, wanted, room, stopped=stops.found),
                figures=clock.figures(len(prompt), len(tokens)),
            )
        )
    session.observe("finished", sequences=len(outputs))
    return outputs


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
                hint="shorten the prompt"
                + ("" if session.recipe.choices.get("position_encoding") != "native" else
                   ", or stretch the positions: position_encoding=yarn"),
                code="context-length-exceeded",
            )
        )  # fmt: skip


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
        int(layer.get_max_length())
        for layer in cache.layers
        if layer.get_max_length() > 0
        and not (getattr(layer, "is_sliding", False) and layer.get_max_length() >= (window or 0))
    ]
    return min(fixed, default=None)


def steps(
    session: Session, prompts: list[list[int]], cache: Cache | None, limit: int
) -> Iterator[list[int]]:
    """Yield the tokens of each step, from the recipe's decoder."""
    import torch

    longest = max(map(len, prompts))
    padding = session.tokenizer.pad_token_id
    padding = next(iter(session.end_ids), 0) if padding is None else padding
    ids = torch.full((len(prompts), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    generation = Generation(
        input_ids=ids.to(session.device),
        attention_mask=mask.to(session.device),
        cache=cache,
        max_new_tokens=limit,
    )
    one = session.hooks.slot("decode")
    with session.hooks.blaming(one, "decode"):
        for step in session.built["decode"](generation):
            if not isinstance(step, list) or len(step) != len(prompts):
                session.hooks.blame(
                    one, "decode", f"its decoder yielded {step!r:.80} where a list of "
                    f"{len(prompts)} token ids was due"
                )  # fmt: skip
            yield step


def finish_reason(
    session: Session, tokens: list[int], wanted: int, room: int, *, stopped: bool
) -> str:
    """Say why an answer ended."""
    if stopped or (tokens and tokens[-1] in session.end_ids):
        return "stop"
    if len(tokens) < min(wanted, room):
        return "stop"
    return "length" if wanted <= room else "context"


class Clock:
    """Measure one run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._forwarded = session.forwarded_tokens
        self._first: float | None = None
        self._last = 0.0
        if session.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(session.device)
        self._start = time.perf_counter()

    def tick(self) -> None:
        """Note that a token came."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    def figures(self, prompt_tokens: int, new_tokens: int) -> Figures:
        """Return what was measured."""
        first = self._first if self._first is not None else time.perf_counter()
        decoding = self._last - first
        return Figures(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            forwarded_tokens=self._session.forwarded_tokens - self._forwarded,
            seconds=time.perf_counter() - self._start,
            time_to_first_token=first - self._start,
            tokens_per_second=(new_tokens - 1) / decoding if new_tokens > 1 and decoding else None,
            peak_memory_bytes=peak_memory_bytes(self._session),
        )


def peak_memory_bytes(session: Session) -> int:
    """Return the peak of the device's allocator, or of the process where there is no device."""
    if session.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(session.device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

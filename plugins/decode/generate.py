"""decode=generate: transformers' own loop, one token after the other."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from engine import hookimpl
from engine.contexts import CheckContext, DecodeContext, Decoder, Generation, Receipt, Step
from engine.detokenize import StopFinder
from engine.errors import Problem, RuntimeFailure
from engine.sampling import Sampler

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from engine.session import Session

MAX_SEED = 2**63 - 1


@dataclass
class Generate:
    """Sample with `model.generate`, or take the likeliest token each time (`temperature=0`).

    These options are all there is: a checkpoint's own defaults (temperature, top_k, repetition
    penalty, suppressed tokens, …) do not leak in, only its end, padding and begin tokens count.
    `top_k` and `top_p` (Holtzman et al. 2019, arXiv 1904.09751) limit what is sampled from,
    `repetition_penalty` (Keskar et al. 2019, arXiv 1909.05858) discourages what was said, `stop`
    ends an answer at any of these strings. The model is never compiled here.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range, and sampling options without sampling."""
        for name, ok, why, hint in (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be 1 or more", "128"),
            (
                "temperature",
                self.temperature == 0 or 0.001 <= self.temperature <= 100,
                "must be 0 (greedy), or from 0.001 to 100",
                "0.7",
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be 1 or more", "50"),
            ("top_p", 0 < (self.top_p or 1) <= 1 and self.top_p != 0, "must be in (0, 1]", "0.9"),
            (
                "repetition_penalty",
                0.01 <= self.repetition_penalty <= 100,
                "must be from 0.01 to 100 (1 is none)",
                "1.0",
            ),
            ("stop", all(self.stop), "holds an empty string, which stops everything", "[]"),
        ):
            if not ok:
                yield _problem("value", f"decode.{name}={getattr(self, name)} {why}", name, hint)
        if not 0 <= context.recipe.seed <= MAX_SEED:
            message = f"seed={context.recipe.seed} must be from 0 to 2**63-1, which is {MAX_SEED}"
            yield Problem(slot="decode", code="value", message=message, hint="seed=0")
        if any(re.fullmatch(r"(\\[nrt])+", stop) for stop in self.stop):
            yield Problem(
                slot="decode",
                code="value",
                message="decode.stop holds a backslash and a letter where a line break is meant",
                hint="""let the shell make it: $'decode.stop=["\\n"]'; in YAML: stop: ["\\n"]""",
            )
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                message = f"decode.{name} does nothing at temperature 0, which takes the likeliest"
                yield _problem("does-nothing", message, "temperature", "0.7")

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Give a decoder with a worker thread of its own."""
        # What generate() would warn of, limits above all, the engine has checked before.
        logging.getLogger("transformers.generation").setLevel(logging.ERROR)
        return GenerateDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show the settings that generate() will really get."""
        decoder = session.built["decode"]
        settings = decoder.settings(self.max_new_tokens, cached=True)
        sampler = decoder.sampler(session.device)
        own = session.model.generation_config.temperature
        unused = {} if own is None else {"checkpoint's temperature, unused": float(own)}
        yield Receipt(
            slot="decode",
            claim="sampling follows the recipe alone",
            evidence={
                "sampling": sampler is not None,
                "temperature": 0.0 if sampler is None else float(sampler.temperature),
                "ids of end tokens": str(settings.eos_token_id),
                **unused,
            },
            ok=(0.0 if sampler is None else sampler.temperature) == self.temperature
            and not settings.do_sample
            and set(settings.eos_token_id or ()) == session.end_ids,
        )


class GenerateDecoder:
    """Run generate() in one thread that lives as long as the decoder, and hand its tokens over.

    A thread per call would cost a new team of OpenMP threads each time.
    """

    def __init__(self, options: Generate, context: DecodeContext) -> None:
        self._options = options
        self._context = context
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._runs: set[_Run] = set()

    def __call__(self, generation: Generation) -> Iterator[list[int]]:
        """Yield a `Step` of `batch` token ids at a time; closing the iterator stops generate().

        Raises:
            RuntimeFailure: when the decoder is closed before the last one.
        """
        run = _Run(generation, self._finders(generation))
        self._runs.add(run)
        try:
            done = self._worker.submit(self._generate, generation, run)
        except RuntimeError as error:  # the executor's word for: shut down
            raise _closed() from error
        # Also when generate() raises, and whatever it raises: the reader must not wait forever.
        done.add_done_callback(lambda _: run.steps.put(None))
        try:
            while (step := run.steps.get()) is not None:
                yield step
            if done.cancelled() or run.broken_off:
                raise _closed()
            done.result()
        finally:
            run.stopped = True
            self._runs.discard(run)
            # In the worker itself when garbage is collected there: it cannot wait for itself.
            if not done.cancel() and run.thread != threading.get_ident():
                done.exception()

    def close(self) -> None:
        """Stop what runs, and let the worker thread end."""
        for run in tuple(self._runs):
            run.stopped = True
        self._worker.shutdown(cancel_futures=True)

    def settings(self, max_new_tokens: int, *, cached: bool) -> GenerationConfig:
        """Return the generation config, made of the options alone.

        It never samples: that is done by `sampler`, before generate() takes the likeliest.
        """
        from transformers import GenerationConfig

        own = self._context.model.generation_config
        made: GenerationConfig = cast(Any, GenerationConfig)(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=self._options.repetition_penalty,
            use_cache=cached,
            disable_compile=True,
            eos_token_id=sorted(self._context.end_ids) or None,
            pad_token_id=own.pad_token_id,
            bos_token_id=own.bos_token_id,
        )
        return made

    def sampler(self, device: torch.device) -> Sampler | None:
        """Return what picks the tokens of one generation; None leaves the likeliest."""
        if self._options.temperature == 0:
            return None
        options = self._options
        return Sampler(
            options.temperature, options.top_k, options.top_p, self._context.seed, device
        )

    def _finders(self, generation: Generation) -> list[StopFinder]:
        if not self._options.stop:
            return []
        rows = zip(generation.input_ids, generation.attention_mask, strict=True)
        return [
            StopFinder(self._context.tokenizer, ids[mask.bool()].tolist(), self._options.stop)
            for ids, mask in rows
        ]

    def _generate(self, generation: Generation, run: _Run) -> None:
        model: Any = self._context.model
        cached = generation.cache is not None
        settings = self.settings(generation.max_new_tokens, cached=cached)
        sampler = self.sampler(generation.input_ids.device)
        own = model.generation_config
        # generate() fills what is unset here from the model's own defaults.
        model.generation_config = settings
        run.begin()
        try:
            model.generate(
                generation.input_ids,
                attention_mask=generation.attention_mask,
                generation_config=settings,
                streamer=run,
                stopping_criteria=[run.is_stopped],
                logits_processor=[] if sampler is None else [sampler],
                **({"past_key_values": generation.cache} if cached else {}),
            )
        finally:
            model.generation_config = own


class _Run:
    """Stand between generate() and the reader: a streamer, and a criterion to stop."""

    def __init__(self, generation: Generation, finders: list[StopFinder]) -> None:
        self.steps: SimpleQueue[Step | None] = SimpleQueue()
        self.stopped = False
        self.broken_off = False
        self.thread: int | None = None
        self._forwarded = generation.forwarded
        self._before = 0
        self._finders = finders
        self._prompt_seen = False

    def begin(self) -> None:
        """Count from here: what waited in line before is not this generation's."""
        self.thread = threading.get_ident()
        self._before = self._forwarded()

    def put(self, ids: torch.Tensor) -> None:
        """Take the tokens of a step; the prompt comes first."""
        if self._prompt_seen:
            forwarded = self._forwarded() - self._before
            self.steps.put(Step(ids.tolist(), time=time.perf_counter(), forwarded=forwarded))
        self._prompt_seen = True

    def end(self) -> None:
        """Ignore the end, which generate() does not announce when it fails."""

    def is_stopped(self, ids: torch.Tensor, scores: Any, **_: Any) -> bool | torch.Tensor:
        """Say whether the reader has gone, or which rows have come to a stop string."""
        self.broken_off = self.stopped
        if self.stopped or not self._finders:
            return self.stopped
        new = zip(self._finders, ids[:, -1].tolist(), strict=True)
        return ids.new_tensor([finder.push(token) for finder, token in new]).bool()


def _closed() -> RuntimeFailure:
    return RuntimeFailure(
        "the session was closed before the answer was finished",
        hint="read answers to their end before session.close(), inside of `with engine.build(…)`",
    )


def _problem(code: str, message: str, name: str, value: str) -> Problem:
    return Problem(slot="decode", code=code, message=message, hint=f"decode.{name}={value}")

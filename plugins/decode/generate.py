"""decode=generate: transformers' own loop, one token after the other."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from engine import hookimpl
from engine.contexts import CheckContext, DecodeContext, Decoder, Generation, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from engine.session import Session


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
            ("temperature", self.temperature >= 0, "must be 0 (greedy) or more", "0.7"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be 1 or more", "50"),
            ("top_p", 0 < (self.top_p or 1) <= 1 and self.top_p != 0, "must be in (0, 1]", "0.9"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be more than 0", "1.0"),
            ("stop", all(self.stop), "holds an empty string, which stops everything", "[]"),
        ):
            if not ok:
                yield _problem("value", f"decode.{name}={getattr(self, name)} {why}", name, hint)
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
        own = session.model.generation_config.temperature
        unused = {} if own is None else {"checkpoint's temperature, unused": float(own)}
        yield Receipt(
            slot="decode",
            claim="sampling follows the recipe alone",
            evidence={
                "sampling": bool(settings.do_sample),
                "temperature": float(settings.temperature or 0),
                "ids of end tokens": str(settings.eos_token_id),
                **unused,
            },
            ok=settings.do_sample == (self.temperature > 0)
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

    def __call__(self, generation: Generation) -> Iterator[list[int]]:
        """Yield `batch` token ids per step; closing the iterator stops generate()."""
        run = _Run()
        done = self._worker.submit(self._generate, generation, run)
        # Also when generate() raises, and whatever it raises: the reader must not wait forever.
        done.add_done_callback(lambda _: run.tokens.put(None))
        try:
            while (step := run.tokens.get()) is not None:
                yield step
            done.result()
        finally:
            run.stopped = True
            done.exception()

    def close(self) -> None:
        """Let the worker thread end."""
        self._worker.shutdown()

    def settings(self, max_new_tokens: int, *, cached: bool) -> GenerationConfig:
        """Return the generation config, made of the options alone."""
        from transformers import GenerationConfig

        options, own = self._options, self._context.model.generation_config
        values: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": options.temperature > 0,
            "repetition_penalty": options.repetition_penalty,
            "use_cache": cached,
            "disable_compile": True,
            "eos_token_id": sorted(self._context.end_ids) or None,
            "pad_token_id": own.pad_token_id,
            "bos_token_id": own.bos_token_id,
        }
        if options.temperature > 0:
            # 0 and 1 say 'no limit'; None would mean transformers' default of 50.
            limits = {"top_k": options.top_k or 0, "top_p": options.top_p or 1.0}
            values |= {"temperature": options.temperature, **limits}
        if options.stop:
            values["stop_strings"] = options.stop
        made: GenerationConfig = cast(Any, GenerationConfig)(**values)
        return made

    def _generate(self, generation: Generation, run: _Run) -> None:
        import torch

        model: Any = self._context.model
        cached = generation.cache is not None
        settings = self.settings(generation.max_new_tokens, cached=cached)
        own = model.generation_config
        # generate() fills what is unset here from the model's own defaults.
        model.generation_config = settings
        torch.manual_seed(self._context.seed)
        try:
            model.generate(
                generation.input_ids,
                attention_mask=generation.attention_mask,
                generation_config=settings,
                streamer=run,
                stopping_criteria=[run.is_stopped],
                **({"past_key_values": generation.cache} if cached else {}),
                **({"tokenizer": self._context.tokenizer} if self._options.stop else {}),
            )
        finally:
            model.generation_config = own


class _Run:
    """Stand between generate() and the reader: a streamer, and a criterion to stop."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[list[int] | None] = SimpleQueue()
        self.stopped = False
        self._prompt_seen = False

    def put(self, ids: torch.Tensor) -> None:
        """Take the tokens of a step; the prompt comes first."""
        if self._prompt_seen:
            self.tokens.put(ids.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Ignore the end, which generate() does not announce when it fails."""

    def is_stopped(self, ids: torch.Tensor, scores: Any, **_: Any) -> bool:
        """Say whether the reader has gone."""
        return self.stopped


def _problem(code: str, message: str, name: str, value: str) -> Problem:
    return Problem(slot="decode", code=code, message=message, hint=f"decode.{name}={value}")

"""The loop that decoders share: prepare as transformers does, then go step by step.

`generate()` prepares a generation: positions, masks, what its cache still lacks. Its own loop would
run to the end before it returns, so it is asked for what it prepared, and the loop is here: in the
thread of whoever reads, which closes it by not reading on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from engine.contexts import DecodeContext, Generation, Step
from engine.decoding.stop_strings import StoppingText
from engine.errors import RuntimeFailure

if TYPE_CHECKING:
    import torch
    from transformers import Cache, GenerationConfig

    from engine.decoding.sampling import Limits, Sampler, Sampling
    from engine.session import Session


@dataclass
class Tally:
    """What a generation has cost so far."""

    forwarded: int = 0
    drafted: int | None = None
    """Tokens that were guessed; None where none are."""
    accepted: int | None = None
    discarded: int = 0
    """Tokens among those forwarded that are in no answer: rejected drafts, other beams."""


class Run:
    """One generation: what transformers prepared for the model, and how far it is."""

    def __init__(
        self, model: Any, ids: torch.Tensor, processors: Any, kwargs: dict[str, Any]
    ) -> None:
        self.model = model
        self.ids = ids
        """`[batch, tokens]`: all so far, those that the cache lacks included."""
        self.processors = processors
        self.call: Callable[..., Any] = model
        """What answers steps of one token; the prompt always goes to the model itself."""
        self._kwargs = kwargs
        self._first = True
        held = 0 if self.cache is None else int(self.cache.get_seq_length())
        self._lacking = None if self.cache is None else ids.shape[1] - held

    @property
    def cache(self) -> Cache | None:
        """Return the cache that was given."""
        found: Cache | None = self._kwargs.get("past_key_values")
        return found

    def forward(self, drafts: torch.Tensor | None = None) -> torch.Tensor:
        """Send what the cache lacks through the model, and `drafts`, `[batch, drafts]`, behind it.

        Returns:
            logits in float32, `[batch, 1 + drafts, vocabulary]`: of what follows the last token,
            and of what follows each draft.
        """
        import torch

        ids, kwargs, more = self.ids, self._kwargs, 0
        if drafts is not None and drafts.shape[1]:
            more = drafts.shape[1]
            ids = torch.cat([ids, drafts], dim=-1)
            kwargs = self._longer({}, dict(kwargs), more)
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if self._lacking is None else self._lacking + more,
            is_first_iteration=self._first,
            **kwargs,
        )
        if self.cache is not None and inputs.get("past_key_values") is not self.cache:
            # Phi-3 lets go of its cache when its frequencies change: the keys in it, that is.
            empty(self.cache)
            inputs["past_key_values"] = self.cache
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 1 + more
        if self._first:
            found = self.model(**inputs, return_dict=True)
        else:
            with self.model._optimize_model_for_decode():
                found = self.call(**inputs, return_dict=True)
        self._first = False
        # Positions and mask grow by the token that was picked; drafts are added when they hold.
        self._kwargs = self._longer(found, self._kwargs, 1)
        logits: torch.Tensor = found.logits[:, -1 - more :].float()
        return logits

    def append(self, tokens: torch.Tensor) -> None:
        """Add picked tokens, `[batch, new]`, of which the cache lacks the last."""
        import torch

        self.ids = torch.cat([self.ids, tokens], dim=-1)
        if self._lacking is not None:
            self._lacking = 1
        if tokens.shape[1] > 1:
            self._kwargs = self._longer({}, self._kwargs, tokens.shape[1] - 1)

    def _longer(self, outputs: Any, kwargs: dict[str, Any], new: int) -> dict[str, Any]:
        longer: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=False, num_new_tokens=new
        )
        return longer


def empty(cache: Any) -> None:
    """Take all tokens out of a cache."""
    held = int(cache.get_seq_length())
    if held and cache.is_croppable:
        cache.crop(-held)
    elif held:
        cache.reset()
    if int(cache.get_seq_length()):
        raise RuntimeFailure(
            f"the model needs new keys for all of the text, and a {type(cache).__name__} cannot be "
            "emptied",
            hint="cache=dynamic",
        )


def prepare(model: Any, generation: Generation, settings: GenerationConfig) -> Run:
    """Let transformers prepare a generation by `settings` alone, none of the checkpoint's own."""

    def take(model: Any, input_ids: Any, logits_processor: Any, **prepared: Any) -> Run:
        for name in ("stopping_criteria", "generation_config", "synced_gpus", "streamer"):
            prepared.pop(name, None)
        return Run(model, input_ids, logits_processor, prepared)

    run: Run = generate(model, generation, settings, generation.cache, custom_generate=take)
    if run.cache is not generation.cache:  # else every token would be computed anew, and no word
        raise RuntimeFailure(
            "transformers does not hand the cache on that it was given",
            hint='pip install "transformers>=5.23,<5.24"',
        )
    return run


def generate(
    model: Any, generation: Generation, settings: Any, cache: Cache | None, **options: Any
) -> Any:
    """Call generate() with `settings` alone: it fills what is unset from the model's own."""
    if cache is not None:
        options["past_key_values"] = cache
    own = model.generation_config
    model.generation_config = settings
    try:
        return model.generate(
            generation.input_ids,
            attention_mask=generation.attention_mask,
            generation_config=settings,
            **options,
        )
    finally:
        model.generation_config = own


def rehearsal(session: Session, *, new: int, repeats: int = 1) -> Generation:
    """Return four tokens, repeated so often, to try a decoder on, and a cache for the answer."""
    import torch

    ids = (torch.arange(3, 7, device=session.device) % session.embedding_rows).repeat(repeats)[None]
    if session.context_tokens is not None:
        new = min(new, session.context_tokens - ids.shape[1])
    return Generation(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        cache=session.new_cache(1, ids.shape[1] + new).cache,
        max_new_tokens=new,
        forwarded=lambda: session.forwarded_tokens,
    )


class StepDecoder:
    """Drive a loop for its reader: one step at a time, stopped, timed and counted as it is read.

    Decoders inherit and give `rows`, a generator that yields the `batch` tokens of each step; it
    only runs between two reads, without gradients, and never two of a session at once.
    """

    def __init__(self, options: Limits, context: DecodeContext) -> None:
        self.options = options
        self.context = context
        self._lock = threading.RLock()
        self.closed = False
        # What generate() would warn of, limits above all, the engine has checked before.
        logging.getLogger("transformers.generation").setLevel(logging.ERROR)

    def rows(self, generation: Generation, tally: Tally) -> Generator[list[int], None, None]:
        """Yield the tokens of each step."""
        raise NotImplementedError

    def __call__(self, generation: Generation) -> Generator[Step, None, None]:
        """Yield a `Step` of `batch` token ids at a time; closing the iterator stops.

        Raises:
            RuntimeFailure: when the decoder is closed before the last one.
        """
        import torch

        tally = Tally()
        rows = self.rows(generation, tally)
        away, left = 0.0, time.perf_counter()
        try:
            while True:
                # Not held while the reader has its turn: the lock, and the state of gradients.
                with self._lock, torch.no_grad():
                    if self.closed:
                        raise _closed()
                    away += time.perf_counter() - left
                    before = generation.forwarded()
                    ids = next(rows, None)
                    tally.forwarded += generation.forwarded() - before
                    if self.closed:  # while this step was on its way
                        raise _closed()
                if ids is None:
                    return
                left = time.perf_counter()
                yield Step(ids, time=left - away, **vars(tally))
        finally:
            with torch.no_grad():
                rows.close()

    def close(self) -> None:
        """Let what runs come to the end of its step, and no further."""
        self.closed = True
        with self._lock:
            pass

    def settings(self, generation: Generation) -> GenerationConfig:
        """Return the generation config, made of the options alone."""
        from transformers import GenerationConfig

        own = self.context.model.generation_config
        made: GenerationConfig = cast(Any, GenerationConfig)(
            max_new_tokens=generation.max_new_tokens,
            do_sample=False,
            use_cache=generation.cache is not None,
            eos_token_id=sorted(self.context.end_ids) or None,
            pad_token_id=own.pad_token_id,
            bos_token_id=own.bos_token_id,
            **self.more_settings(),
        )
        return made

    def more_settings(self) -> dict[str, Any]:
        """Return what the decoder sets beyond that."""
        return {}

    def finders(self, generation: Generation) -> list[StoppingText]:
        """Return what looks for stop strings, per row; none where there is nothing to find."""
        if not self.options.stop:
            return []
        rows = zip(generation.input_ids, generation.attention_mask, strict=True)
        return [
            StoppingText(self.context.tokenizer, ids[mask.bool()].tolist(), self.options.stop)
            for ids, mask in rows
        ]


class TokenDecoder(StepDecoder):
    """Pick one token after the other for all rows together; ended rows go along, padded."""

    options: Sampling

    def more_settings(self) -> dict[str, Any]:
        """Return the one option that transformers applies to the scores before they are read."""
        return {"repetition_penalty": self.options.repetition_penalty}

    def sampler(self, device: torch.device) -> Sampler | None:
        """Return what draws the tokens of one generation; None takes the likeliest."""
        return self.options.sampler(self.context.seed, device)

    def start(self, generation: Generation) -> Run:
        """Prepare one generation."""
        return prepare(self.context.model, generation, self.settings(generation))

    def rows(self, generation: Generation, tally: Tally) -> Generator[list[int], None, None]:
        """Yield the tokens of each step, until all rows have ended."""
        run = self.start(generation)
        pick = picker(run, self.sampler(run.ids.device))
        finders = self.finders(generation)
        ended = [False] * len(run.ids)
        padding = self.padding
        for _ in range(generation.max_new_tokens):
            picked = pick(run.ids, run.forward()[:, -1])
            tokens: list[int] = picked.tolist()
            if any(ended):
                tokens = [padding if over else t for t, over in zip(tokens, ended, strict=True)]
                picked = picked.new_tensor(tokens)
            ended = [
                over or t in self.context.end_ids for t, over in zip(tokens, ended, strict=True)
            ]
            if finders:
                found = [find.stops_at(t) for find, t in zip(finders, tokens, strict=True)]
                ended = [over or stop for over, stop in zip(ended, found, strict=True)]
            yield tokens
            if all(ended):
                return
            run.append(picked[:, None])

    @property
    def padding(self) -> int:
        """Return what ended rows are filled with."""
        own = self.context.model.generation_config.pad_token_id
        return min(self.context.end_ids, default=0) if own is None else int(own)


def picker(
    run: Run, sampler: Sampler | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what picks a token per row: ids, logits `[batch, vocabulary]` → `[batch]`."""

    def pick(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = run.processors(ids, logits)
        picked: torch.Tensor = scores.argmax(-1) if sampler is None else sampler(ids, scores)
        return picked

    return pick


def _closed() -> RuntimeFailure:
    return RuntimeFailure(
        "the session was closed before the answer was finished",
        hint="read answers to their end before session.close(), inside of `with engine.build(…)`",
    )

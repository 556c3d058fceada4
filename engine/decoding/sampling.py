"""Pick tokens: the options that limit an answer and its choice, and what picks by them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext
from engine.errors import Problem

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1


@dataclass
class Limits:
    """What every decoder has: where an answer ends."""

    max_new_tokens: int = 128
    stop: list[str] = field(default_factory=list)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse answers without length, and stop strings that are none."""
        if self.max_new_tokens < 1:
            yield self.out_of_range("max_new_tokens", "must be 1 or more", 128)
        if not all(self.stop):
            yield self.out_of_range("stop", "holds an empty string, which stops everything", "[]")
        if any(re.fullmatch(r"(\\[nrt])+", stop) for stop in self.stop):
            yield Problem(
                slot="decode",
                code="value",
                message="decode.stop holds a backslash and a letter where a line break is meant",
                hint="""let the shell make it: $'decode.stop=["\\n"]'; in YAML: stop: ["\\n"]""",
            )

    def out_of_range(self, name: str, why: str, value: object) -> Problem:
        """Return the refusal of an option's value, with one to type instead."""
        message = f"decode.{name}={getattr(self, name)} {why}"
        return Problem(slot="decode", code="value", message=message, hint=f"decode.{name}={value}")


@dataclass
class Sampling(Limits):
    """What decoders have that go one token after the other: how each is picked."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    # Whether there is sampling shows in the options, so this is a property, and no constant.
    SAMPLING: ClassVar[str] = "decode.sampling"

    @property
    def provides(self) -> tuple[str, ...]:
        """Say whether tokens are drawn."""
        return (self.SAMPLING,) if self.temperature else ()

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range, and sampling options without sampling."""
        yield from super().check(context)
        for name, ok, why, value in (
            (
                "temperature",
                self.temperature == 0 or 0.001 <= self.temperature <= 100,
                "must be 0 (greedy), or from 0.001 to 100",
                0.7,
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be 1 or more", 50),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "must be in (0, 1]", 0.9),
            ("min_p", self.min_p is None or 0 < self.min_p <= 1, "must be in (0, 1]", 0.05),
            (
                "repetition_penalty",
                0.01 <= self.repetition_penalty <= 100,
                "must be from 0.01 to 100 (1 is none)",
                1.0,
            ),
        ):
            if not ok:
                yield self.out_of_range(name, why, value)
        if not 0 <= context.recipe.seed <= MAX_SEED:
            message = f"seed={context.recipe.seed} must be from 0 to 2**63-1, which is {MAX_SEED}"
            yield Problem(slot="decode", code="value", message=message, hint="seed=0")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                yield Problem(
                    slot="decode",
                    code="does-nothing",
                    message=f"decode.{name} does nothing at temperature 0, which takes the "
                    "likeliest",
                    hint="decode.temperature=0.7",
                )

    def sampler(self, seed: int, device: torch.device) -> Sampler | None:
        """Return what draws the tokens of one generation; None takes the likeliest."""
        return Sampler(self, seed, device) if self.temperature else None


class Sampler:
    """Draw tokens with a random state of its own.

    generate() would draw from the process's random state: two sessions at once would disturb each
    other, and both whoever else draws from it. With the same seed the same tokens are drawn.
    """

    def __init__(self, options: Sampling, seed: int, device: torch.device) -> None:
        import torch
        from transformers import (
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.temperature = options.temperature
        self.limits: list[Any] = []
        if options.temperature != 1:
            self.limits.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            self.limits.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None and options.top_p < 1:
            self.limits.append(TopPLogitsWarper(options.top_p))
        if options.min_p is not None:
            self.limits.append(MinPLogitsWarper(options.min_p))
        self._random = torch.Generator(device).manual_seed(seed)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw one token per row of `scores`, `[batch, vocabulary]`: `[batch]`."""
        for limit in self.limits:
            scores = limit(ids, scores)
        return scores.softmax(-1).multinomial(1, generator=self._random)[:, 0]

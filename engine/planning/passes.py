"""Price single passes: what the chosen plugins and the model's body say of each, added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from engine.contexts import EstimateContext, Term
from engine.errors import Problem
from engine.hooks import Hooks
from engine.planning import body
from engine.planning.speed import Cost, Rates, cost
from engine.recipe import Recipe
from engine.shape import ModelShape
from engine.target import Target

COMPILED = {"cuda": 0.05, "cpu": 0.5}
"""Share of the time to start operators that compiled steps take: graphs are replayed on a GPU."""

RESERVE = {"cuda": 600 * 2**20, "mps": 300 * 2**20, "cpu": 400 * 2**20}
"""Bytes that a process takes on a device before it holds a tensor, by rule: the context and kernels
of CUDA (0.5 to 0.9 GiB were seen), or Python with torch and transformers."""


USUAL_PROMPT = 512
"""Tokens of a prompt whose length nobody told."""


@dataclass(frozen=True)
class Pass:
    """One pass, priced."""

    context: EstimateContext
    terms: tuple[Term, ...]
    rates: Rates | None
    """What the target does in a second; None where that is not known."""

    @cached_property
    def held(self) -> Mapping[str, int]:
        """Return the bytes of what is there for as long as the session, by name."""
        return _summed(term for term in self.terms if not term.during)

    @cached_property
    def passing(self) -> Mapping[str, int]:
        """Return the bytes of what the pass needs at its peak, by name."""
        parts = [
            _summed(term for term in self.terms if term.during in ("pass", part))
            for part in ("attention", "feed-forward", "logits")
        ]
        return max(parts, key=lambda part: sum(part.values()))

    @property
    def bytes(self) -> Mapping[str, int]:
        """Return what the device must have, by name."""
        found: dict[str, int] = {}
        parts = (*self.held.items(), *self.passing.items(), ("runtime reserve", self.reserve))
        for name, size in parts:
            found[name] = found.get(name, 0) + size
        return {name: size for name, size in found.items() if size}

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights, of their scales and of drafts."""
        return sum(
            size for name, size in self.held.items() if "weights" in name or "scales" in name
        )

    @property
    def tensor_bytes(self) -> int:
        """Return the bytes of all tensors at the peak: what an allocator counts."""
        return sum(self.held.values()) + sum(self.passing.values())

    @property
    def peak_bytes(self) -> int:
        """Return the bytes that the device must have."""
        return self.tensor_bytes + self.reserve

    @property
    def reserve(self) -> int:
        """Return the bytes that the process takes on the device beside its tensors."""
        if self.rates is None or self.rates.reserve is None:
            return RESERVE.get(self.context.target.kind, 0)
        retained = (self.rates.retained - 1) * sum(self.passing.values())
        return self.rates.reserve + int(retained)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "held": dict(self.held),
            "passing": dict(self.passing),
            "reserve_bytes": self.reserve,
            "peak_bytes": self.peak_bytes,
        }

    @property
    def cost(self) -> Cost | None:
        """Return how long it takes; None where the target's speed is not known."""
        return None if self.rates is None else cost(self.rates, self.terms)


@dataclass(frozen=True)
class Pricer:
    """Prices passes of one recipe on one target."""

    recipe: Recipe
    hooks: Hooks
    shape: ModelShape
    """As the choices leave it."""
    target: Target
    rates: Rates | None

    def price(self, *, batch: int, new: int, tokens: int, max_tokens: int) -> Pass:
        """Price the pass of `new` tokens of each sequence, after which there are `tokens`."""
        decode: Any = self.recipe.decode
        beams = int(getattr(decode, "num_beams", 1)) if "decode.beam" in self.traits else 1
        if new == 1:
            new += self.drafts
        context = EstimateContext(
            recipe=self.recipe,
            shape=self.shape,
            target=self.target,
            batch=batch * beams,
            tokens=tokens,
            new=tokens if "cache.none" in self.traits else new,
            max_tokens=max_tokens,
        )
        terms = [*self.hooks.estimate(context), *body.terms(context)]
        if new == 1 and "decode.compiled" in self.traits:
            share = COMPILED.get(self.target.kind, 1.0)
            terms = [replace(term, launches=share * term.launches) for term in terms]
        return Pass(context, tuple(terms), self.rates)

    def prompt(self, batch: int, prompt: int, new: int) -> Pass:
        """Price the pass of a prompt whose answer has `new` tokens."""
        return self.price(batch=batch, new=prompt, tokens=prompt, max_tokens=prompt + new)

    def token(self, batch: int, prompt: int, new: int, *, at: int | None = None) -> Pass:
        """Price the pass of one token: the last of the answer, or the one numbered `at`."""
        tokens = prompt + max((new if at is None else at) - 1, 1)
        return self.price(batch=batch, new=1, tokens=tokens, max_tokens=prompt + new)

    @property
    def limit(self) -> int | None:
        """Return the tokens that a sequence can have at most, by the model and by its cache."""
        return limit(self.recipe, self.shape)

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Return the tokens of the recipe's prompt and answer, as far as they can go."""
        decode: Any = self.recipe.decode
        new = int(decode.max_new_tokens)
        asked, end = self.recipe.workload.prompt_tokens, self.limit
        prompt = USUAL_PROMPT if asked is None else asked
        if end is not None:
            if asked is None:
                prompt = max(min(prompt, end - new), min(prompt, end // 2), 1)
            new = max(min(new, end - prompt), 1)
        return prompt, new

    def peak(self) -> Pass:
        """Return the pass of the recipe's workload that needs most memory."""
        batch = self.recipe.workload.batch
        passes = (self.prompt(batch, *self.lengths), self.token(batch, *self.lengths))
        return max(passes, key=lambda each: each.peak_bytes)

    def refusal(self) -> list[Problem]:
        """Refuse what needs more memory than the target has, with the numbers."""
        usable = self.target.usable_bytes
        if usable is None:
            return []
        peak = self.peak()
        if peak.peak_bytes <= usable:
            return []
        listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in peak.bytes.items())
        return [
            Problem(
                message=f"it needs {peak.peak_bytes / 2**30:.2f} GiB ({listed}); "
                f"{self.target.name} has {usable / 2**30:.2f} GiB usable",
                hint="quantize=bitsandbytes, or another of the changes that `engine plan` ranks by "
                "what they cost",
                code="does-not-fit",
            )
        ]

    @property
    def drafts(self) -> int:
        """Return how many guessed tokens go along with each token."""
        decode: Any = self.recipe.decode
        assisted = "decode.assisted" in self.traits
        return int(getattr(decode, "num_draft_tokens", 0)) if assisted else 0

    @cached_property
    def traits(self) -> frozenset[str]:
        """Return what the chosen plugins provide."""
        provided = (getattr(one.plugin, "provides", ()) for one in self.hooks.chosen)
        return frozenset().union(*provided)


def limit(recipe: Recipe, shape: ModelShape) -> int | None:
    """Return the tokens that a sequence can have at most, by the model and by its cache."""
    cache: Any = recipe.cache
    ends = (shape.max_positions, getattr(cache, "max_tokens", None))
    return min((end for end in ends if end is not None), default=None)


def _summed(terms: Iterable[Term]) -> dict[str, int]:
    found: dict[str, int] = {}
    for term in terms:
        found[term.name] = found.get(term.name, 0) + term.bytes
    return {name: size for name, size in found.items() if size}

"""Plan a recipe: what it takes on its target, how fast it will be, how far it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from engine.errors import CheckpointError, DoesNotFit, EngineError, Problem
from engine.loading.model_folder import is_local
from engine.planning.passes import Pass, Pricer
from engine.planning.speed import FIXES
from engine.recipe import Recipe
from engine.shape import RECURRENT, USUAL, ModelShape
from engine.target import Target
from engine.verdict import Verdict, check

MARGIN = 1.03
"""A plan that needs more than its target has by less than this fits only with luck."""

FARTHEST = 2**27
"""Tokens beyond which nobody looks how far a plan goes."""

LARGEST = 2**20
"""Sequences beyond which nobody looks how large a batch can be."""

FEW = 4
"""How many times more may stay plain than is packed before a plan says so."""

IMPOSSIBLE = ("value", "not-causal", "prompt-too-long")
"""Codes of problems that leave nothing to plan."""


@dataclass(frozen=True)
class Plan:
    """A recipe, planned. Bytes are those of the whole device; seconds are None where not known."""

    verdict: Verdict
    pricer: Pricer
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def recipe(self) -> Recipe:
        """Return what was planned."""
        return self.verdict.recipe

    @property
    def target(self) -> Target:
        """Return what it was planned for."""
        return self.verdict.target

    @property
    def shape(self) -> ModelShape:
        """Return the model as the choices leave it."""
        return self.pricer.shape

    @cached_property
    def prompt(self) -> Pass:
        """Return the pass of the prompt."""
        return self.pricer.prompt(self.batch, self.prompt_tokens, self.new_tokens)

    @cached_property
    def token(self) -> Pass:
        """Return the pass of the last token, when the cache is as full as it gets."""
        return self.pricer.token(self.batch, self.prompt_tokens, self.new_tokens)

    @property
    def peak(self) -> Pass:
        """Return the pass that needs most."""
        return max(self.prompt, self.token, key=lambda each: each.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Return what the device must have."""
        return self.peak.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Tell whether the target has as much; None where it does not say what it has."""
        usable = self.target.usable_bytes
        return None if usable is None else self.peak_bytes <= usable

    @property
    def refused(self) -> bool:
        """Tell whether `check` refuses it, whatever memory there is."""
        return bool(self.verdict.problems) and self.verdict.error is not DoesNotFit

    @property
    def tight(self) -> bool:
        """Tell whether it fits with less than the plan may be off by."""
        usable = self.target.usable_bytes
        return bool(self.fits) and usable is not None and self.peak_bytes * MARGIN > usable

    @property
    def time_to_first_token(self) -> float | None:
        """Return the seconds of the prompt's pass."""
        return None if self.prompt.cost is None else self.prompt.cost.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Return the tokens that a second of decoding gives, of all sequences together.

        Of drafts, none are taken to be right: `at_best` tells what there is to win.
        """
        cost = self._middle.cost
        return None if cost is None else self.batch / cost.seconds

    @property
    def at_best(self) -> float | None:
        """Return the same if every draft was right; None where nothing is drafted."""
        drafts = self.pricer.drafts
        slowest = self.tokens_per_second
        return None if not drafts or slowest is None else slowest * (1 + drafts)

    @property
    def binds(self) -> Mapping[str, str]:
        """Return what limits each of the two passes: launches, bandwidth, compute."""
        costs = {"decode": self._middle.cost, "prefill": self.prompt.cost}
        return {name: cost.binds for name, cost in costs.items() if cost is not None}

    @property
    def advice(self) -> Mapping[str, str]:
        """Return what that means, and what helps."""
        return {binds: FIXES[binds] for binds in dict.fromkeys(self.binds.values())}

    @cached_property
    def longest_context(self) -> int | None:
        """Return the tokens, prompt and answer, that a sequence of the batch can have.

        None where nothing limits them, 0 where not even one fits.
        """
        limit, usable = self.pricer.limit, self.target.usable_bytes
        if usable is None:
            return limit
        most = _most(lambda tokens: self._needed(self.batch, tokens), usable, limit or FARTHEST)
        return limit if most == FARTHEST else most

    @cached_property
    def largest_batch(self) -> int | None:
        """Return the sequences of the planned length that fit; None where nothing limits them."""
        tokens, usable = self.prompt_tokens + self.new_tokens, self.target.usable_bytes
        if usable is None:
            return None
        most = _most(lambda batch: self._needed(batch, tokens), usable, LARGEST)
        return None if most == LARGEST else most

    @cached_property
    def _middle(self) -> Pass:
        """Return the pass of a token in the middle of the answer, which stands for all."""
        half = max((self.new_tokens + 1) // 2, 1)
        return self.pricer.token(self.batch, self.prompt_tokens, self.new_tokens, at=half)

    @property
    def notes(self) -> list[str]:
        """Return what is done with the choices, and what the plan leaves out."""
        return [*self.verdict.notes, *self._notes()]

    def _notes(self) -> Iterator[str]:
        if self.recipe.model.note:
            yield f"{self.recipe.model.path} is planned {self.recipe.model.note}"
        yield from _states(self.shape)
        left, packed = (self.token.held.get(name, 0) for name in ("weights", "packed weights"))
        if packed and left > FEW * packed:
            yield (
                f"quantize={self.recipe.choices['quantize']} leaves {left / (left + packed):.0%} "
                "of the bytes of weights as they are: embeddings, the head, experts in one tensor"
            )

    def _needed(self, batch: int, tokens: int) -> int:
        """Return what the device must have for sequences of so many tokens."""
        new = max(min(self.new_tokens, tokens - 1), 0)
        passes = [self.pricer.prompt(batch, tokens - new, new)]
        if new:
            passes.append(self.pricer.token(batch, tokens - new, new))
        return max(each.peak_bytes for each in passes)

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "recipe": self.recipe.name,
            "choices": self.recipe.choices,
            "model": {
                "path": self.recipe.model.path,
                "type": self.shape.model_type,
                "dtype": self.token.context.dtype,
                "parameters": self.shape.parameters,
                "max_positions": self.shape.max_positions,
            },
            "target": self.target.name,
            "workload": {
                "batch": self.batch,
                "prompt_tokens": self.prompt_tokens,
                "new_tokens": self.new_tokens,
            },
            "prefill": self.prompt.as_dict(),
            "decode": self.token.as_dict(),
            "tensor_bytes": self.peak.tensor_bytes,
            "peak_bytes": self.peak_bytes,
            "usable_bytes": self.target.usable_bytes,
            "fits": self.fits,
            "tight": self.tight,
            "longest_context": self.longest_context,
            "largest_batch": self.largest_batch,
            "decode_tokens_per_second": self.tokens_per_second,
            "decode_tokens_per_second_at_best": self.at_best,
            "time_to_first_token": self.time_to_first_token,
            "binds": dict(self.binds),
            "seconds": {
                name: dict(each.cost.parts)
                for name, each in (("prefill", self.prompt), ("decode", self._middle))
                if each.cost is not None
            },
            "rates": "" if self.pricer.rates is None else self.pricer.rates.origin,
            "problems": [problem.as_dict() for problem in self.verdict.problems],
            "notes": self.notes,
        }


def _states(shape: ModelShape) -> Iterator[str]:
    """Say which layers keep what is not counted, because families keep it in sizes of their own."""
    states = sum(kind in RECURRENT for kind in shape.layer_types)
    if states:
        yield f"the states of {states} layers are not counted; they do not grow with the text"
    if own := sorted(set(shape.layer_types) - USUAL):
        yield (
            f"layers of type {', '.join(own)} keep keys in a way of their own: keys and values of "
            "every token are counted instead"
        )


def plan(recipe: Recipe, *, target: Target | None = None) -> Plan:
    """Plan a recipe for its target, or another one, also where `check` refuses what it is to do.

    Raises:
        RecipeError: when it asks for what cannot be.
        CheckpointError: when the sizes of the model are not known.
        PluginError: when a plugin breaks the hook contract.
    """
    verdict = check(recipe, target=target)
    if verdict.pricer is None or any(each.code in IMPOSSIBLE for each in verdict.problems):
        verdict.raise_for_problems()
    if verdict.pricer is None:
        raise _unknown(
            recipe,
            "its config.json is not on this machine, so there is nothing to reckon with",
            "model=NAME of a model that is known here (engine list model), or "
            f"hf download {recipe.model.path} config.json",
        )
    if find_spec("transformers") is None:
        raise EngineError("transformers is not installed", hint="pip install recipe-engine")
    if not verdict.pricer.shape.weighed:
        raise _unknown(
            recipe,
            "its weights are not on this machine, and what they take is not known without them: "
            "they are packed, or transformers does not have its code",
            "put its safetensors beside config.json"
            if is_local(recipe.model.path)
            else f"hf download {recipe.model.path}",
        )
    return Plan(verdict, verdict.pricer, recipe.workload.batch, *verdict.pricer.lengths)


def _unknown(recipe: Recipe, what: str, hint: str) -> CheckpointError:
    path = recipe.model.path
    message, where = f"{path}: {what}", f"model.path={path}"
    return CheckpointError(Problem(message=message, hint=hint, code="shape-unknown", where=where))


def _most(needed: Callable[[int], int], usable: int, farthest: int) -> int:
    """Return the largest number, at most `farthest`, that needs no more bytes than are usable.

    Bytes grow by a straight line, or nearly, and reckoning them takes time: so the place where the
    line meets what is usable is looked at first, and every other time the middle.
    """
    low, high = 1, farthest
    below, above = needed(low), needed(high)
    if above <= usable:
        return farthest
    if below > usable:
        return 0
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (usable - below) / (above - below)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        size = needed(middle)
        if size <= usable:
            low, below = middle, size
        else:
            high, above = middle, size
        halve = not halve
    return low

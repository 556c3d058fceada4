"""What to change so that a recipe fits its target: the smallest changes, by what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from engine.composing import changing
from engine.errors import EngineError
from engine.planning.devices import known_targets
from engine.planning.planner import MARGIN, Plan, plan
from engine.quantizing import trial
from engine.recipe import Recipe
from engine.registry import installed

SLOTS = ("attention", "cache", "quantize")
"""Where a choice can make a recipe smaller."""

LOSES = ("weights.packed", "cache.quantized", "cache.evicting", "attention.window")
"""Traits of choices that may change the answers."""

ALIKE = 1.02
"""Plans whose memory or speed differ by less than this factor are taken as equal."""

MOST = 6
"""Changes of choices that are shown."""


Alternatives = list[tuple[str, Any]]
"""Names of choices, with what they are."""


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a recipe fit."""

    overrides: tuple[str, ...]
    """What to type behind the recipe's name."""
    costs: str
    """What is given up for it, in words."""
    plan: Plan
    lost: float = 0.0
    """Share of the bits of weights, keys and values that it gives up; 0 where it is exact."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "overrides": list(self.overrides),
            "costs": self.costs,
            "peak_bytes": self.plan.peak_bytes,
            "decode_tokens_per_second": self.plan.tokens_per_second,
        }


def suggest(found: Plan) -> list[Suggestion]:
    """Return what makes a plan fit that does not: other choices, smaller workloads, other targets.

    Choices come first, those that are exact before those that round, and faster ones before slower
    ones; then asking for less; last the smallest target where it fits as it is, or with its
    weights packed where no choice is enough.
    """
    if found.fits is not False or found.refused:
        return []
    alternatives = {slot: list(_alternatives(found, slot)) for slot in SLOTS}
    choices = _unbeaten(_choices(found, alternatives))
    devices = list(_elsewhere(found))
    if not choices:
        packed = list(_packed_elsewhere(found, alternatives["quantize"]))
        same = devices and packed and devices[0].plan.target == packed[0].plan.target
        devices = devices if same else [*packed, *devices]
    return [*choices[:MOST], *_asking_for_less(found), *devices]


def _unbeaten(choices: list[Suggestion]) -> list[Suggestion]:
    """Sort changes by what they cost, and leave out what another beats in loss, speed and size."""

    def slowness(each: Suggestion) -> int:
        return -round(math.log(each.plan.tokens_per_second or 1.0, ALIKE))

    def needs(each: Suggestion) -> int:
        chosen = each.plan.verdict.hooks.chosen
        return sum(len(getattr(one.plugin, "needs", ())) for one in chosen)

    def cost(each: Suggestion) -> tuple[float, int, int]:
        return round(each.lost, 2), slowness(each), needs(each)

    kept: list[Suggestion] = []
    for each in sorted(choices, key=cost):
        # Those that are kept already lose no more.
        beaten = any(
            slowness(other) <= slowness(each)
            and other.plan.peak_bytes <= each.plan.peak_bytes * ALIKE
            for other in kept
        )
        kept += [] if beaten else [each]
    return kept


def _choices(found: Plan, alternatives: Mapping[str, Alternatives]) -> list[Suggestion]:
    singles = [
        each
        for slot in SLOTS
        for name, plugin in alternatives[slot]
        if (each := _tried(found, {slot: (name, plugin)})) is not None
    ]
    if singles:
        return singles
    # Two slots at once, where one is not enough, and weights alone are not too much.
    packed = [each for each in alternatives["quantize"] if _leaves_room(found, each)]
    pairs = [
        {"quantize": first, other: second}
        for other in ("cache", "attention")
        for first, second in product(packed, alternatives[other])
    ]
    return [each for pair in pairs if (each := _tried(found, pair)) is not None]


def _leaves_room(found: Plan, quantize: tuple[str, Any]) -> bool:
    made = _planned(_changed(found, {"quantize": quantize}))
    return made is not None and made.token.weight_bytes < (found.target.usable_bytes or 0)


def _alternatives(found: Plan, slot: str) -> Iterator[tuple[str, Any]]:
    """Yield the other choices of a slot that make its part of the plan smaller, with plugins."""
    library = changing.folders()
    seen = [getattr(found.recipe, slot)]
    for name in (*installed()[slot], *library.files(slot)):
        try:
            plugin = changing.plugin(library, slot, name)
        except (EngineError, ValueError, TypeError, LookupError):
            continue  # broken, or more than a preset of values
        if plugin in seen:
            continue
        seen.append(plugin)
        if _smaller(found, slot, plugin):
            yield name, plugin


def _smaller(found: Plan, slot: str, plugin: Any) -> bool:
    """Tell whether a choice takes less than the one it would replace, by its own estimate."""
    one = found.pricer.hooks.slot(slot)

    def own(of: Any) -> int:
        from engine.calls import Chosen
        from engine.hooks import Hooks

        hooks = Hooks([Chosen(slot, one.choice, of)])
        changed = replace(found.recipe, **{slot: of})
        contexts = (found.prompt.context, found.token.context)
        return max(
            sum(term.bytes for term in hooks.estimate(replace(context, recipe=changed)))
            for context in contexts
        )

    try:
        return own(plugin) < own(one.plugin)
    except (EngineError, TypeError, AttributeError):
        return False


def _tried(found: Plan, changes: Mapping[str, tuple[str, Any]]) -> Suggestion | None:
    """Return a change if the recipe is sound with it, and fits."""
    words = {slot: name for slot, (name, _) in changes.items()}
    changed = _changed(found, changes)
    made = _planned(changed)
    if made is not None and not made.verdict.problems:
        made = _planned(changed, tried=True)  # which takes seconds, and most changes do not fit
    if made is None or made.verdict.problems:
        return None
    lost = max(0.0, 1 - _kept(made, found))
    loses = any(set(getattr(plugin, "provides", ())) & set(LOSES) for _, plugin in changes.values())
    kept = f" ({1 - lost:.0%} of the bytes are left)" if round(lost, 2) else ""
    costs = f"may change answers{kept}" if loses else "exact"
    return Suggestion(
        overrides=tuple(f"{slot}={name}" for slot, name in words.items()),
        costs=costs,
        plan=made,
        lost=lost if loses else 0.0,
    )


def _changed(found: Plan, changes: Mapping[str, tuple[str, Any]]) -> Recipe:
    words = {slot: name for slot, (name, _) in changes.items()}
    return replace(
        found.recipe,
        choices={**found.recipe.choices, **words},
        **{slot: plugin for slot, (_, plugin) in changes.items()},
    )


def _kept(made: Plan, found: Plan) -> float:
    """Return the share of what is held that is still held."""
    return sum(made.token.held.values()) / max(sum(found.token.held.values()), 1)


def _asking_for_less(found: Plan) -> Iterator[Suggestion]:
    if found.batch > 1 and found.largest_batch:
        yield from _workload(found, f"batches of {found.largest_batch}", batch=found.largest_batch)
    longest = found.longest_context or 0
    if longest > 1:
        new = min(found.new_tokens, max(longest // 2, 1))
        told = f"texts of {longest:,} tokens"
        yield from _workload(found, told, new=new, prompt_tokens=longest - new)


def _workload(
    found: Plan, costs: str, *, new: int | None = None, **sizes: int
) -> Iterator[Suggestion]:
    workload = replace(found.recipe.workload, **sizes)
    changed = replace(found.recipe, workload=workload)
    words = [f"workload.{name}={size}" for name, size in sizes.items()]
    if new is not None and new != found.recipe.decode.max_new_tokens:
        changed = replace(changed, decode=replace(changed.decode, max_new_tokens=new))
        words.append(f"decode.max_new_tokens={new}")
    made = _planned(changed)
    if made is not None and not made.verdict.problems:
        yield Suggestion(tuple(words), costs, made)


def _elsewhere(found: Plan) -> Iterator[Suggestion]:
    """Yield the smallest target of the same kind where the recipe fits as it is."""
    known = {target.name: target for target in known_targets()}
    if found.target != known.get(found.target.name, found.target):
        return  # it has figures of the user's own, which would stay behind another name
    targets = [target for target in known.values() if target.kind == found.target.kind]
    targets.sort(key=lambda target: target.usable_bytes or 0)
    for target in targets:
        if (target.usable_bytes or 0) < found.peak_bytes * MARGIN:
            continue
        made = _planned(replace(found.recipe, target=target))
        if made is not None and not made.verdict.problems:
            yield Suggestion((f"target={target.name}",), "another device", made)
            return


def _packed_elsewhere(found: Plan, packings: Alternatives) -> Iterator[Suggestion]:
    """Yield the smallest target that is enough once weights are packed, and the fastest packing."""
    ways = []
    for name, plugin in packings:
        made = _planned(_changed(found, {"quantize": (name, plugin)}))
        for each in () if made is None or made.refused else _elsewhere(made):
            words = (f"quantize={name}", *each.overrides)
            ways.append(Suggestion(words, "another device, and may change answers", each.plan))
    ways.sort(
        key=lambda way: (way.plan.target.usable_bytes or 0, -(way.plan.tokens_per_second or 0.0))
    )
    yield from ways[:1]


def _planned(changed: Recipe, *, tried: bool = False) -> Plan | None:
    """Return a plan; None where there is none.

    Args:
        tried: whether packed layers are tried on this CPU.
    """
    try:
        with nullcontext() if tried else trial.paused():
            return plan(changed)
    except EngineError:
        return None

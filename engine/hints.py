"""Try what a refusal says to type instead, so that no hint leads to the next refusal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from engine.composing.changing import changed, folders
from engine.errors import EngineError, Problem
from engine.hookspecs import SLOTS
from engine.recipe import Recipe

Judge = Callable[[Recipe], Sequence[Problem]]
"""Returns what is wrong with a recipe."""

_KEYS = ("model", "target", "workload", "seed", *SLOTS)
_OVERRIDE = re.compile(
    rf"(?<![\w./='-])(?:{'|'.join(_KEYS)})(?:\.\w+)*="
    r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\}|[^\s,;:()]*[^\s,;:().])"""
)
_PLACEHOLDER = re.compile(r"[A-Z]{3,}|…|\.\.\.")
"""What stands for a value that only the user knows: FOLDER, FILE.gguf, …"""
_PARTS = re.compile(r"(, or |; or | or |; )")


def tried(recipe: Recipe, problems: Sequence[Problem], judge: Judge) -> list[Problem]:
    """Return problems whose hints name no overrides that would be refused in turn.

    Where none of a hint would do, another choice for the slot that is to blame takes its place.
    """
    before = {_key(problem) for problem in problems}
    works: dict[tuple[str, ...], set[tuple[str, ...]] | None] = {}

    def mends(overrides: tuple[str, ...], problem: Problem) -> bool:
        if overrides not in works:
            works[overrides] = _left(recipe, overrides, judge)
        left = works[overrides]
        return left is not None and left <= before - {_key(problem)}

    return [replace(each, hint=_kept(each, recipe, mends)) for each in problems]


def first_that_works(
    recipe: Recipe, candidates: Iterable[Sequence[str]], judge: Callable[[Recipe], bool]
) -> str:
    """Return the first of these overrides with which a recipe is as wanted, as a line to type."""
    for overrides in candidates:
        try:
            if judge(changed(recipe, overrides)):
                return " ".join(overrides)
        except EngineError:
            continue
    return ""


def overrides_in(hint: str) -> list[tuple[str, ...]]:
    """Return the overrides that a hint names, each alternative apart; none that needs a value."""
    return [found for part in _PARTS.split(hint) if (found := _overrides(part))]


def _kept(
    problem: Problem, recipe: Recipe, mends: Callable[[tuple[str, ...], Problem], bool]
) -> str:
    """Return a hint without the alternatives that do not mend the problem."""
    parts = _PARTS.split(problem.hint)
    said = [_overrides(part) for part in parts]
    bad = {index for index, words in enumerate(said) if words and not mends(words, problem)}
    if not bad:
        return problem.hint
    kept = [part for index, part in enumerate(parts[::2]) if 2 * index not in bad]
    if any(words for index, words in enumerate(said) if index not in bad):
        return ", or ".join(kept)
    found = next((word for word in _others(problem, recipe) if mends((word,), problem)), "")
    if not found and not kept:
        found = (
            "what would run it is refused, too; take another model: model.path=FOLDER_OR_HUB_ID"
            if problem.code == "folder-kind"
            else f"no other choice for one slot mends it: change {_slots(problem)} together"
        )
    return ", or ".join(filter(None, [found, *kept]))


def _others(problem: Problem, recipe: Recipe) -> Iterator[str]:
    """Yield the other choices for the slot that is to blame, the base recipe's first."""
    if problem.slot not in SLOTS:
        return
    library = folders()
    base = library.part("base")
    usual = (
        [entry.choice for entry, _ in base.defaults if entry and entry.group == problem.slot]
        if base
        else []
    )
    for name in dict.fromkeys([*filter(None, usual), *library.names(problem.slot)]):
        if name != recipe.choices.get(problem.slot):
            yield f"{problem.slot}={name}"


def _slots(problem: Problem) -> str:
    named = [slot for slot in SLOTS if re.search(rf"\b{slot}\b", problem.message)]
    return " and ".join(named or ["several"])


def _left(recipe: Recipe, overrides: tuple[str, ...], judge: Judge) -> set[tuple[str, ...]] | None:
    """Return what is wrong with a recipe once these are applied; None where they cannot be."""
    try:
        return {_key(problem) for problem in judge(changed(recipe, overrides))}
    except EngineError:
        return None


def _overrides(text: str) -> tuple[str, ...]:
    found = tuple(match[0] for match in _OVERRIDE.finditer(text))
    return () if any(_PLACEHOLDER.search(word) for word in found) else found


def _key(problem: Problem) -> tuple[str, ...]:
    return problem.slot, problem.code, problem.message

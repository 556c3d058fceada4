"""Judge what is left of a recipe with mistakes, so that all of its problems come at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.composing.mistakes import Mistakes
from engine.errors import Problem, RecipeError
from engine.hookspecs import SLOTS


def judge(values: dict[str, Any], choices: dict[str, str], mistakes: Mistakes) -> None:
    """Note what `check` finds wrong with what could be built, and what follows from no mistake.

    Args:
        values: key of the top level → value, as far as there is one.
        choices: slot → the word that the recipe used for it.
        mistakes: what is wrong so far, and where to note the rest.
    """
    try:
        found = list(_found(values, choices, mistakes))
    except Exception:
        # Whatever it stumbles over may be the mistakes' fault, and those are told anyway.
        return
    for problem in found:
        mistakes.take(RecipeError(problem))


def _found(
    values: dict[str, Any], choices: dict[str, str], mistakes: Mistakes
) -> Iterator[Problem]:
    # Not at the top: both modules start from `compose`, and a recipe without mistakes needs none.
    from engine.recipe import Model, Recipe
    from engine.target import Target
    from engine.verdict import judge as check

    nameless = "model" not in values or bool(mistakes.bad & {("model",), ("model", "path")})
    values = {
        **{key: value for key, value in values.items() if key in Recipe.__dataclass_fields__},
        **{slot: _plugin(values.get(slot)) for slot in SLOTS},
    }
    if nameless:
        values["model"] = Model(path="")
    recipe = Recipe(**values, choices=choices)
    doubted = mistakes.doubted()
    try:
        verdict = check(recipe)
    except RecipeError as error:
        if error.problems[0].code != "target" or "target" in doubted:
            raise
        yield from error.problems
        doubted.add("target")
        verdict = check(dataclasses.replace(recipe, target=Target(kind="cpu")))
    missing = mistakes.whole and not mistakes.lost and not nameless
    for problem in verdict.problems:
        if problem.where.startswith("model.path="):
            follows = nameless
        else:
            # A value is wrong by itself; other problems lie between several choices.
            follows = (
                (problem.code != "value" and bool({problem.slot, "target"} & doubted))
                or (problem.code == "trait-missing" and not missing)
                or problem.code == "does-not-fit"
                or problem.slot in mistakes.lost
                or mistakes.mentions(problem)
            )
        if not follows:
            yield problem


def _plugin(value: Any) -> Any:
    return value if dataclasses.is_dataclass(value) else None

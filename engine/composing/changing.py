"""Change a composed recipe, as if it had been composed with more overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.composing import overrides as grammar
from engine.composing.defaults import GROUPS
from engine.composing.library import Library
from engine.errors import Problem, RecipeError
from engine.hookspecs import SLOTS
from engine.recipe import Recipe, Schema, installed_folders, search_folders


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with other choices, which start from their defaults, and other values.

    Raises:
        RecipeError: for an override that cannot be read, or names what is not there.
        PluginError: when a choice cannot be imported.
    """
    parsed, problems = grammar.parse(overrides)
    if problems:
        raise RecipeError(problems)
    library = folders()
    values: dict[str, Any] = {}
    choices = dict(recipe.choices)
    for override in parsed:
        key, value = override.key_or_group, override.value()
        top, _, path = key.partition(".")
        if path:
            values[top] = _with(values.get(top, getattr(recipe, top, None)), path, value)
        elif top in GROUPS:
            choices[top] = str(value)
            values[top] = plugin(library, top, str(value)) if top in SLOTS else None
            if top not in SLOTS:
                values[top] = _preset(library, top, str(value))
        else:
            values[top] = value
    return replace(recipe, choices=choices, **values)


def folders() -> Library:
    """Return what can be chosen from: plugins, and presets of the folders of recipes."""
    return Library(search_folders(), installed_folders(), Schema)


def plugin(library: Library, slot: str, name: str) -> Any:
    """Make a plugin with its defaults, or with the values of a preset.

    Raises:
        RecipeError: when there is no such choice, or it is more than a preset of values.
    """
    node = library.options(slot, name)
    if node is not None:
        return OmegaConf.to_object(node)
    part = library.part(f"{slot}/{name}")
    if part is None:
        raise _unknown(slot, name)
    bases = [entry.choice for entry, _ in part.defaults if entry is not None]
    (base,) = [choice for choice in bases if choice is not None]
    merged = OmegaConf.merge(OmegaConf.structured(plugin(library, slot, base)), part.values)
    return OmegaConf.to_object(merged)


def _preset(library: Library, group: str, name: str) -> Any:
    """Make a target or a model of the values that a file has for it."""
    part = library.part(f"{group}/{name}")
    if part is None:
        raise _unknown(group, name)
    made = getattr(Schema(), group)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(made), part.values))


def _with(options: Any, path: str, value: Any) -> Any:
    if options is None:
        raise _unknown(path, value)
    node = OmegaConf.structured(options)
    try:
        OmegaConf.update(node, path, value)
        return OmegaConf.to_object(node)
    except (OmegaConfBaseException, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(
            f"{path}={value}: {first}", hint="engine show prints every key"
        ) from error


def _unknown(what: str, name: object) -> RecipeError:
    return RecipeError(
        Problem(message=f"there is no {what}={name}", hint=f"engine list {what}", code="choice")
    )

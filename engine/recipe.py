"""Compose a recipe: YAML and overrides in, plugins out.

Hydra does the composing, omegaconf the typing. Hydra stops at the first mistake; here the mistake
is noted, left out, and composing tried again, so that all of them are reported together.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from engine.errors import EngineError, Problem, RecipeError, choices_hint
from engine.hookspecs import SLOTS
from engine.target import Target

DEFAULT = "tiny"
MAX_MISTAKES = 30


class Dtype(Enum):
    """In what the weights are computed with."""

    auto = "auto"
    """As the checkpoint stores them."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class Model:
    """Which model, and how it is read."""

    path: str = MISSING
    """A folder, a hub id, or `recipes://NAME` for one that comes with the engine."""
    revision: str | None = None
    """Branch, tag or commit at the hub."""
    dtype: Dtype = Dtype.auto
    trust_remote_code: bool = False
    """Run code that the checkpoint brings. Pin `revision` when you do."""


@dataclass
class Schema:
    """The typed top level of a recipe. Slots are `Any`: their plugin's class is their type."""

    model: Model = field(default_factory=Model)
    target: Target = field(default_factory=Target)
    seed: int = 0
    load: Any = MISSING
    quantize: Any = MISSING
    heads: Any = MISSING
    position_encoding: Any = MISSING
    attention: Any = MISSING
    cache: Any = MISSING
    decode: Any = MISSING
    task: Any = MISSING
    observe: Any = None


@dataclass
class Recipe(Schema):
    """A composed recipe: each slot holds its plugin, ready to build."""

    name: str = ""
    file: str = ""
    """Where the YAML is."""
    choices: dict[str, str] = field(default_factory=dict)
    """Slot → the word the recipe used for it: a plugin's name or a preset's."""
    text: str = ""
    """The composed YAML."""

    @property
    def digest(self) -> str:
        """Return a short name for the content: equal recipes have equal digests."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def compose(recipe: str | os.PathLike[str] = DEFAULT, overrides: Sequence[str] = ()) -> Recipe:
    """Compose a recipe and overrides in Hydra's grammar.

    Args:
        recipe: a shipped name, a name in `./recipes` or in the user's folder, or a `.yaml` path.
        overrides: `quantize=nf4`, `cache.max_tokens=512`, `~observe`, …

    Raises:
        RecipeError: with everything that is wrong, each with place and remedy.
        PluginError: when a chosen plugin cannot be imported.
    """
    from engine.mistakes import Composing

    name, folders = locate(recipe)
    composing = Composing(name, folders, Schema, list(overrides))
    config, choices, file = composing.run(MAX_MISTAKES)
    values, text = composing.values(config)
    return Recipe(**values, name=name, file=file, choices=choices, text=text)


def locate(recipe: str | os.PathLike[str]) -> tuple[str, tuple[Path, ...]]:
    """Return a recipe's name and the folders to look for it and its parts, nearest first."""
    given = os.fspath(recipe)
    folders = search_folders()
    if given.endswith((".yaml", ".yml")) or "/" in given or os.sep in given:
        file = Path(given).expanduser()
        if file.suffix == ".yml":
            raise RecipeError(
                Problem(message=f"{given}: recipes end in .yaml", code="recipe-name",
                        hint=f"mv {given} {file.with_suffix('.yaml')}")
            )  # fmt: skip
        file = file if file.suffix else file.with_suffix(".yaml")
        if not file.is_file():
            near = [str(other) for other in sorted(file.parent.glob("*.yaml"))]
            raise RecipeError(
                Problem(
                    message=f"there is no file {file}",
                    hint=choices_hint(str(file), near) if near else "engine list recipes",
                    code="recipe-not-found",
                )
            )
        return file.stem, (file.resolve().parent, *folders)
    return given, folders


def search_folders() -> tuple[Path, ...]:
    """Return the folders of recipes that exist: ./recipes, the user's, ours, other packages'."""
    user = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "engine" / "recipes"
    folders = [Path("recipes").absolute(), user, shipped_folder(), *_packaged_folders()]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def shipped_folder() -> Path:
    """Return the folder of the recipes that come with the engine."""
    spec = find_spec("engine.recipes")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError(
            "the recipes of the engine are not installed: a source checkout shadows the package",
            hint="in the checkout: pip install -e .",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _packaged_folders() -> Iterator[Path]:
    # Entry points `engine.recipes`: name = "package.folder". Only the top-level package is looked
    # up: finding it imports nothing.
    for entry in metadata.entry_points(group="engine.recipes"):
        top, *rest = entry.value.split(".")
        spec = find_spec(top)
        for location in (spec.submodule_search_locations if spec else None) or ():
            yield Path(location).joinpath(*rest)


def recipe_names() -> dict[str, Path]:
    """Return every recipe that can be run by name, with its file; the nearest folder wins."""
    found: dict[str, Path] = {}
    for folder in search_folders():
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def slots(recipe: Recipe) -> Mapping[str, Any]:
    """Return slot → plugin, of those that are filled."""
    return {slot: getattr(recipe, slot) for slot in SLOTS if getattr(recipe, slot) is not None}

"""Compose a recipe: YAML and overrides in, plugins out.

This is what is public; `engine.composing` does it, with the steps of Hydra.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from engine.composing.defaults import GROUPS
from engine.composing.source import is_file, printable, show, yaml_files
from engine.errors import EngineError, Problem, RecipeError, choices_hint
from engine.hookspecs import SLOTS
from engine.target import Target

DEFAULT = "tiny"


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
    config: dict[str, Any] = field(default_factory=dict)
    """What its config.json says: for judging and planning before that is on this machine."""
    note: str = ""
    """What a plan by `config` should say."""
    source: str = ""
    """Where `config` is from."""
    checked: str = ""
    """Day on which somebody looked at the source: year-month-day."""


@dataclass
class Workload:
    """What `check` and `plan` reckon with: how much goes through the model at a time."""

    batch: int = 1
    """Sequences."""
    prompt_tokens: int | None = None
    """Tokens of each prompt; the answer has up to `decode.max_new_tokens` more. None for 512, or as
    many as there is room for."""


@dataclass
class Schema:
    """The typed top level of a recipe. Slots are `Any`: their plugin's class is their type."""

    model: Model = field(default_factory=Model)
    target: Target = field(default_factory=Target)
    workload: Workload = field(default_factory=Workload)
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
    # Not at the top: `engine list` needs the folders of this module, but not Hydra.
    from engine.composing.compose import Composing
    from engine.composing.library import Library

    name, folders = locate(recipe)
    library = Library(folders, installed_folders(), Schema)
    file = library.files("").get(name)
    if file is None or name not in library.names(""):
        raise RecipeError(
            Problem(
                message=f"there is no recipe called {show(name)}",
                hint=_prompt_hint(name) or choices_hint(name, library.names("")),
                code="recipe-not-found",
            )
        )
    composed = Composing(name, library, overrides).run()
    order = [group for group in GROUPS if group in composed.choices]
    choices = {slot: composed.choices[slot] for slot in order}
    return Recipe(**composed.values, name=name, file=str(file), choices=choices, text=composed.text)


def locate(recipe: str | os.PathLike[str]) -> tuple[str, tuple[Path, ...]]:
    """Return a recipe's name and the folders to look for it and its parts, nearest first.

    Raises:
        RecipeError: when a path is given that is no `.yaml` file.
    """
    given = os.fspath(recipe)
    if not (given.endswith((".yaml", ".yml")) or "/" in given or os.sep in given):
        return given, search_folders()
    file = Path(os.path.expanduser(given))
    if file.suffix != ".yaml":
        dotted = Path(f"{file}.yaml")
        if file.suffix == ".yml" or not is_file(dotted):
            raise RecipeError(
                Problem(
                    message=f"{show(given)}: the file of a recipe ends in .yaml",
                    hint=f"rename it: {printable(str(file.with_suffix('.yaml')))}"
                    if is_file(file)
                    else _prompt_hint(given) or _files_beside(file),
                    code="recipe-name",
                )
            )
        file = dotted
    if not is_file(file):
        raise RecipeError(
            Problem(
                message=f"there is no file {show(file)}",
                hint=_files_beside(file),
                code="recipe-not-found",
            )
        )
    # The folder is resolved, the file is not: a link may not lead out of its folder.
    return file.stem, (file.parent.resolve(), *search_folders())


def _prompt_hint(given: str) -> str:
    """Say how a prompt is given, if that is what stands in the place of a recipe; else ''."""
    if not re.search(r"[\s()]", given) or given.endswith((".yaml", ".yml")):
        return ""
    short = len(given) <= 60 and printable(given) == given
    prompt = shlex.quote(given) if short else "'…'"
    return f"a prompt is given with -p {prompt}; what stands first is the name of a recipe"


def search_folders() -> tuple[Path, ...]:
    """Return the folders of recipes that exist: ./recipes, the user's, ours, other packages'."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    user = Path(config) / "engine" / "recipes"
    folders = [Path("recipes").absolute(), user, *installed_folders()]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def installed_folders() -> tuple[Path, ...]:
    """Return the folders of recipes that came with installed packages, ours first."""
    return (shipped_folder(), *_packaged_folders())


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


def _files_beside(file: Path) -> str:
    near = [str(other) for other in yaml_files(file.parent)]
    return choices_hint(str(file), near) if near else "engine list recipes shows what there is"


def recipe_names() -> dict[str, Path]:
    """Return every recipe that can be run by name, with its file; the nearest folder wins."""
    found: dict[str, Path] = {}
    for folder in search_folders():
        for file in yaml_files(folder):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def slots(recipe: Recipe) -> Mapping[str, Any]:
    """Return slot → plugin, of those that are filled."""
    return {slot: getattr(recipe, slot) for slot in SLOTS if getattr(recipe, slot) is not None}

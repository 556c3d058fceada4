"""Serve Hydra its configs: plugins' option classes from entry points, YAML from recipe folders.

Files are found by listing folders, never by joining what somebody typed to a path, and imports
happen for chosen plugins only. Nothing here raises for a mistake: a choice that does not exist is
noted and served empty, so that one pass over a recipe finds all of them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import registry
from engine.composing import source
from engine.composing.defaults import Part, is_group_name, read
from engine.composing.mistakes import options
from engine.composing.source import Document
from engine.errors import EngineError, PluginError, Problem, RecipeError
from engine.hookspecs import SLOTS

MAX_CONFIGS = 1000
"""Before lists that name each other many times over are given up."""


class Library:
    """The folders that one composing looks into, and what was read from them."""

    def __init__(self, folders: tuple[Path, ...], trusted: tuple[Path, ...], schema: type) -> None:
        self.folders = folders
        self.schema = schema
        self._trusted = trusted
        self._files: dict[str, dict[str, Path]] = {}
        self._parts: dict[str, Part] = {}

    def files(self, group: str) -> dict[str, Path]:
        """Return the YAML files of a group by name, or the recipes when group is ''."""
        if group not in self._files:
            found: dict[str, Path] = {}
            if group == "" or is_group_name(group):
                for folder in self.folders:
                    for file in source.yaml_files(folder / group):
                        found.setdefault(file.stem, file)
            self._files[group] = found
        return self._files[group]

    def names(self, group: str) -> list[str]:
        """List the choices of a group, or the recipes when group is ''."""
        plugins = registry.installed()[group] if group in SLOTS else {}
        return sorted({*plugins, *self.files(group)})

    def part(self, config: str) -> Part | None:
        """Read a YAML file, once."""
        if config not in self._parts:
            group, _, name = config.rpartition("/")
            file = self.files(group).get(name)
            if file is None:
                return None
            self._parts[config] = read(config, file, self._document(file))
        return self._parts[config]

    def options(self, slot: str, name: str) -> DictConfig | None:
        """Return the options of an installed plugin, importing it; None if there is none.

        Raises:
            PluginError: when it cannot be imported, or has options that a recipe cannot hold.
        """
        if slot not in SLOTS or name not in registry.installed()[slot]:
            return None
        shadow = self.files(slot).get(name)
        if shadow is not None:
            raise RecipeError(
                Problem(
                    message=f"{shadow} has the name of the installed plugin {slot}={name}",
                    hint="rename the file: a preset needs a name of its own",
                    code="shadowed-plugin",
                    slot=slot,
                    where=str(shadow),
                )
            )
        choice = registry.find(slot, name)
        try:
            return OmegaConf.structured(choice.load())  # type: ignore[no-any-return]
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise PluginError(
                Problem(
                    message=f"{slot}={name} ({choice.distribution}) has options that a recipe "
                    f"cannot hold: {str(error).splitlines()[0]}",
                    hint="use int, float, bool, str, Enum, list, dict, or one of them | None",
                    code="plugin-options",
                    slot=slot,
                )
            ) from error

    def owners(self, slot: str, option: str) -> list[str]:
        """Return the plugins of a slot that have an option, importing them; not the broken ones."""
        found = []
        for name in registry.installed()[slot]:
            with suppress(EngineError):
                if option in (options(self.options(slot, name)) or ()):
                    found.append(name)
        return found

    def _document(self, file: Path) -> Document:
        # Installed files may be links into a package manager's cache; others may not lead away.
        home = next(folder for folder in self.folders if file.is_relative_to(folder))
        if home not in self._trusted and not file.resolve().is_relative_to(home.resolve()):
            problem = Problem(
                message="is a link that leads out of the folder of recipes",
                hint="copy the file, or link the whole folder",
                code="link",
                where=str(file),
            )
            return Document({}, {}, (problem,))
        return source.read_file(file)


class Shelf(ConfigSource):
    """Answer Hydra's questions in one pass over a recipe, and note what there is no answer to."""

    def __init__(self, library: Library, dropped: frozenset[tuple[str, int]]) -> None:
        super().__init__("engine", "engine://")
        self.library = library
        self.parts: dict[str, Part] = {}
        self.unknown: list[str] = []
        self.errors: dict[str, EngineError] = {}
        self._dropped = dropped

    @staticmethod
    def scheme() -> str:
        """Return what stands before `://` in Hydra's search path."""
        return "engine"

    def available(self) -> bool:
        """Say that there is something to look into."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Tell whether there are choices under that name."""
        return is_group_name(config_path) and bool(self.library.names(config_path))

    def is_config(self, config_path: str) -> bool:
        """Say yes, since what is missing is served empty; no to what may be missing."""
        group, _, name = config_name(config_path).rpartition("/")
        optional = any(
            entry.optional and (entry.group, entry.choice) == (group, name)
            for part in self.parts.values()
            for entry, _ in part.defaults
            if entry is not None
        )
        return not optional or name in self.library.names(group)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the choices of a group."""
        return self.library.names(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Return an option class, or the values of a YAML file with its defaults list."""
        config = config_name(config_path)
        group, _, name = config.rpartition("/")
        package: str | None = None
        node: Any = None
        try:
            node = self.library.options(group, name)
        except EngineError as error:
            self.errors[config] = error
        part = None if node is not None or config in self.errors else self.library.part(config)
        if part is not None:
            self.parts[config] = part
            node, package = self._yaml(part), part.package
        elif node is None and config not in self.errors:
            self.unknown.append(config)
        return ConfigResult(
            provider=self.provider,
            path=self.path,
            config=OmegaConf.create({}) if node is None else node,
            header={"package": package},
        )

    def _yaml(self, part: Part) -> DictConfig:
        defaults = [
            line
            for entry, line in part.defaults
            if entry is None or (entry.config, entry.index) not in self._dropped
        ]
        return OmegaConf.create({**part.values, "defaults": defaults})


class Repository(ConfigRepository):
    """Hydra's view of one shelf, without its global registry of sources."""

    def __init__(self, shelf: Shelf) -> None:
        self.sources = [shelf]
        self._shelf = shelf
        self._loaded: dict[str, ConfigResult | None] = {}
        self._asked = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return a config, loading it once."""
        self._asked += 1
        if self._asked > MAX_CONFIGS:
            if self._turns_in_a_circle():  # Python's own limit is higher where a library raised it
                raise RecursionError
            raise RecipeError(
                Problem(
                    message=f"defaults lists lead to more than {MAX_CONFIGS} configs",
                    hint="name each recipe once",
                    code="too-large",
                )
            )
        if config_path not in self._loaded:
            self._loaded[config_path] = super().load_config(config_path)
        return self._loaded[config_path]

    def _turns_in_a_circle(self) -> bool:
        """Tell whether a config leads back to itself, by the defaults lists read so far."""
        next_of = {
            name: {f"{e.group}/{e.choice}".strip("/") for e, _ in part.defaults if e is not None}
            for name, part in self._shelf.parts.items()
        }
        ahead = dict.fromkeys(next_of, False)  # True: nothing that it leads to comes back

        def comes_back(name: str, path: frozenset[str]) -> bool:
            if name in path:
                return True
            if ahead.get(name, True):
                return False
            found = any(comes_back(each, path | {name}) for each in next_of[name])
            ahead[name] = not found
            return found

        return any(comes_back(name, frozenset()) for name in next_of)


def config_name(config_path: str) -> str:
    """Return Hydra's path of a config in the one form that is used here: group/name."""
    return config_path.removesuffix(".yaml").strip("/")

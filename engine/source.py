"""Serve Hydra its configs: plugins' option classes from entry points, YAML from recipe folders.

A recipe is data. Every YAML text passes through `read_yaml`, which refuses whatever could run code
or look outside of the recipe: tags, `_target_`, resolvers, Hydra's own settings, paths that leave
the folders. It also remembers on which line each key stands, for error messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from engine import registry
from engine.errors import PluginError, Problem, RecipeError
from engine.hookspecs import SLOTS

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 50
SCHEMA = "schema"
"""The name under which `base.yaml` asks for the typed top level of a recipe."""

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a key stands."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Library:
    """The folders that one composing looks into, and what it found there."""

    folders: tuple[Path, ...]
    schema: type[Any]
    dropped: set[tuple[str, Path_]] = field(default_factory=set)
    """Keys left out because they were reported already: (config, path in the file)."""
    places: dict[Path_, tuple[Place, str, Path_]] = field(default_factory=dict)
    """Key of the recipe → where it stands, and config and path in the file to drop it by."""
    defaults: list[tuple[str, str, Place, str, Path_]] = field(default_factory=list)
    """Entries of defaults lists: group, value, place, and how to drop them."""

    def file(self, config: str) -> Path | None:
        """Return the YAML file of a config, the first folder winning."""
        for folder in self.folders:
            file = folder / f"{config}.yaml"
            if file.is_file():
                return file
        return None

    def plugin(self, config: str) -> bool:
        """Tell whether a config is a plugin's option class."""
        group, _, name = config.rpartition("/")
        return group in SLOTS and name in registry.installed()[group]

    def names(self, group: str) -> list[str]:
        """List the choices of a group, or the recipes when group is ''."""
        found = set(registry.installed()[group]) if group in SLOTS else set()
        for folder in self.folders:
            place = folder / group
            if place.is_dir():
                found |= {file.stem for file in place.glob("*.yaml")}
        return sorted(found)


library: ContextVar[Library] = ContextVar("library")


class Shelf(ConfigSource):
    """Answer Hydra's questions from the current `Library`."""

    @staticmethod
    def scheme() -> str:
        """Return what stands before `://` in Hydra's search path."""
        return "engine"

    def available(self) -> bool:
        """Say that there is something to look into."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Tell whether there are choices under that name."""
        group = config_path.strip("/")
        return group == "" or (_plain(group) and bool(library.get().names(group)))

    def is_config(self, config_path: str) -> bool:
        """Tell whether there is a plugin or a YAML file of that name."""
        config = _config_name(config_path)
        if not _plain(config):
            return False
        here = library.get()
        return config == SCHEMA or here.plugin(config) or here.file(config) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """List the choices of a group."""
        return library.get().names(config_path.strip("/"))

    def load_config(self, config_path: str) -> ConfigResult:
        """Load an option class or a YAML file."""
        config = _config_name(config_path)
        here = library.get()
        package: str | None = None
        if config == SCHEMA:
            node: Any = OmegaConf.structured(here.schema)
        elif here.plugin(config):
            node = _options(config, here)
        else:
            file = here.file(config)
            if file is None:
                raise ConfigLoadError(f"there is no {config}")
            node, package = _from_yaml(config, file, here)
        return ConfigResult(
            provider=self.provider, path=self.path, config=node, header={"package": package}
        )


def _options(config: str, here: Library) -> DictConfig:
    slot, _, name = config.rpartition("/")
    shadow = here.file(config)
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
    except OmegaConfBaseException as error:
        raise PluginError(
            Problem(
                message=f"{slot}={name} ({choice.distribution}) has options that a recipe cannot "
                f"hold: {str(error).splitlines()[0]}",
                hint="use int, float, bool, str, Enum, list, dict, or one of them | None",
                code="plugin-options",
                slot=slot,
            )
        ) from error


def _from_yaml(config: str, file: Path, here: Library) -> tuple[DictConfig, str | None]:
    group = config.rpartition("/")[0]
    text = _read(file)
    header = _package(text, file)
    package = header if header is not None else group.replace("/", ".")
    prefix = () if package in ("", "_global_") else tuple(package.split("."))
    content, lines = read_yaml(text, str(file))
    if group == "" and "defaults" not in content and config != "base":
        content = {"defaults": ["base"], **content}
    for path, line in lines.items():
        place = Place(str(file), line)
        if path[0] != "defaults":
            here.places[prefix + path] = (place, config, path)
        elif len(path) == 3:
            entry, value = path[2], str(content["defaults"][int(path[1])][path[2]])
            name = entry.removeprefix("override ").removeprefix("optional ").lstrip("/")
            here.defaults.append((name, value, place, config, path[:2]))
        elif len(path) == 2 and isinstance(content["defaults"][int(path[1])], str):
            here.defaults.append((group, content["defaults"][int(path[1])], place, config, path))
    _drop(content, (path for name, path in here.dropped if name == config))
    return OmegaConf.create(content), header


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(
                Problem(
                    message=f"a recipe has at most {MAX_BYTES:,} bytes",
                    where=str(file),
                    code="too-large",
                )
            )
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            Problem(
                message=f"cannot read it as UTF-8 text: {error}", where=str(file), code="unreadable"
            )
        ) from error


def _package(text: str, file: Path) -> str | None:
    try:
        return ConfigSource._get_header_dict(text)["package"]
    except ValueError as error:
        raise RecipeError(
            Problem(message=str(error), where=f"{file}:1", code="header", hint="# @package NAME")
        ) from error


def read_yaml(text: str, file: str) -> tuple[dict[str, Any], dict[Path_, int]]:
    """Parse a recipe into plain data, and the line of each key.

    Raises:
        RecipeError: for YAML that is not a mapping, repeats a key, or could do more than hold
            data; all such places in the file at once.
    """
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        problems: list[Problem] = []
        lines: dict[Path_, int] = {}
        if not isinstance(node, yaml.MappingNode):
            problems.append(
                _at(file, node, "a recipe is a mapping of keys to values", "model:\n    path: …")
            )
        else:
            for count, problem in enumerate(_inspect(node, (), file, lines, 0)):
                if isinstance(problem, Problem):
                    problems.append(problem)
                if count > MAX_NODES:
                    problems.append(_at(file, node, f"more than {MAX_NODES:,} values in a recipe"))
                    break
        if problems:
            raise RecipeError(problems)
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(
            Problem(
                message=f"not valid YAML: {what}",
                hint="quote text that holds a colon, a brace or a hash; indent with spaces",
                where=f"{file}:{line}",
                code="yaml",
            )
        ) from error
    except (ValueError, OverflowError) as error:
        raise RecipeError(
            Problem(message=f"not a value that YAML can hold: {error}", where=file, code="yaml")
        ) from error
    finally:
        loader.dispose()
    return content, lines


def _inspect(
    node: yaml.Node, path: Path_, file: str, lines: dict[Path_, int], depth: int
) -> Iterator[Problem | None]:
    """Walk a node, noting lines; yields a problem or None per value, so that bombs are counted."""
    yield None
    if depth > MAX_DEPTH:
        yield _at(file, node, f"nested more than {MAX_DEPTH} levels deep")
        return
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python/" in node.tag:
        yield _at(file, node, f"the tag {node.tag} asks for more than data", "leave the tag out")
        return
    if isinstance(node, yaml.ScalarNode):
        refusal = hostile(node.value)
        if refusal:
            yield _at(file, node, *refusal)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, str(index))] = item.start_mark.line + 1
            yield from _inspect(item, (*path, str(index)), file, lines, depth + 1)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                yield _at(file, key_node, "a key is a word")
                continue
            key = key_node.value
            if key in seen:
                yield _at(file, key_node, f"'{key}' stands here and in line {seen[key]}: keep one")
            refusal = hostile(key) or hostile_key(key, path)
            if refusal:
                yield _at(file, key_node, *refusal)
            seen[key] = line
            lines[(*path, key)] = line
            yield from _inspect(value, (*path, key), file, lines, depth + 1)
            if path == () and key == "defaults":
                yield from _inspect_defaults(value, file)


def _inspect_defaults(node: yaml.Node, file: str) -> Iterator[Problem]:
    if not isinstance(node, yaml.SequenceNode):
        yield _at(file, node, "'defaults' is a list", "defaults:\n  - base\n  - _self_")
        return
    for item in node.value:
        if isinstance(item, yaml.MappingNode):
            for key, value in item.value:
                words = key.value.removeprefix("override ").removeprefix("optional ")
                if words.lstrip("/").split("/")[0].split("@")[0] == "hydra":
                    yield _at(file, key, *HYDRA)
                yield from _leaves(words.lstrip("/"), key, file)
                values = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for one in values:
                    if isinstance(one, yaml.ScalarNode):
                        yield from _leaves(one.value, one, file)
        elif isinstance(item, yaml.ScalarNode):
            yield from _leaves(item.value.lstrip("/"), item, file)


def _leaves(name: str, node: yaml.Node, file: str) -> Iterator[Problem]:
    if not _plain(name.split("@")[0].strip()) and name not in ("", "null", "~"):
        yield _at(
            file,
            node,
            f"'{name}' leaves the folders of recipes",
            "defaults name a recipe or a choice, without '..', '\\' or a drive",
        )


HYDRA = (
    "settings of Hydra itself are not part of a recipe",
    "leave 'hydra' out; plugins are installed with pip and chosen by name",
)


def hostile_key(key: str, path: Path_) -> tuple[str, str] | None:
    """Return why a key has no place in a recipe, and what to do; None if it has."""
    if key.startswith("_") and key.strip("_") in ("target", "partial", "args", "recursive", "convert"):
        return (
            f"'{key}' names code; a recipe holds names and values only",
            "choose an installed plugin by name: engine list",
        )
    if path == () and key.split("/")[0].split("@")[0] == "hydra":
        return HYDRA
    return None


def hostile(text: str) -> tuple[str, str] | None:
    """Return why a value has no place in a recipe (a resolver), and what to do; None if it has."""
    start = text.find("${")
    while start != -1:
        depth, end = 1, start + 2
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            if text[end] == ":" and depth:
                return (
                    f"'{text[:80]}' calls a resolver, which could read the environment or files",
                    "write the value itself, or ${key} to repeat another key of the recipe",
                )
            end += 1
        start = text.find("${", start + 2)
    return None


def _at(file: str, node: yaml.Node, message: str, hint: str = "") -> Problem:
    return Problem(
        message=message, hint=hint, where=f"{file}:{node.start_mark.line + 1}", code="recipe"
    )


def _drop(content: dict[str, Any], paths: Iterator[Path_]) -> None:
    # Deepest and last first: earlier indices of a list stay what they were.
    for path in sorted(paths, key=lambda p: (len(p), p), reverse=True):
        holder: Any = content
        for key in path[:-1]:
            holder = holder[int(key) if isinstance(holder, list) else key]
        del holder[int(path[-1]) if isinstance(holder, list) else path[-1]]


def _config_name(config_path: str) -> str:
    return config_path.removesuffix(".yaml").strip("/")


def _plain(name: str) -> bool:
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not set(name) & set("\\:\0")

"""Run Hydra over a recipe until every mistake in it is known, and say each in our words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import source
from engine.errors import EngineError, Problem, RecipeError, choices_hint, nearest
from engine.hookspecs import OPTIONAL_SLOTS, SLOTS
from engine.source import Library, Shelf

FLAGS = {"prompt": "-p TEXT", "json": "--json", "recipe": "the recipe's name comes first: engine run NAME"}


class Composing:
    """One recipe and its overrides, and what turned out to be wrong with them."""

    def __init__(
        self, name: str, folders: Sequence[Path], schema: type[Any], overrides: list[str]
    ) -> None:
        Plugins.instance().register(Shelf)
        if version.getbase() is None:
            version.setbase("1.3")
        self.name = name
        self.problems: list[Problem] = []
        self._folders = tuple(folders)
        self._schema = schema
        self._dropped: set[tuple[str, source.Path_]] = set()
        self._lost: set[str] = set()
        self._overrides = list(self._parse(overrides))
        self._shelf = self._library()

    def run(self, limit: int) -> tuple[DictConfig, dict[str, str], str]:
        """Return the composed config, the choice of each slot, and the recipe's file.

        Raises:
            RecipeError: all mistakes, at most about `limit`.
        """
        config = None
        while config is None:
            try:
                config = self._load(self._overrides)
            except EngineError as error:
                raise type(error)([*self.problems, *error.problems]) from error
            except (HydraException, OmegaConfBaseException, RecursionError) as error:
                found = self._note(error)
                if not found or len(self.problems) >= limit:
                    raise RecipeError(self.problems) from error
        choices = {
            slot: str(choice)
            for slot, choice in config.hydra.runtime.choices.items()
            if slot in SLOTS or slot == "target"
        }
        file = str(self._shelf.file(self.name) or "")
        del config._content["hydra"]  # type: ignore[union-attr]
        return config, choices, file

    def values(self, config: DictConfig) -> tuple[dict[str, Any], str]:
        """Return the values of the top level, plugins built, and the composed YAML."""
        self._leftovers(config)
        if self.problems:
            raise RecipeError(self.problems)
        found: dict[str, Any] = {}
        for key in config:
            try:
                node = config._get_node(key)
                found[str(key)] = (
                    OmegaConf.to_object(node) if OmegaConf.is_config(node) else config[key]
                )
            except OmegaConfBaseException as error:
                self._report_value(error, str(key))
            except EngineError as error:
                self.problems.extend(error.problems)
            except (ValueError, TypeError) as error:  # from a plugin's __post_init__
                self._report(f"{key}: {error}", slot=str(key), where=self._where((str(key),)))
        if self.problems:
            raise RecipeError(self.problems)
        return found, OmegaConf.to_yaml(config, resolve=True)

    def _parse(self, lines: Sequence[str]) -> Iterator[Override]:
        parser = OverridesParser.create()
        for line in lines:
            try:
                (override,) = parser.parse_overrides([line])
            except (HydraException, RecursionError) as error:
                why = getattr(error, "message", str(error)).strip().splitlines()
                self._report(
                    f"'{line}' is not an override: {why[0] if why else 'it cannot be parsed'}",
                    hint="key=value, where a value with spaces or commas is quoted: "
                    "'decode.stop=[\"a, b\"]'",
                    code="override",
                    where=line,
                )
                continue
            refusal = self._refuse(override)
            if refusal:
                self._report(refusal[0], hint=refusal[1], code="override", where=line)
            else:
                yield override

    def _refuse(self, override: Override) -> tuple[str, str] | None:
        line, key = override.input_line or "", override.key_or_group
        refusal = source.hostile(line)
        for depth, part in enumerate(key.replace("/", ".").split(".")):
            refusal = refusal or source.hostile_key(part, () if depth == 0 else (key,))
        for word in _words(override.value()):
            refusal = refusal or source.hostile_key(word, (key,))
        if refusal:
            return refusal
        if override.is_sweep_override():
            return (
                f"{line} names several values, and a run has one",
                f"give one value, or quote it if the comma is part of it: '{key}=\"…\"'",
            )
        if key in FLAGS and not hasattr(self._schema, key):
            return f"'{key}' is no key of a recipe", FLAGS[key]
        if override.package is not None:
            return f"{line} places a choice elsewhere", f"one choice for each slot: {key}=…"
        if key == "defaults" or key.startswith("defaults."):
            return (
                f"{line}: the defaults list is written in the recipe's file",
                "to choose for a slot: attention=sdpa",
            )
        return None

    def _library(self) -> Library:
        return Library(folders=self._folders, schema=self._schema, dropped=self._dropped)

    def _load(self, overrides: Sequence[Override]) -> DictConfig:
        self._shelf = self._library()
        token = source.library.set(self._shelf)
        try:
            path = ConfigSearchPathImpl()
            path.append("hydra", "pkg://hydra.conf")
            path.append("engine", "engine://")
            path.append("schema", "structured://")
            return ConfigLoaderImpl(path).load_configuration(
                config_name=self.name,
                overrides=[override.input_line or "" for override in overrides],
                run_mode=RunMode.RUN,
                from_shell=False,
            )
        finally:
            source.library.reset(token)

    def _note(self, error: BaseException) -> bool:
        """Report what stopped Hydra and leave it out; False when it cannot be left out."""
        if isinstance(error, MissingConfigException):
            return self._note_missing(error)
        cause = _root(error)
        key = getattr(cause, "full_key", None) or ""
        culprit = self._guilty_override(error, key)
        if culprit is not None:
            self._overrides.remove(culprit)
            self._report_value(cause, key or culprit.key_or_group, line=culprit.input_line or "")
            return True
        path = tuple(key.replace("[", ".").replace("]", "").split(".")) if key else ()
        while path:
            if path in self._shelf.places:
                place, config, inner = self._shelf.places[path]
                if (config, inner) in self._dropped:
                    break
                self._dropped.add((config, inner))
                self._report_value(cause, key, line=str(place))
                return True
            path = path[:-1]
        for group, value, place, config, inner in self._shelf.defaults:
            if (config, inner) not in self._dropped and group and f"'{group}'" in str(error):
                self._dropped.add((config, inner))
                self._report(
                    f"defaults: '{group}: {value}' cannot be placed: {_first(error)}",
                    hint=f"to choose for a slot that base fills: - override {group}: {value}",
                    slot=group if group in SLOTS else "",
                    where=str(place),
                )
                return True
        self._report(_first(cause), where=str(self._shelf.file(self.name) or self.name))
        return False

    def _note_missing(self, error: MissingConfigException) -> bool:
        missing = (error.missing_cfg_file or "").removesuffix(".yaml")
        group, _, value = missing.rpartition("/")
        known = self._shelf.names(group)
        if not group and missing == self.name:
            self._report(
                f"there is no recipe called {missing}",
                hint=choices_hint(missing, self._recipes()),
                code="recipe-not-found",
            )
            return False
        for override in self._overrides:
            if override.key_or_group == group and value in _words(override.value()):
                self._overrides.remove(override)
                self._report_choice(group, value, known, override.input_line or "")
                return True
        for name, given, place, config, inner in self._shelf.defaults:
            if (config, inner) not in self._dropped and (name, given) == (group, value):
                self._dropped.add((config, inner))
                self._report_choice(group, value, known, str(place))
                return True
        self._report_choice(group, value, known, str(self._shelf.file(self.name) or ""))
        return False

    def _report_choice(self, group: str, value: str, known: list[str], where: str) -> None:
        self._lost.add(group)
        if group == "":
            self._report(
                f"defaults: there is no recipe called {value}",
                hint=choices_hint(value, self._recipes()), where=where,
            )  # fmt: skip
        elif not known:
            self._report(
                f"{group} is not a slot", hint=choices_hint(group, [*SLOTS, "target"]), where=where
            )
        else:
            self._report(
                f"{value} is not a choice for {group}",
                hint=choices_hint(value, known, prefix=f"{group}="),
                code="unknown-choice",
                slot=group,
                where=where,
            )

    def _guilty_override(self, error: BaseException, key: str) -> Override | None:
        text = str(error)
        for override in self._overrides:
            line, name = override.input_line or "", override.key_or_group
            if line and line in text:
                return override
            if f"'{name}'" in text and "override" in text.lower():
                return override
            if key and (name == key or name.startswith(key + ".")):
                return override
        # Hydra did not say: the culprit is the one without which it gets further.
        for override in self._overrides:
            try:
                self._load([other for other in self._overrides if other is not override])
            except (HydraException, OmegaConfBaseException, RecursionError) as other:
                if str(other) != text:
                    return override
            else:
                return override
        return None

    def _leftovers(self, config: DictConfig) -> None:
        """Report what Hydra lets pass: added keys, empty slots, values where a choice is due."""
        known = {field.name for field in dataclasses.fields(self._schema)}
        for key in config:
            if key not in known:
                self._report_unknown(str(key), sorted(known), (str(key),))
        for slot in SLOTS:
            if slot in self._lost:
                continue
            node = config._get_node(slot)
            if node is None or OmegaConf.is_missing(config, slot):
                self._report(
                    f"{slot} has no choice",
                    hint=f"{slot}={next(iter(self._shelf.names(slot)), '…')}, or start the "
                    "recipe's defaults with '- base'",
                    slot=slot,
                    where=self._where((slot,)),
                )
            elif isinstance(node, DictConfig) and not node._is_none():
                self._extra(node, slot)
            elif config[slot] is not None or slot not in OPTIONAL_SLOTS:
                value = config[slot]
                self._report(
                    f"{slot}: {value} is a value where a choice is due",
                    hint=f"choices stand in the defaults list: '- override {slot}: {value}'; "
                    f"on the command line: {slot}={value}",
                    slot=slot,
                    where=self._where((slot,)),
                )
        for part in ("model", "target"):
            self._extra(config[part], part)
        if OmegaConf.is_missing(config.model, "path"):
            self._report(
                "no model is named",
                hint="model.path=FOLDER_OR_HUB_ID",
                code="model-missing",
                where=self._where(("model",)),
            )

    def _extra(self, node: DictConfig, slot: str) -> None:
        owner = OmegaConf.get_type(node)
        if not dataclasses.is_dataclass(owner):
            self._report(
                f"{slot} holds values, but no choice says what they mean",
                hint=f"choose first: '- override {slot}: …' in defaults, or {slot}=…",
                slot=slot,
                where=self._where((slot,)),
            )
            return
        known = [field.name for field in dataclasses.fields(owner)]
        for key in node:
            if key not in known:
                self._report_unknown(str(key), known, (slot, str(key)))

    def _report_unknown(self, key: str, known: list[str], path: source.Path_) -> None:
        slot = path[0] if path[0] in SLOTS else ""
        if slot in self._lost and slot:
            return
        prefix = ".".join(path[:-1])
        close = nearest(key, known)
        guess = f"did you mean {'.'.join([*path[:-1], close])}? " if close else ""
        owner = f"{prefix} has no option '{key}'" if prefix else f"a recipe has no key '{key}'"
        there = f"there are: {', '.join(known)}" if known else f"{prefix} has no options"
        self._report(
            owner, hint=guess + there, code="unknown-key", slot=slot, where=self._where(path)
        )

    def _report_value(self, error: BaseException, key: str, line: str = "") -> None:
        """Report an omegaconf error about the value or the existence of a key."""
        path = tuple(part for part in key.split(".") if part)
        if not path or (path[0] in self._lost and path[0] in SLOTS):
            if not path:
                self._report(_first(error), where=line)
            return
        where = line or self._where(path)
        owner = getattr(error, "object_type", None)
        if "not in" in str(error) and dataclasses.is_dataclass(owner):
            known = [field.name for field in dataclasses.fields(owner)]
            before = len(self.problems)
            self._report_unknown(path[-1], known, path)
            if len(self.problems) > before and where:
                self.problems[-1] = dataclasses.replace(self.problems[-1], where=where)
            return
        self._report(
            f"{key}: {_first(error)}",
            hint=self._expected(path),
            code="value",
            slot=path[0] if path[0] in SLOTS else "",
            where=where,
        )

    def _expected(self, path: source.Path_) -> str:
        """Say what type a key wants, with its default."""
        owner: Any = self._schema
        if path[0] in SLOTS:
            node = self._slot_type(path[0])
            owner = node
        for index, part in enumerate(path[1:] if path[0] in SLOTS else path):
            fields = {f.name: f for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else {}
            if part not in fields:
                return "engine show prints every key with its value"
            last = index == len(path) - (2 if path[0] in SLOTS else 1)
            kind = _types(owner).get(part)
            if last:
                if isinstance(kind, type) and issubclass(kind, Enum):
                    return f"one of: {', '.join(member.name for member in kind)}"
                return f"{'.'.join(path)} is of type {fields[part].type}"
            owner = kind
        return "engine show prints every key with its value"

    def _slot_type(self, slot: str) -> Any:
        try:
            config = self._load([o for o in self._overrides if o.key_or_group == slot])
            return OmegaConf.get_type(config, slot)
        except (EngineError, HydraException, OmegaConfBaseException):
            return None

    def _where(self, path: source.Path_) -> str:
        for override in self._overrides:
            if override.key_or_group == ".".join(path):
                return override.input_line or ""
        while path:
            if path in self._shelf.places:
                return str(self._shelf.places[path][0])
            path = path[:-1]
        return ""

    def _recipes(self) -> list[str]:
        return sorted({file.stem for folder in self._folders for file in folder.glob("*.yaml")})

    def _report(
        self, message: str, *, hint: str = "", code: str = "recipe", slot: str = "", where: str = ""
    ) -> None:
        self.problems.append(
            Problem(message=message, hint=hint, code=code, slot=slot, where=where)
        )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "values refer to each other in a circle"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(k) for k in value] + [w for v in value.values() for w in _words(v)]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]


def _types(owner: Any) -> dict[str, Any]:
    from typing import get_type_hints

    try:
        return get_type_hints(owner)
    except Exception:  # a plugin's annotations may name what only type checkers import
        return {}

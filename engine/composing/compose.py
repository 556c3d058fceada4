"""Compose one recipe with Hydra's own steps, going on after every mistake.

The steps are those of `hydra.compose`: the defaults list, the merge, the overrides. They are
called one by one, without Hydra's global state and without its `hydra` node, so that there is no
setting of Hydra for a recipe to change, and nothing that two threads could share. A mistake is
noted and left out; `Composing.run` raises all of them at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from engine.composing import overrides
from engine.composing.choosing import Chosen, choose
from engine.composing.judging import judge
from engine.composing.library import Library, config_name
from engine.composing.mistakes import CHOICES, Mistakes, first_line, options
from engine.composing.source import MAX_REFERENCES, TOO_MANY_REFERENCES, Keys
from engine.composing.written import Written, leaves
from engine.errors import EngineError, PluginError, Problem, RecipeError, choices_hint
from engine.hookspecs import OPTIONAL_SLOTS, SLOTS


@dataclass(frozen=True)
class Composed:
    """What a recipe came to."""

    values: dict[str, Any]
    """Key of the top level → value; slots hold their plugin."""
    choices: dict[str, str]
    text: str


class Composing:
    """One recipe and its overrides, and what turned out to be wrong with them."""

    def __init__(self, name: str, library: Library, lines: Sequence[str]) -> None:
        self._name = name
        self._library = library
        self._mistakes = Mistakes(str(library.files("")[name]), library.owners)
        self._written = Written()
        self._overrides, problems = overrides.parse(lines)
        for problem in problems:
            self._mistakes.take(RecipeError(problem))
            self._mistakes.bad.update(overrides.key_of(problem.where))
            if problem.where.lstrip("+~").partition("=")[0] == problem.slot:
                self._mistakes.lost.add(problem.slot)

    def run(self) -> Composed:
        """Return the composed recipe.

        Raises:
            RecipeError: with everything that is wrong.
            PluginError: when the recipe is right, but a chosen plugin is broken.
        """
        chosen = choose(self._name, self._library, self._overrides, self._mistakes)
        self._mistakes.choices |= chosen.choices
        part = chosen.shelf.parts.get(self._name)
        self._empty = part is not None and not part.lines
        config = OmegaConf.structured(self._library.schema)
        for default in self._in_order(chosen.configs):
            self._merge(config, default, chosen)
        _close(config)
        for override in chosen.overrides:
            self._apply(config, override)
        self._written.restore(config)
        values = self._build(config) if self._inspect(config) else {}
        if self._mistakes:
            judge(values, chosen.choices, self._mistakes)
            raise self._mistakes.error()
        return Composed(values, chosen.choices, OmegaConf.to_yaml(config, resolve=True))

    # The merge: values of files, then overrides.

    def _in_order(self, configs: list[ResultDefault]) -> list[ResultDefault]:
        """Put a model that was chosen behind the recipe's name last: it wins over the recipe's."""
        asked = any(override.key_or_group == "model" for override in self._overrides)
        late = [
            each
            for each in configs
            if asked and config_name(each.config_path or "").startswith("model/")
        ]
        return [each for each in configs if each not in late] + late

    def _merge(self, config: DictConfig, default: ResultDefault, chosen: Chosen) -> None:
        """Merge one config of the defaults list; value by value if it does not go in one."""
        name = config_name(default.config_path or "")
        loaded = chosen.repository.load_config(default.config_path or "")
        part = chosen.shelf.parts.get(name)
        prefix = tuple(key for key in (default.package or "").split(".") if key)
        if loaded is None:
            return
        if part is not None:
            self._take_choices(loaded.config, prefix, part.lines, str(part.file))
            for path, line in part.lines.items():
                self._mistakes.places[prefix + path] = f"{part.file}:{line}"
            self._written.note(prefix, part.values, part.written)
        try:
            config.merge_with(ConfigLoaderImpl._embed_result_config(loaded, default.package).config)
        except Exception:
            values = OmegaConf.to_container(loaded.config, resolve=False)
            for path, value in leaves(values, prefix):
                try:
                    config.merge_with(_nest(path, value))
                except Exception as error:
                    self._mistakes.value(config, path, value, error, self._mistakes.where(path))

    def _take_choices(self, content: Any, prefix: Keys, lines: dict[Keys, int], file: str) -> None:
        """Take plain values out of slots, where they would pass for plugins."""
        if prefix or not isinstance(content, DictConfig):
            return
        for slot in CHOICES:
            node: Any = content._get_node(slot)
            if node is None or (isinstance(node, DictConfig) and not node._is_none()):
                continue
            value = None if isinstance(node, DictConfig) else node._value()
            del content[slot]
            if value is not None or slot not in OPTIONAL_SLOTS:
                where = f"{file}:{lines[(slot,)]}"
                self._mistakes.choice_as_value(
                    slot, "null" if value is None else value, self._library.names(slot), where
                )

    def _apply(self, config: DictConfig, override: Override) -> None:
        path = tuple(part for part in re.split(r"[./\[\]]+", override.key_or_group) if part)
        where = overrides.place(override.input_line or "")
        parent = OmegaConf.select(config, ".".join(path[:-1])) if path[1:] else config
        if override.is_delete() and path[-1] in (options(parent) or ()):
            self._mistakes.add(
                f"{'.'.join(path)} can be changed, not left out",
                hint=f"{'.'.join(path)}=…",
                code="value",
                slot=path[0] if path[0] in SLOTS else "",
                where=where,
            )
            return
        try:
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
        except Exception as error:
            if override.is_add() and where.startswith("+") and "already at" in str(error):
                self._mistakes.add(
                    f"{'.'.join(path)} is there already, and + adds", hint=where.lstrip("+"),
                    code="value", where=where, slot=path[0] if path[0] in SLOTS else "",
                )  # fmt: skip
            else:
                self._mistakes.value(config, path, override.value(), error, where)
        else:
            self._mistakes.places[path] = where
            self._written.note(path, override.value(), overrides.written(override))

    # What Hydra lets pass.

    def _inspect(self, config: DictConfig) -> bool:
        """Note what Hydra lets pass; tell whether the values can be resolved."""
        self._inspect_slots(config)
        self._inspect_keys(config, config, ())
        model = _raw(config)["model"]
        named = not isinstance(model, dict) or model.get("path") not in ("", "???")
        if (
            self._mistakes.whole
            and not named
            and "model" not in self._mistakes.lost
            and not self._mistakes.bad & {("model",), ("model", "path")}
        ):
            self._mistakes.bad.add(("model", "path"))
            empty = "the recipe is empty: " if self._empty else ""
            self._mistakes.add(
                f"{empty}no model is named",
                hint="model.path=FOLDER_OR_HUB_ID, or recipes://embedded, or a model that is known "
                "here (engine list model): model=octocoder",
                code="model-missing",
                where=self._mistakes.where(("model",)) or self._mistakes.file,
            )
        if str(_raw(config)).count("${") > MAX_REFERENCES:
            message, hint = TOO_MANY_REFERENCES
            self._mistakes.add(message, hint=hint, code="value", where=self._mistakes.file)
            return False
        self._inspect_values(config)
        return True

    def _inspect_slots(self, config: DictConfig) -> None:
        empty = []
        for slot in SLOTS:
            node = config._get_node(slot)
            if slot in self._mistakes.lost:
                continue
            if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
                if options(node) is None:
                    self._mistakes.no_choice(
                        slot, self._mistakes.where((slot,)) or self._mistakes.file
                    )
            elif slot not in OPTIONAL_SLOTS:
                empty.append(slot)
        self._mistakes.lost.update(empty)
        if not empty or not self._mistakes.whole:
            return
        slot = empty[0] if len(empty) == 1 else ""
        known = choices_hint("", self._library.names(slot), prefix=f"{slot}=") if slot else ""
        self._mistakes.add(
            f"no choice for {', '.join(empty)}",
            hint="start the recipe's defaults with '- base'" + (known and f", or choose; {known}"),
            code="no-choice",
            slot=slot,
            where=self._deleted_at(slot) or self._mistakes.file,
        )

    def _deleted_at(self, slot: str) -> str:
        deleted = [o for o in self._overrides if o.is_delete() and o.key_or_group == slot]
        return overrides.place(deleted[-1].input_line or "") if deleted else ""

    def _inspect_keys(self, config: DictConfig, node: DictConfig, path: Keys) -> None:
        known = options(node)
        for key in list(node) if not node._is_none() and not node._is_missing() else ():
            here = (*path, str(key))
            child = node._get_node(key)
            if known is not None and key not in known:
                self._mistakes.unknown_key(here, known)
            elif isinstance(child, DictConfig | ListConfig) and child._is_interpolation():
                # It would take the place of a typed node without having its type.
                self._mistakes.lost.add(here[0])
                self._mistakes.add(
                    f"{'.'.join(here)}: a reference stands for one value, not for many",
                    hint="write the values themselves",
                    code="value",
                    slot=here[0] if here[0] in SLOTS else "",
                    where=self._mistakes.where(here),
                )
            elif isinstance(child, DictConfig):
                self._inspect_keys(config, child, here)
            elif isinstance(child, ListConfig) and _holds_lists(child):
                where = self._mistakes.where(here)
                self._mistakes.value(config, here, _raw(child), TypeError(), where)

    def _inspect_values(self, config: DictConfig) -> None:
        """Follow every reference, and look for options that were given no value."""
        for keys, value in leaves(_raw(config), ()):
            path = tuple(map(str, keys))
            if path[0] in self._mistakes.lost or (path == ("model", "path") and value == "???"):
                continue
            try:
                _reach(config, keys)
            except MissingMandatoryValue:
                key = ".".join(path)
                self._mistakes.add(
                    f"{key} has no value, and no default", hint=f"{key}=…", code="value-missing",
                    slot=path[0] if path[0] in SLOTS else "", where=self._mistakes.where(path),
                )  # fmt: skip
            except Exception as error:
                self._mistakes.value(config, keys, value, error, self._mistakes.where(path))

    def _build(self, config: DictConfig) -> dict[str, Any]:
        """Return the values of the top level, plugins made, as far as there is no mistake."""
        values: dict[str, Any] = {}
        # What is wrong with plain values was noted before.
        doubted = self._mistakes.doubted() | ({*config} - {*SLOTS} if self._mistakes else set())
        for key in map(str, config):
            if key in self._mistakes.lost:
                continue
            node = config._get_node(key)
            try:
                values[key] = (
                    OmegaConf.to_object(node) if OmegaConf.is_config(node) else config[key]
                )
            except (Exception, SystemExit, GeneratorExit) as error:
                if key in doubted:  # it may be for want of what was left out
                    continue
                if isinstance(error, EngineError):
                    self._mistakes.take(error)
                else:
                    self._note_plugin(key, error)
        return values

    def _note_plugin(self, slot: str, error: BaseException) -> None:
        """Note what `__post_init__` raised: a ValueError is about the options, else it is a bug."""
        cause = error.__cause__ or error
        told = isinstance(cause, ValueError)
        kind = "" if told else f"making it raised {type(cause).__name__}: "
        problem = Problem(
            message=f"{slot}: {kind}{first_line(cause)}",
            hint=f"engine show prints the options of {slot}",
            code="value",
            slot=slot if slot in SLOTS else "",
            where=self._mistakes.where((slot,)),
        )
        if told:
            self._mistakes.take(RecipeError(problem))
        else:
            self._mistakes.take(PluginError(problem))


def _close(config: DictConfig) -> None:
    """Let no key be added, except to options that are mappings of any keys."""
    OmegaConf.set_struct(config, True)
    pending = [config]
    while pending:
        node = pending.pop()
        if options(node) is None:
            OmegaConf.set_struct(node, False)
        elif not node._is_none() and not node._is_missing():
            children = [node._get_node(key) for key in node]
            pending += [child for child in children if isinstance(child, DictConfig)]


def _holds_lists(node: ListConfig) -> bool:
    """Tell whether a list of texts or numbers has lists in it, which OmegaConf lets pass."""
    if node._is_none() or node._is_missing() or node._metadata.element_type is Any:
        return False
    return any(isinstance(item, ListConfig) for item in node._content)  # type: ignore[union-attr]


def _raw(config: DictConfig | ListConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _nest(path: Sequence[Any], value: Any) -> dict[Any, Any]:
    for key in reversed(path):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _reach(config: DictConfig, path: Sequence[Any]) -> None:
    value: Any = config
    for key in path:
        value = value[key]
    if isinstance(value, ListConfig):
        OmegaConf.to_container(value, resolve=True, throw_on_missing=True)

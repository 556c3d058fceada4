"""Say what is wrong with a recipe in words that help: what, where, and what to type instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import AnyNode, Container, DictConfig, EnumNode, ListConfig, Node, OmegaConf
from omegaconf._utils import type_str

from engine.composing.defaults import GROUPS
from engine.composing.source import Keys, as_typed, printable, show
from engine.errors import EngineError, PluginError, Problem, RecipeError, choices_hint, nearest
from engine.hookspecs import SLOTS

CHOICES = GROUPS
_EXAMPLES = {int: "1", float: "0.5", bool: "true", str: "text"}


def _path_hint(group: str, given: object) -> str:
    """Say where a model's folder or hub id goes, for who has put it in the place of a choice."""
    return f"a folder or hub id: model.path={given}; or by name: " if group == "model" else ""


class Mistakes:
    """What was found wrong so far, and where each key of the recipe was written last."""

    def __init__(self, file: str, owners: Callable[[str, str], list[str]]) -> None:
        self.file = file
        """The recipe itself, for what has no line."""
        self._owners = owners
        self.whole = True
        """Whether every file could be read in full; if not, nothing is said to be missing."""
        self.places: dict[Keys, str] = {}
        self.lost: set[str] = set()
        """Slots whose choice is wrong: their options cannot be judged."""
        self.bad: set[Keys] = set()
        """Keys with a value that does not fit."""
        self.choices: dict[str, str] = {}
        self._problems: dict[Problem, None] = {}
        self._kinds: list[type[EngineError]] = []

    def __bool__(self) -> bool:
        return bool(self._problems)

    def error(self) -> EngineError:
        """Return everything as one error, a plugin's only if the recipe is without fault."""
        kind = RecipeError if RecipeError in self._kinds else self._kinds[0]
        return kind(sorted(self._problems, key=_order))

    def add(
        self, message: str, *, hint: str = "", code: str = "recipe", slot: str = "", where: str = ""
    ) -> None:
        """Note a problem, once."""
        self.take(
            RecipeError(Problem(message=message, hint=hint, code=code, slot=slot, where=where))
        )

    def take(self, error: EngineError) -> None:
        """Note the problems of an error."""
        self._problems.update(dict.fromkeys(error.problems))
        self._kinds.append(RecipeError if not isinstance(error, PluginError) else type(error))

    def doubted(self) -> set[str]:
        """Return the slots, and other keys of the top level, that something is wrong with."""
        slots = {problem.slot for problem in self._problems if problem.slot}
        return slots | self.lost | {path[0] for path in self.bad}

    def mentions(self, problem: Problem) -> bool:
        """Tell whether a problem speaks of a key whose value is known to be wrong."""
        text = f"{problem.message} {problem.hint}"
        for path in self.bad:
            names = [".".join(path)]
            if path[1:] and path[0] == problem.slot:
                names.append(path[-1])
            if any(name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names):
                return True
        return False

    def where(self, path: Keys) -> str:
        """Return where a key, or what holds it, was written; '' when nowhere."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def unknown_choice(self, group: str, choice: str, known: list[str], where: str) -> None:
        """Note a choice, or a recipe in a defaults list, that does not exist."""
        self.lost.add(group)
        if group == "":
            self.add(
                f"there is no recipe called {show(choice)}",
                hint=choices_hint(choice, known),
                code="recipe-not-found",
                where=where,
            )
            return
        self.add(
            f"{show(choice)} is no choice for {group}",
            hint=_path_hint(group, choice) + choices_hint(choice, known, prefix=f"{group}="),
            code="unknown-choice",
            slot=group if group in SLOTS else "",
            where=where,
        )

    def choice_as_value(self, slot: str, value: Any, known: list[str], where: str) -> None:
        """Note a choice that stands among the values."""
        self.lost.add(slot)
        word = str(value)
        word = word if word in known else nearest(word, known) or next(iter(known), word)
        self.add(
            f"{slot}: {show(value)} is a value where a choice is due",
            hint=f"{_path_hint(slot, value)}"
            f"choices stand in the defaults list: '- override {slot}: {word}', or behind the "
            f"recipe's name: {slot}={word}",
            code="choice-as-value",
            slot=slot if slot in SLOTS else "",
            where=where,
        )

    def unknown_key(self, path: Keys, known: list[str], where: str = "") -> None:
        """Note a key that its owner does not have."""
        if path[0] in self.lost:
            return
        owner = ".".join(path[:-1])
        if owner in self.choices:
            owner = f"{owner}={self.choices[owner]}"
        close = nearest(path[-1], known)
        if close:
            self.bad.add((*path[:-1], close))
        guess = f"did you mean {'.'.join([*path[:-1], close])}? " if close else ""
        if "." in path[-1]:
            self.bad.add((*path[:-1], *path[-1].split(".")))
            guess = "write dots as nesting: " + path[-1].replace(".", ": {") + ": …}; "
        if path[0] in SLOTS and len(path) == 2:
            guess = self._elsewhere(path[0], path[1], where or self.where(path)) or guess
        there = f"there are: {', '.join(known)}" if known else f"{owner} has no options at all"
        self.add(
            f"{owner} has no option {show(path[-1])}"
            if owner
            else f"a recipe has no key {show(path[-1])}",
            hint=guess + there,
            code="unknown-key",
            slot=path[0] if path[0] in SLOTS else "",
            where=where or self.where(path),
        )

    def _elsewhere(self, slot: str, option: str, where: str) -> str:
        """Say which other choices of a slot have an option, as a line to paste."""
        owners = self._owners(slot, option)
        typed = where.lstrip("+")
        line = typed if typed.startswith(f"{slot}.{option}=") else f"{slot}.{option}=…"
        others = "".join(f", {slot}={owner}" for owner in owners[1:])
        also = f" (as has{others[1:]})" if others else ""
        return f"{slot}={owners[0]} has it{also}: {slot}={owners[0]} {line}; " if owners else ""

    def value(
        self, config: DictConfig, keys: Sequence[Any], value: Any, error: Exception, where: str
    ) -> None:
        """Note a value that does not fit where it stands, looking for the reason in the config."""
        path = tuple(map(str, keys))
        if path[0] in self.lost:
            return
        self.bad.add(path)
        node: Node | None = config
        for depth, part in enumerate(path):
            fields = options(node)
            if fields is not None and part not in fields:
                self.unknown_key(path[: depth + 1], fields, where)
                return
            if depth == 1 and fields is None and path[0] in SLOTS:
                self.no_choice(path[0], where)
                return
            if fields is None and node is not None and not isinstance(node, DictConfig):
                path, value = path[:depth], f"{path[depth]}: {value}"
                self.bad.add(path)
                break
            node = _child(node, part)
        slot = path[0] if path[0] in SLOTS else ""
        key = ".".join(path)
        kind, hint = _expected(node, key)
        if "${" in str(value) and options(node) is None:
            kind, hint = "", "write the value itself, or ${key} to repeat another key"
        message = f"{key} is {show(as_typed(value))}, where {kind} is due" if kind else ""
        if kind and isinstance(node, EnumNode):
            members = [member.name for member in node.enum_type]
            message = f"{key} is {show(as_typed(value))}, which is none of {', '.join(members)}"
            close = nearest(str(value), members)
            hint = f"did you mean {key}={close}?" if close else hint
        self.add(
            message or f"{key}: {first_line(error)}",
            hint=hint or "engine show prints every key with its value",
            code="value",
            slot=slot,
            where=where,
        )

    def no_choice(self, slot: str, where: str) -> None:
        """Note options of a slot for which nothing is chosen."""
        self.lost.add(slot)
        self.add(
            f"{slot} has options, but no choice that says what they mean",
            hint=f"choose first: '- override {slot}: …' in defaults, or {slot}=… (engine list "
            f"{slot})",
            code="no-choice",
            slot=slot,
            where=where,
        )


def _order(problem: Problem) -> tuple[bool, str, int]:
    """Put problems in the order of the lines of their files, overrides last."""
    file, _, line = problem.where.rpartition(":")
    if file.endswith(".yaml") and line.isdigit():
        return False, file, int(line)
    return not problem.where.endswith(".yaml"), problem.where, 0


def options(node: Node | None) -> list[str] | None:
    """Return the names of a typed node's options; None for a node without a dataclass."""
    owner = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if owner is None or not dataclasses.is_dataclass(owner):
        return None
    return [field.name for field in dataclasses.fields(owner)]


def first_line(error: BaseException) -> str:
    """Return the gist of an error of Hydra or omegaconf."""
    if isinstance(error, RecursionError):
        return "it refers to itself in a circle"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0][:200]) if lines else type(error).__name__


def _child(node: Node | None, key: str) -> Node | None:
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        child = node._get_node(key, validate_access=False)
        return child if isinstance(child, Node) else None
    return None


def _expected(node: Node | None, key: str) -> tuple[str, str]:
    """Return what a place wants, and what to type; ('', '') when nothing is known of it."""
    fields = options(node)
    if fields is not None:
        return "a mapping", f"its keys are: {', '.join(f'{key}.{name}' for name in fields)}"
    if isinstance(node, EnumNode):
        members = [member.name for member in node.enum_type]
        return node.enum_type.__name__, f"one of: {', '.join(f'{key}={name}' for name in members)}"
    if node is None or (isinstance(node, AnyNode) and type(node) is AnyNode):
        return "", ""
    kind = type_str(node._metadata.ref_type)
    if isinstance(node, ListConfig):
        return kind, f"for example {key}=[a,b]"
    if isinstance(node, Container):
        return kind, f"for example {key}={{WORD: VALUE}}"
    default = node._value()
    example = _EXAMPLES.get(getattr(node._metadata, "object_type", None) or str, "")
    for each, text in _EXAMPLES.items():
        example = text if each.__name__ in kind else example
    if default not in (None, "???"):
        example = as_typed(default)
    return kind, f"for example {key}={example}"

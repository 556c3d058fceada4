"""Take a recipe's file apart: its values, and its defaults list, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.composing.source import Document, Keys, show
from engine.errors import Problem, choices_hint
from engine.hookspecs import SLOTS

MAX_ENTRIES = 50

GROUPS = (*SLOTS, "target", "model")
"""Folders that hold choices; no other folder beside a recipe is looked into."""


@dataclass(frozen=True)
class Entry:
    """One line of a defaults list; `group` is '' when it names a recipe."""

    config: str
    index: int
    group: str
    choice: str | None
    optional: bool
    override: bool
    where: str


@dataclass(frozen=True)
class Part:
    """One YAML file: its values and its defaults list, apart."""

    file: Path
    package: str | None
    values: dict[Any, Any]
    lines: dict[Keys, int]
    defaults: tuple[tuple[Entry | None, Any], ...]
    """Each entry as we read it (None for `_self_`) and as Hydra gets it."""
    problems: tuple[Problem, ...]
    written: dict[Keys, str]
    """As `Document.written`."""


def is_group_name(name: str) -> bool:
    """Tell whether a name is that of a group of choices, or of one inside it."""
    parts = name.split("/")
    return parts[0] in GROUPS and all(
        part.replace("-", "_").isidentifier() and len(part) < 100 for part in parts
    )


def read(config: str, file: Path, document: Document) -> Part:
    """Return the parts of one file, with what is wrong in it."""
    group = config.rpartition("/")[0]
    problems = list(document.problems)
    package = _package(group, file, document, problems)
    values = {key: value for key, value in document.content.items() if key != "defaults"}
    given = document.content.get("defaults")
    if given is None and "defaults" not in document.content:
        given = [] if group or config == "base" else ["base"]
    if not isinstance(given, list) or len(given) > MAX_ENTRIES:
        where = f"{file}:{document.lines[('defaults',)]}"
        problems.append(
            Problem(
                message=f"'defaults' is a list of at most {MAX_ENTRIES} entries",
                hint="defaults:\n  - base\n  - _self_",
                code="defaults",
                where=where,
            )
        )
        given = []
    reader = _Defaults(config, file, document.lines, problems)
    defaults = tuple(reader.entries(given))
    written = document.written
    return Part(file, package, values, document.lines, defaults, tuple(problems), written)


def _package(group: str, file: Path, document: Document, problems: list[Problem]) -> str | None:
    header = document.header
    if header is None or header == "_group_":
        return None
    words = header.split(".")
    good = all(word.isidentifier() for word in words) and words[0] != "hydra"
    if header == "_global_" or (good and group):
        return header
    problems.append(
        Problem(
            message=f"# @package {show(header)} is no place in a recipe",
            hint="leave it out; presets may say '# @package _global_', or a key of the recipe",
            code="header",
            where=f"{file}:1",
        )
    )
    return None


class _Defaults:
    """Read the defaults list of one file; what is wrong with an entry is noted, and it left out."""

    def __init__(
        self, config: str, file: Path, lines: dict[Keys, int], problems: list[Problem]
    ) -> None:
        self._config = config
        self._file = file
        self._lines = lines
        self._problems = problems

    def entries(self, given: list[Any]) -> Iterator[tuple[Entry | None, Any]]:
        """Yield each good entry, and last the place of the file's own values if none is said."""
        for index, item in enumerate(given):
            if item == "_self_" and item not in given[:index]:
                yield None, item
            elif item is not None:
                entry = self._entry(index, item)
                if entry is not None:
                    yield entry, item
        if "_self_" not in given:
            yield None, "_self_"

    def _entry(self, index: int, item: Any) -> Entry | None:
        where = f"{self._file}:{self._lines.get(('defaults', str(index)), 1)}"
        here = self._config.rpartition("/")[0]
        words: list[str] = []
        if isinstance(item, str) and item != "_self_":
            given = item
            group, _, choice = _from(here, item).rpartition("/")
        elif isinstance(item, dict) and len(item) == 1 and str(*item).strip():
            *words, given = str(*item).split()
            (choice,) = item.values()
            group = _from(here, given)
        else:
            words, given, group, choice = ["?"], str(item), "", None
        refusal = "is no entry" if set(words) - {"override", "optional"} else None
        refusal = refusal or _refuse_entry(given, choice)
        if refusal:
            self._note(
                f"{show(item if isinstance(item, str) else _flat(item))} {refusal}",
                "an entry is the name of a recipe, or a choice: - override attention: sdpa",
                where,
            )
        elif group and not is_group_name(group):
            self._note(f"{show(group)} is no slot", choices_hint(group, GROUPS), where)
        else:
            return Entry(
                self._config, index, group, choice, "optional" in words, "override" in words, where
            )
        return None

    def _note(self, what: str, hint: str, where: str) -> None:
        self._problems.append(
            Problem(message=f"defaults: {what}", hint=hint, code="defaults", where=where)
        )


def _flat(item: Any) -> str:
    if isinstance(item, dict):
        return ", ".join(f"{key}: {value}" for key, value in item.items())
    return str(item)


def _from(group: str, name: str) -> str:
    """Return a group or config of a defaults list as seen from the top."""
    return name.strip("/") if name.startswith("/") else f"{group}/{name}".strip("/")


def _refuse_entry(given: str, choice: object) -> str | None:
    if not isinstance(choice, str | None):
        return "is no entry: a choice is a word"
    whole = f"{given}/{choice or ''}"
    odd = set(whole) & set("\\:~") and "${" not in whole
    if odd or (choice or "").startswith("/") or {".", ".."} & set(whole.split("/")):
        return "leaves the folders of recipes"
    return "places a choice elsewhere" if "@" in whole else None

"""Read the text of a recipe as data, and refuse whatever could be more than data.

Tags, `_target_`, resolvers, Hydra's own settings, aliases that explode, endless files: each is
reported with its line and left out, so that the other mistakes of the file are found as well.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse as parse_reference

from engine.errors import Problem, RecipeError

MAX_BYTES = 100_000
MAX_VALUES = 10_000
MAX_DEPTH = 50
MAX_REFERENCES = 16
"""`${…}` in one recipe: strings that repeat each other grow threefold with every third of them."""

Keys = tuple[str, ...]
Refusal = tuple[str, str]
"""Why something has no place in a recipe, and what to do instead."""

TOO_MANY_REFERENCES: Refusal = (
    f"more than {MAX_REFERENCES} references to other values",
    "write the values out",
)

_MINIMAL = "defaults:\n  - base\nmodel:\n  path: ./my-model"
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_DATA = {"str", "int", "float", "bool", "null", "seq", "map"}
_CODE = re.compile(r"_(target|partial|args|recursive|convert)_")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_TEXT = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A recipe's text as plain data, the line of each key, and what was refused and left out."""

    content: dict[Any, Any]
    lines: dict[Keys, int]
    problems: tuple[Problem, ...] = ()
    header: str | None = None
    """What `# @package …` at the top says: the key that the content belongs under."""
    written: dict[Keys, str] = field(default_factory=dict)
    """Values that YAML takes for something else than text, as they are written: 'no', '1.0', …"""


def read_yaml(text: str, file: str) -> tuple[dict[Any, Any], dict[Keys, int]]:
    """Return a recipe's text as plain data, and the line of each key.

    Raises:
        RecipeError: for YAML that is not a mapping, repeats a key, or could do more than hold
            data; all such places in the text at once.
    """
    document = parse(text, file)
    if document.problems:
        raise RecipeError(document.problems)
    return document.content, document.lines


def parse(text: str, file: str) -> Document:
    """Return what of a text is data, and what is not as problems."""
    loader: Any = None
    try:
        loader = get_yaml_loader()(text)
        return replace(_Reader(loader, file).read(), header=_header(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        hint = "quote text that holds a colon, a brace or a hash; indent with spaces"
        return _nothing(f"not valid YAML: {what}", f"{file}:{line}", hint, "yaml")
    except _Endless as error:
        return _nothing(str(error), f"{file}:{error.line}", "write it flat and short", "too-large")
    except RecursionError:
        return _nothing(_TOO_DEEP, f"{file}:1", "write it flat and short", "too-large")
    finally:
        if loader is not None:
            loader.dispose()


def read_file(file: Path) -> Document:
    """Read a recipe's file; one that cannot be read is a document with a problem."""
    try:
        text = _bytes(file).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return _nothing(
            f"cannot be read as UTF-8 text: {why}", str(file), "save it as UTF-8", "unreadable"
        )
    if len(text) > MAX_BYTES:
        message = f"larger than {MAX_BYTES:,} bytes, which no recipe is"
        return _nothing(message, str(file), "keep names and values only", "too-large")
    return parse(text, str(file))


def is_file(file: Path) -> bool:
    """Tell whether a path is a regular file; pipes, devices and impossible names are not."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError):
        return False


def yaml_files(folder: Path) -> list[Path]:
    """List the regular `.yaml` files of a folder, none when it cannot be listed."""
    try:
        return sorted(file for file in folder.glob("*.yaml") if is_file(file))
    except (OSError, ValueError):
        return []


def refuse_text(text: str) -> Refusal | None:
    """Return why a text has no place in a recipe; None if it has."""
    if _NOT_TEXT.search(text):
        return f"{show(text)} holds characters that are not text", "leave them out"
    if text.count("${") > MAX_REFERENCES:
        return TOO_MANY_REFERENCES
    start = text.find("${")
    while start != -1:
        if ":" in _reference(text, start):
            return (
                f"{show(text)} calls a resolver, which could read the environment or files",
                "write the value itself, or ${key} to repeat another key of the recipe",
            )
        start = text.find("${", start + 2)
    return None


def refuse_key(key: str, *, top: bool) -> Refusal | None:
    """Return why a key has no place in a recipe; None if it has."""
    parts = re.split(r"[.:@/\[\]]", key.strip())
    if any(_CODE.fullmatch(part.strip()) for part in parts):
        return (
            f"{show(key)} names code; a recipe holds names and values only",
            "choose an installed plugin by name: engine list",
        )
    if top and next((part for part in parts if part), "") == "hydra":
        return (
            "settings of Hydra itself are not part of a recipe",
            "leave 'hydra' out; plugins are installed with pip and chosen by name",
        )
    return None


def show(text: object) -> str:
    """Quote something that somebody typed, short and without control characters."""
    plain = str(text)
    plain = plain if len(plain) <= 80 else plain[:79] + "…"
    return "'" + printable(plain) + "'"


def as_typed(value: Any) -> Any:
    """Return a value as people write it: null, true, the name of a member."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, Enum) else value


def printable(text: str) -> str:
    """Write control characters and halves of characters as escapes."""
    return _UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], text)


class _Endless(Exception):
    """Stop at YAML that is, or that aliases make, larger than any recipe."""

    def __init__(self, message: str, node: yaml.Node) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1


class _Reader:
    """Walk the nodes of one YAML text; what is refused leaves the tree before it is data."""

    def __init__(self, loader: Any, file: str) -> None:
        self._loader = loader
        self._file = file
        self._lines: dict[Keys, int] = {}
        self._written: dict[Keys, str] = {}
        self._problems: list[Problem] = []
        self._count = 0

    def read(self) -> Document:
        node = self._loader.get_single_node()
        if node is None:
            return Document({}, {})
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, "a recipe is a mapping of keys to values", _MINIMAL)
            return Document({}, {}, tuple(self._problems))
        content = self._loader.construct_document(node) if self._keep(node, (), 0) else {}
        return Document(content, self._lines, tuple(self._problems), written=self._written)

    def _keep(self, node: yaml.Node, path: Keys, depth: int) -> bool:
        """Say whether a node may stay; children that may not are taken out of it."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise _Endless(f"more than {MAX_VALUES:,} values in a recipe", node)
        if depth > MAX_DEPTH:
            raise _Endless(_TOO_DEEP, node)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _DATA:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            return self._refuse(
                node, f"the YAML tag {show(tag)} asks for more than data", "leave the tag out"
            )
        if isinstance(node, yaml.MappingNode):
            node.value = list(self._pairs(node, path, depth))
        elif isinstance(node, yaml.SequenceNode):
            node.value = list(self._items(node, path, depth))
        elif isinstance(node, yaml.ScalarNode):
            if node.tag.rpartition(":")[2] not in ("str", "null"):
                self._written[path] = node.value
            return self._keep_scalar(node)
        return True

    def _keep_scalar(self, node: yaml.ScalarNode) -> bool:
        refusal = refuse_text(node.value)
        if refusal:
            return self._refuse(node, *refusal)
        if "${" in node.value and not _is_reference(node.value):
            hint = "${key} repeats another key, and \\${ stands for the characters"
            return self._refuse(node, f"{show(node.value)} is no reference", hint)
        try:
            self._loader.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            kind = node.tag.rpartition(":")[2]
            return self._refuse(
                node, f"{show(node.value)} is no {kind} that can be held", "quote it, if it is text"
            )
        return True

    def _items(self, node: yaml.SequenceNode, path: Keys, depth: int) -> Iterator[yaml.Node]:
        for index, item in enumerate(node.value):
            here = (*path, str(index))
            self._lines[here] = item.start_mark.line + 1
            # A refused item leaves a gap, so that indices go on naming the same lines.
            if self._keep(item, here, depth + 1):
                yield item
            else:
                yield yaml.ScalarNode("tag:yaml.org,2002:null", "", item.start_mark, item.end_mark)

    def _pairs(
        self, node: yaml.MappingNode, path: Keys, depth: int
    ) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not self._keep_key(key, path, seen):
                continue
            line = key.start_mark.line + 1
            seen[key.value] = line
            self._lines[(*path, key.value)] = line
            if self._keep(value, (*path, key.value), depth + 1):
                yield key, value

    def _keep_key(self, key: yaml.Node, path: Keys, seen: dict[str, int]) -> bool:
        kind = key.tag.rpartition(":")[2]
        if kind == "merge":
            return self._refuse(key, "'<<' merges other keys in", "write the keys out")
        if not isinstance(key, yaml.ScalarNode) or kind not in ("str", "int"):
            what = show(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            return self._refuse(key, f"{what} is read as {kind}, not as a key", "quote the word")
        key.tag = "tag:yaml.org,2002:str"  # options are mappings of text, such as {0: 20GiB}
        refusal = refuse_text(key.value) or refuse_key(key.value, top=path == ())
        if refusal:
            return self._refuse(key, *refusal)
        if key.value in seen:
            line = seen[key.value]
            return self._refuse(
                key, f"{show(key.value)} stands here and in line {line}", "keep one of them"
            )
        return self._keep_scalar(key)

    def _refuse(self, node: yaml.Node, message: str, hint: str) -> bool:
        where = f"{self._file}:{node.start_mark.line + 1}"
        problem = Problem(message=message, hint=hint, where=where, code="recipe")
        if problem not in self._problems:
            self._problems.append(problem)
        return False


def _bytes(file: Path) -> bytes:
    # Not blocking: a pipe that takes the file's place after the check cannot make it wait.
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "not a regular file")
        return opened.read(MAX_BYTES + 1)


def _header(text: str) -> str | None:
    for line in text.splitlines():
        found = re.match(r"\s*#\s*@package\s+(.*\S)", line)
        if found:
            return found[1]
        if line.strip() and not line.lstrip().startswith("#"):
            break
    return None


def _is_reference(text: str) -> bool:
    try:
        parse_reference(text)
    except (GrammarParseError, RecursionError):
        return False
    return True


def _reference(text: str, start: int) -> str:
    """Return a `${…}` from its start to the brace that closes it."""
    depth = 0
    for end in range(start + 1, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return text[start:]


def _nothing(message: str, where: str, hint: str, code: str) -> Document:
    return Document({}, {}, (Problem(message=message, hint=hint, code=code, where=where),))

"""Read overrides in Hydra's grammar, and refuse what a recipe could not say either."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from threading import Lock
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from engine.composing.defaults import GROUPS
from engine.composing.source import (
    MAX_DEPTH,
    Keys,
    Refusal,
    as_typed,
    printable,
    refuse_key,
    refuse_text,
    show,
)
from engine.errors import Problem, RecipeError
from engine.hookspecs import OPTIONAL_SLOTS, SLOTS

MAX_LENGTH = 10_000
MOST_VARIANTS = 100

FLAGS = {
    "prompt": "-p TEXT",
    "json": "--json",
    "recipe": "the recipe's name comes first: engine run NAME",
}
"""Words that people take for keys of a recipe, and what to type instead."""

_KEY = re.compile(r"[+~]*(?P<key>\w+(\.\w+)*)=(?P<value>.*)", re.DOTALL)
_ITEM = re.compile(r"""(?:[^,'"]|'(?:\\.|[^'])*'|"(?:\\.|[^"])*")+""")
_PROMPT = "a prompt is given with -p TEXT or -p @FILE"
_parsing = Lock()  # antlr shares its tables between parsers


def parse(lines: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that can be applied, and what is wrong with the others."""
    parser = OverridesParser.create()
    found: list[Override] = []
    problems: list[Problem] = []
    for line in lines:
        override: Override | None = None
        refusal = _refuse_line(line)
        if refusal is None:
            override, refusal = _parsed(parser, line)
        if override is not None:
            refusal = _refuse(override)
        if override is not None and refusal is None:
            found.append(_worded(override))
        else:
            message, hint = refusal or ("it cannot be parsed", "")
            problems.append(
                Problem(
                    message=f"override {show(line)}: {message}",
                    hint=hint,
                    code="override",
                    slot=_slot(override),
                    where=place(line),
                )
            )
    return found, problems


def variants(lines: Sequence[str]) -> list[list[str]]:
    """Return every combination of overrides, where some name several values: `quantize=none,nf4`.

    What cannot be parsed is left as it is, for composing to say what is wrong with it.
    """
    parser = OverridesParser.create()
    found: list[list[str]] = [[]]
    for line in lines:
        override = _parsed(parser, line)[0] if _refuse_line(line) is None else None
        values = [line]
        if override is not None and override.is_sweep_override():
            key = line.partition("=")[0]
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        found = [[*before, value] for before in found for value in values]
        if len(found) > MOST_VARIANTS:
            problem = Problem(
                message=f"override {show(line)}: more than {MOST_VARIANTS} combinations",
                hint="fewer values for it: key=value,value", code="override", where=place(line),
            )  # fmt: skip
            raise RecipeError(problem)
    return found


def place(line: str) -> str:
    """Return an override as its problems name it: as typed, but not endless."""
    return printable(line if len(line) <= 200 else line[:199] + "…")


def key_of(line: str) -> list[Keys]:
    """Return the key that an override was meant for, whether or not the rest can be read."""
    found = _KEY.match(line)
    return [tuple(found["key"].split("."))] if found else []


def written(override: Override) -> dict[Keys, str]:
    """Return what of a value Hydra takes for something else than text, as it was typed.

    Returns:
        where in the value, `()` or an index → `1e3`, `true`, …
    """
    value, line = override.value(), (override.input_line or "").partition("=")[2]
    typed = line.strip()
    if isinstance(value, str):  # spaces around it were cut off
        return {(): line} if typed == value != line else {}
    if not isinstance(value, list):
        return {} if value is None or isinstance(value, dict) else {(): typed}
    items = [item.strip() for item in _ITEM.findall(typed[1:-1])]
    return {
        (str(index),): item
        for index, (item, each) in enumerate(zip(items, value, strict=False))
        if isinstance(each, bool | int | float) and len(items) == len(value)
    }


def words(value: Any) -> Iterator[str]:
    """Yield every key and value of a parsed value, as text."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from words(item)
    elif isinstance(value, list):
        for item in value:
            yield from words(item)
    else:
        yield str(value)


def _refuse_line(line: str) -> Refusal | None:
    if len(line) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH:,} characters", "write a recipe file"
    depth = deepest = 0
    for character in line:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep", "write it flat"
    return refuse_text(line)


def _parsed(parser: OverridesParser, line: str) -> tuple[Override | None, Refusal | None]:
    try:
        with _parsing:
            return parser.parse_override(line), None
    except (HydraException, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        why = str(error).strip().splitlines()
        if not set(line) & set("=~+"):
            return None, (
                "not of the form key=value",
                f"key=value changes a value; a run takes one recipe, and {_PROMPT}",
            )
        quoted = _quoted(parser, line) if isinstance(error, HydraException) else ""
        if quoted:
            return None, ("its value has to be quoted", quoted)
        return None, (
            f"not of the form key=value: {printable(why[0]) if why else 'unreadable'}",
            "key=value, where a value with spaces, commas or brackets is quoted: "
            "'decode.stop=[\"a, b\"]'" + ("" if _KEY.match(line) else f"; {_PROMPT}"),
        )


def _quoted(parser: OverridesParser, line: str) -> str:
    """Return an override for a shell, with its value quoted; '' if that is not the matter."""
    found = _KEY.fullmatch(line)
    if found is None or found["value"].lstrip()[:1] in tuple("[{'\""):
        return ""
    value = found["value"].replace("\\", "\\\\").replace('"', '\\"')
    better = f'{line[: found.start("value")]}"{value}"'
    try:
        with _parsing:
            parser.parse_override(better)
    except HydraException:
        return ""
    return shlex.quote(better)


def _refuse(override: Override) -> Refusal | None:
    key = override.key_or_group
    refusal = refuse_key(key, top=True)
    if override.is_sweep_override():
        return refusal or (
            "names several values, and a run has one",
            f"give one value, or quote it if the comma is part of it: '{key}=\"…\"'",
        )
    value = override.value()
    for word in words(value):
        # As text it may have been escaped: what counts is what Hydra understood.
        refusal = refusal or refuse_text(word)
    for word in _keys(value):
        refusal = refusal or refuse_key(word, top=False)
    return refusal or _refuse_key(override, key) or _refuse_choice(override, key, value)


def _refuse_key(override: Override, key: str) -> Refusal | None:
    if not key:
        return "no key before '='", "key=value"
    if "/" in key:
        return "a key has dots, not slashes", key.replace("/", ".") + "=…"
    if key in FLAGS:
        return f"{show(key)} is no key of a recipe", FLAGS[key]
    if override.package is not None:
        return "places a choice elsewhere", f"one choice for each slot: {key}=…"
    if key == "defaults" or key.startswith(("defaults.", "defaults[")):
        return (
            "the defaults list is written in the recipe's file",
            "to choose for a slot: attention=sdpa",
        )
    return None


def _refuse_choice(override: Override, key: str, value: Any) -> Refusal | None:
    if key not in GROUPS or isinstance(value, dict) or override.is_delete():
        return None
    if override.is_force_add():
        return "a choice is not added by force", f"{key}={value}"
    if isinstance(value, list):
        return f"{key} takes one choice", f"{key}={next(words(value), '…')}"
    if isinstance(value, str) and {"/", "\\"} & set(value):
        if key == "model":
            return "a model's folder or hub id is its path", f"model.path={value}"
        return "leaves the folders of recipes", f"a choice is a word: engine list {key}"
    return None


def _worded(override: Override) -> Override:
    """Return an override with its choice as a word, and with words for keys.

    `null` leaves an optional slot out.
    """
    value = override.value()
    if isinstance(value, dict | list):
        override._value = _with_words(value)
    if override.key_or_group not in GROUPS or isinstance(value, dict | str):
        return override
    if value is None and override.key_or_group in OPTIONAL_SLOTS:
        override.type = OverrideType.DEL
    elif not override.is_delete():
        override._value = str(as_typed(value))
    return override


def _with_words(value: Any) -> Any:
    """Return a value whose mappings have text as keys: options are such, as {0: 20GiB} is."""
    if isinstance(value, dict):
        return {str(as_typed(key)): _with_words(item) for key, item in value.items()}
    return [_with_words(item) for item in value] if isinstance(value, list) else value


def _keys(value: Any) -> Collection[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [k for item in value.values() for k in _keys(item)]
    if isinstance(value, list):
        return [key for item in value for key in _keys(item)]
    return []


def _slot(override: Override | None) -> str:
    first = override.key_or_group.split(".")[0] if override is not None else ""
    return first if first in SLOTS else ""

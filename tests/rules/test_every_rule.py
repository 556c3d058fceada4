"""Every rule is complete, dated, and tried for real by a test of its name."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import engine
import engine.plugins
from engine import registry
from engine.rules import Rule

HERE = Path(__file__).parent
WORDS = ("needs", "excludes", "alarms")


def modules() -> Iterator[Any]:
    """Yield every module of the core and of the plugins."""
    for package in (engine, engine.plugins):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)


def rules_in(value: Any, depth: int = 3) -> Iterator[Rule]:
    """Yield the rules in a value, in mappings and sequences, and in what a class states."""
    if isinstance(value, Rule):
        yield value
    elif depth and isinstance(value, Mapping):
        for each in value.values():
            yield from rules_in(each, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from rules_in(each, depth - 1)
    elif depth and inspect.isclass(value) and value.__module__.startswith("engine."):
        yield from rules_in(dict(vars(value)), depth - 1)


def instances(plugin: type[Any]) -> Iterator[Any]:
    """Yield a plugin with its defaults, and with each other value of options that have a few."""
    usual = {}
    for field in dataclasses.fields(plugin):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            usual[field.name] = [1.0] if "list" in str(field.type) else 1
    made = plugin(**usual)
    yield made
    for field in dataclasses.fields(plugin):
        value = getattr(made, field.name)
        if isinstance(value, bool):
            others: Iterable[Any] = (not value,)
        elif isinstance(value, Enum):
            others = list(type(value))
        elif value is None and "list" in str(field.type):
            others = ([1.0],)
        else:
            others = (4, 8) if isinstance(value, int) else ()
        for other in others:
            yield dataclasses.replace(made, **{field.name: other})


def shipped() -> Iterator[type[Any]]:
    for names in registry.installed().values():
        for claims in names.values():
            for claim in claims:
                if claim.distribution.startswith("recipe-engine "):
                    yield claim.load()


def every_rule() -> dict[str, list[Rule]]:
    """Return all rules by code."""
    found: dict[str, list[Rule]] = {}
    stated = [rules_in(dict(vars(module))) for module in modules()]
    for made, word in product((i for p in shipped() for i in instances(p)), WORDS):
        stated.append(rules_in(getattr(made, word, {})))
    for rule in (rule for each in stated for rule in each):
        known = found.setdefault(rule.code, [])
        if rule not in known:
            known.append(rule)
    return found


RULES = every_rule()


def named() -> set[str]:
    """Return the names of all tests of rules."""
    return {
        node.name
        for file in HERE.glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("code", RULES)
def test_a_rule_is_complete_and_dated(code: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
    for rule in RULES[code]:
        assert all(word.strip() for word in dataclasses.astuple(rule))
        assert re.search(r"[a-z][\w-]* \d+\.\d+(\.\d+)?\b", rule.seen), "a version"
        assert re.search(r", 20\d\d-[01]\d-[0-3]\d$", rule.seen), "the day it was seen"
        assert not rule.why.endswith("."), "the second half of a sentence"


@pytest.mark.parametrize("code", RULES)
def test_a_code_stands_for_one_refusal(code: str) -> None:
    """Reasons may name a trait or an option each; then they come from one place in one file."""
    assert len({rule.source for rule in RULES[code]}) == 1


@pytest.mark.parametrize("code", RULES)
def test_a_rule_is_tried_for_real(code: str) -> None:
    assert f"test_{code.replace('-', '_')}" in named()


def test_rules_made_in_functions_are_found_too() -> None:
    """Each `Rule(code=...)` in the code is one that the tests above have seen."""
    written = {
        keyword.value.value
        for module in modules()
        for node in ast.walk(ast.parse(inspect.getsource(module) or "pass"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Rule"
        for keyword in node.keywords
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant)
    }
    assert written == set(RULES)

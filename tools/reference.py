"""Write plugins/README.md, the reference for plugin authors, from the code that it describes.

    .venv/bin/python tools/reference.py           write it
    .venv/bin/python tools/reference.py --check   exit 1 if it differs

Hooks come from engine/hookspecs.py, types from engine/contexts.py and the modules of MORE, choices
and their options from the installed plugins. Nothing in the page is written by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import contexts, errors, hookspecs, probe, registry, rules, session, shape
from engine.rules import Rule

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "plugins" / "README.md"
MORE = {
    errors: ("Problem",),
    rules: ("Rule",),
    session: ("Session",),
    probe: ("Probe",),
    shape: ("ModelShape", "TensorSize"),
}
"""What plugins meet beside engine.contexts: module → classes."""


def page() -> str:
    """Return the whole page."""
    parts = [
        "# Plugins\n\n<!-- Written by tools/reference.py: change the docstrings instead. -->",
        inspect.cleandoc(hookspecs.__doc__ or ""),
        "## Hooks",
        *(_hook(name) for name in _hook_names()),
        "## What goes in and what comes out",
        *_types(contexts),
        "## What plugins read and give beside these",
        *(text for module, names in MORE.items() for text in _types(module, names)),
        "## Choices",
        *_choices(),
    ]
    return "\n\n".join(parts) + "\n"


def _hook_names() -> list[str]:
    """Return the hooks in the order in which the file has them: the order of a run."""
    tree = ast.parse(inspect.getsource(hookspecs))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def _hook(name: str) -> str:
    function = getattr(hookspecs, name)
    lines: list[str] = []
    code = False
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        if line.startswith("    ") != code and line.strip():
            lines.append("```python" if not code else "```\n")
            code = not code
        lines.append(line.removeprefix("    ") if code else line)
    if code:
        lines.append("```")
    signature = inspect.signature(function)
    (argument,) = signature.parameters.values()
    arrow = f"{argument.name}: {argument.annotation}) -> {signature.return_annotation}"
    return f"### `{name}`\n\n`{name}({arrow}`\n\n" + "\n".join(lines)


def _types(module: ModuleType, names: Collection[str] = ()) -> Iterator[str]:
    """Yield each type of a module, or the classes named, with its public fields and methods."""
    tree = ast.parse(inspect.getsource(module))
    for place, node in enumerate(tree.body):
        if isinstance(node, ast.Assign) and not names:
            about = _following_text(tree.body, place).removeprefix(" — ")
            yield f"### `{ast.unparse(node.targets[0])}`\n\n`{ast.unparse(node.value)}`: {about}"
        if not isinstance(node, ast.ClassDef) or (names and node.name not in names):
            continue
        source = f" (`{module.__name__}`)" if names else ""
        lines = [f"### `{node.name}`{source}", "", inspect.cleandoc(ast.get_docstring(node) or "")]
        lines.append("")
        for index, part in enumerate(node.body):
            if isinstance(part, ast.AnnAssign):
                about = _following_text(node.body, index)
                lines.append(
                    f"- `{ast.unparse(part.target)}: {ast.unparse(part.annotation)}`{about}"
                )
            elif isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                lines += _method(part)
        yield "\n".join(lines).rstrip()


def _method(node: ast.FunctionDef) -> Iterator[str]:
    """Yield the line of a method or property; overloads are left out."""
    marks = {ast.unparse(mark) for mark in node.decorator_list}
    first = (ast.get_docstring(node) or "").partition("\n\n")[0]
    about = f" — {' '.join(first.split())}" if first else ""
    if "overload" in marks:
        return
    returns = ast.unparse(node.returns) if node.returns else "Any"
    if marks & {"property", "cached_property"}:
        yield f"- `{node.name}: {returns}`{about}"
        return
    given = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    yield f"- `{node.name}({given}) -> {returns}`{about}"


def _following_text(body: list[ast.stmt], index: int) -> str:
    following = body[index + 1] if index + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        return " — " + " ".join(str(following.value.value).split())
    return ""


def _choices() -> Iterator[str]:
    for slot in hookspecs.SLOTS:
        for name, claims in registry.installed()[slot].items():
            ours = [claim for claim in claims if claim.distribution.startswith("recipe-engine ")]
            for claim in ours:
                yield _choice(f"{slot}={name}", claim.load())


def _choice(title: str, plugin: type[Any]) -> str:
    lines = [f"### `{title}`", "", inspect.cleandoc(plugin.__doc__ or "")]
    module = inspect.getmodule(plugin)
    about = inspect.cleandoc(module.__doc__ or "") if module else ""
    if "\n" in about:
        lines += ["", about.partition("\n")[2].strip()]
    rows = [_option(plugin, field) for field in dataclasses.fields(plugin)]
    if rows:
        lines += ["", "| option | type | default | |", "| --- | --- | --- | --- |", *rows]
    lines += _declared(plugin)
    rules = list(dict.fromkeys(_rules(plugin)))
    lines += [""] * bool(rules) + [_rule(rule) for rule in rules]
    return "\n".join(lines)


def _rules(plugin: type[Any]) -> Iterator[Rule]:
    """Yield what refuses the choice, wherever it is written: by a trait, or in its module."""
    for word in ("needs", "excludes", "alarms"):
        stated = getattr(_made(plugin), word, {})
        values = stated.values() if isinstance(stated, Mapping) else ()
        yield from (rule for rule in values if isinstance(rule, Rule))
    yield from (rule for rule in vars(inspect.getmodule(plugin)).values() if isinstance(rule, Rule))


def _declared(plugin: type[Any]) -> Iterator[str]:
    """Yield the traits that it provides, needs and excludes with its default options."""
    for word in ("provides", "needs", "excludes"):
        traits = getattr(_made(plugin), word, ())
        if traits and not isinstance(traits, property):
            yield ""
            yield f"{word.capitalize()} " + ", ".join(f"`{trait}`" for trait in traits) + "."


def _made(plugin: type[Any]) -> Any:
    """Return a plugin with its default options; its class, where one has none."""
    try:
        return plugin()
    except TypeError:
        return plugin


def _rule(rule: Rule) -> str:
    return f"- `{rule.code}`: {rule.why}. Source: {rule.source} ({rule.seen})."


def _option(plugin: type[Any], field: dataclasses.Field[Any]) -> str:
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, Enum):
        default = default.name
    tree = ast.parse(inspect.cleandoc(inspect.getsource(plugin)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    about = next(
        (
            _following_text(body, index).removeprefix(" — ")
            for index, node in enumerate(body)
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == field.name
        ),
        "",
    )
    kind = str(field.type).replace("|", "\\|")
    return f"| `{field.name}` | `{kind}` | `{default}` | {about} |"


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description="Write plugins/README.md from the code.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page differs")
    arguments = parser.parse_args()
    if arguments.check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("plugins/README.md differs from the code: .venv/bin/python tools/reference.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

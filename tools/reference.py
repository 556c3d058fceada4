"""Write plugins/README.md, the reference for plugin authors, from the code that it describes.

    python tools/reference.py           write it
    python tools/reference.py --check   exit 1 if it differs

Hooks come from engine/hookspecs.py, types from engine/contexts.py, choices and their options from
the installed plugins. Nothing in the page is written by hand.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from engine import contexts, hookspecs, registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "plugins" / "README.md"


def page() -> str:
    """Return the whole page."""
    parts = [
        "# Plugins\n\n<!-- Written by tools/reference.py: change the docstrings instead. -->",
        inspect.cleandoc(hookspecs.__doc__ or ""),
        "## Hooks",
        *(_hook(name) for name in _hook_names()),
        "## What goes in and what comes out",
        *_types(),
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


def _types() -> Iterator[str]:
    """Yield each dataclass and protocol of engine.contexts with its fields."""
    tree = ast.parse(inspect.getsource(contexts))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        lines = [f"### `{node.name}`", "", inspect.cleandoc(ast.get_docstring(node) or ""), ""]
        for index, part in enumerate(node.body):
            if isinstance(part, ast.AnnAssign):
                about = _following_text(node.body, index)
                lines.append(
                    f"- `{ast.unparse(part.target)}: {ast.unparse(part.annotation)}`{about}"
                )
            elif isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                about = f" — {ast.get_docstring(part)}" if ast.get_docstring(part) else ""
                lines.append(f"- `{part.name}({ast.unparse(part.args)})`{about}")
        yield "\n".join(lines).rstrip()


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
    return "\n".join(lines)


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
            sys.exit("plugins/README.md differs from the code: python tools/reference.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

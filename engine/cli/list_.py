"""`engine list`: recipes, choices for each slot, targets, models, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import common
from engine.errors import EngineError, RecipeError, choices_hint
from engine.hookspecs import SLOTS

if TYPE_CHECKING:
    from engine.registry import Choice, Option


@dataclass(frozen=True)
class Row:
    """One thing that can be named in a recipe or on the command line."""

    group: str
    name: str
    kind: str
    """'plugin', 'preset', 'recipe', 'target' or 'model'."""
    origin: str
    """Distribution and version, or the YAML file."""
    about: str = ""
    """First line of a YAML file's comment, or of a plugin's docstring."""
    options: tuple[Option, ...] = ()
    """What can be set behind a plugin's name."""
    ok: bool | None = None
    """Whether it could be imported; None where nobody tried."""


def list_(
    what: Annotated[
        str | None, typer.Argument(help="recipes, target, model, or a slot; all without it.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Import every plugin, and show what is broken.")
    ] = False,
    json: common.Json = False,
) -> None:
    """List recipes, choices for each slot, targets and models: where each is from, what it does.

    With a slot, also the options of its choices. Nothing is imported without --verify.

    engine list

    engine list attention

    engine list --verify
    """
    groups = ("recipes", *SLOTS, "target", "model")
    if what is not None and what not in groups:
        raise RecipeError(f"there is no list of {what}", hint=choices_hint(what, groups))
    rows = [row for group in groups if what in (None, group) for row in _rows(group, verify)]
    if json:
        common.print_json([asdict(row) for row in rows])
    else:
        _print(rows, options=what in SLOTS)
    if verify and any(row.ok is False for row in rows):
        raise typer.Exit(5)


def _rows(group: str, verify: bool) -> Iterator[Row]:
    from engine.composing.source import yaml_files
    from engine.recipe import search_folders
    from engine.registry import installed

    for name, claims in installed().get(group, {}).items():
        for claim in claims:
            yield _plugin(group, name, claim, verify, len(claims))
    seen: set[str] = set()
    for folder in search_folders():
        for file in yaml_files(folder if group == "recipes" else folder / group):
            if file.stem not in seen:
                seen.add(file.stem)
                kind = "preset" if group in SLOTS else group.removesuffix("s")
                yield Row(group, file.stem, kind, str(file), _first_comment(file))


def _plugin(group: str, name: str, claim: Choice, verify: bool, claims: int) -> Row:
    if claims > 1:
        about = "claimed more than once: choosing it is refused"
        return Row(group, name, "plugin", claim.distribution, about, ok=False)
    about, options = claim.read()
    ok = None
    if verify:
        try:
            about = (claim.verify().__doc__ or "").strip().partition("\n")[0]
            ok = True
        except EngineError as error:
            about, ok = error.problems[0].message, False
    return Row(group, name, "plugin", claim.distribution, about, options, ok)


def _first_comment(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as lines:
            first = lines.readline()
    except (OSError, UnicodeDecodeError) as error:
        return f"unreadable: {error}"
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _print(rows: list[Row], *, options: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "group", "name", "kind", "from", ""):
        table.add_column(title, overflow="fold")
    group = ""
    for row in rows:
        state = {True: "ok", False: "BROKEN", None: ""}[row.ok]
        origin = row.origin if row.kind == "plugin" else Path(row.origin).name
        shown = [_as_declared(row.group, option) for option in row.options if options]
        about = "\n".join([row.about, *shown])
        table.add_row(
            state, "" if row.group == group else row.group, row.name, row.kind, origin, about
        )
        group = row.group
    console = Console(highlight=False, markup=False)  # list[int] is no markup
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def _as_declared(slot: str, option: Option) -> str:
    default = f" = {option.default}" if option.default else ""
    return f"  {slot}.{option.name}: {option.type}{default}"

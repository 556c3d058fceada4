"""`engine explain`: what each choice of a recipe does, what it costs, and where that is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import typer

from engine.cli import common
from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.explaining import Explanation, Option, Part


def explain(arguments: common.Arguments = None, json: common.Json = False) -> None:
    """Say what each choice does, what it costs and saves by the plan, and where that is written.

    An option marked with * differs from its default. A recipe that `engine check` refuses is
    explained all the same, and refused at the end.

    engine explain tiny-4bit-gqa

    engine explain tiny cache=static cache.max_tokens=4096
    """
    from engine.explaining import explain as find_out

    try:
        found = find_out(common.compose(arguments))
    except EngineError as error:
        if not json:
            raise
        problems = [problem.as_dict() for problem in error.problems]
        common.print_json({"ok": False, "problems": problems})
        raise typer.Exit(error.exit_code) from error
    if json:
        common.print_json(found.as_dict())
        if not found.verdict.ok:
            raise typer.Exit(found.verdict.error.exit_code)
        return
    _print(found)
    found.verdict.raise_for_problems()


def _print(found: Explanation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)  # list[int] is no markup
    if not console.is_terminal:
        console.width = 160
    verdict = found.verdict
    console.print(f"{verdict.recipe.name} for {verdict.target.name}")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for part in found.parts:
        table.add_row(f"{part.slot}={part.choice}", "\n".join(_lines(part)))
    console.print(table)


def _lines(part: Part) -> Iterator[str]:
    preset = f" ({part.slot}={part.plugin})" if part.plugin != part.choice else ""
    yield f"{part.about or 'It does not say what it does.'}{preset}"
    yield from (_option(part.slot, option) for option in part.options)
    yield f"by the plan: {_price(part)}"
    yield from (f"source: {sentence}" for sentence in part.sources)
    yield from (f"  {link}" for link in part.links)
    if not part.origin.startswith("recipe-engine "):
        yield f"from {part.origin}"


def _option(slot: str, option: Option) -> str:
    if not option.changed:
        return f"    {slot}.{option.name}={option.value}"
    default = f"default {option.default}" if option.default else "it has no default"
    return f"  * {slot}.{option.name}={option.value} ({default})"


def _price(part: Part) -> str:
    if part.own is None or part.against_base is None:
        return "unknown, for the model is not on this machine, or an option is refused"
    own = f"{_bytes(part.own)} of its own" if part.own else ""
    if part.is_default:
        return f"{own or 'nothing that is estimated'}; it is what base chooses"
    changes = [
        f"{name} {'+' if change > 0 else '-'}{abs(change):,} bytes"
        for name, change in part.against_base.items()
    ]
    if not changes:
        return f"nothing that is estimated against what base chooses{own and '; ' + own}"
    return f"{', '.join(changes)} against what base chooses{own and '; ' + own}"


def _bytes(terms: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size:,} bytes" for name, size in terms.items())

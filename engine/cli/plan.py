"""`engine plan`: will it fit, how fast will it be, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli import common


def plan(
    arguments: common.Recipes = None,
    json: common.Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw memory against length into FILE, a .png or .html.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what a recipe takes on its target, how fast it will be, and what to change.

    Loads nothing: a config.json is enough, of a model that is here or of a known one (engine list
    model). Several recipes, or several values of a choice, are compared. Fails (exit code 4) where
    nothing fits, and as `engine check` does where nothing is sound.

    engine plan llama-3.1-8b-nf4-t4

    engine plan base model=octocoder quantize=bitsandbytes quantize.bits=4 target=rtx3090

    engine plan base model=qwen3-8b quantize=none,int8,nf4 target=l4 workload.prompt_tokens=8000

    engine plan base model=llama-3.1-8b target=a10 quantize=none,nf4 --plot memory.html
    """
    from engine.planning import picture, planner
    from engine.planning.suggesting import suggest

    if plot is not None:
        picture.refuse(plot)
    plans = {name: planner.plan(made) for name, made in common.compose_all(arguments).items()}
    if plot is not None:
        picture.draw(plans, plot)
    (first, *others) = plans.values()
    if others:
        if json:
            found = [{"name": name, **each.as_dict()} for name, each in plans.items()]
            common.print_json({"plans": found})
        else:
            from engine.cli.plan_tables import compare

            compare(plans)
    else:
        suggestions = suggest(first)
        if json:
            told = [suggestion.as_dict() for suggestion in suggestions]
            common.print_json(first.as_dict() | {"suggestions": told})
        else:
            from engine.cli.plan_tables import show

            show(first, suggestions)
    if plot is not None and not json:
        print(f"drawn: {plot}")
    if all(each.verdict.problems for each in plans.values()):
        if not (json or others) and first.refused:
            first.verdict.raise_for_problems()
        raise typer.Exit(first.verdict.error.exit_code)  # of what the tables have told

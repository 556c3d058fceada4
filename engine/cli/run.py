"""`engine run`: one prompt through a recipe."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Annotated

import typer

from engine.cli import common
from engine.errors import RecipeError

EXAMPLE = (
    "Question: Please write a function in Python that transforms bytes to Giga bytes.\n\nAnswer:"
)
"""What the embedded model is asked when nothing else is."""


def run(
    arguments: common.Arguments = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="TEXT, @FILE, or - for standard input."),
    ] = None,
    json: common.Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the answer only, no figures or receipts.")
    ] = False,
) -> None:
    """Answer one prompt, piece by piece; then figures, and receipts for each choice.

    engine run -p "def add(a, b):"

    engine run base model.path=./my-model quantize=nf4 -p @prompt.txt --json
    """
    recipe = common.compose(arguments)
    text = common.read_prompt(prompt)
    if not text and prompt is None and recipe.model.path == "recipes://embedded":
        text = EXAMPLE
        print("no prompt given: asking the example of the guide", file=sys.stderr)
    if not text:
        raise RecipeError("the prompt is empty", hint='-p "some text", -p @FILE, or pipe it in')
    with common.build(recipe) as session:
        stream = session.stream(text)
        echo = sys.stdout.isatty() and not getattr(recipe.task, "chat_template", False)
        if echo and not json and not quiet:
            typer.echo(typer.style(text, dim=True), nl=False)
        with closing(stream):
            for piece in stream:
                if not json:
                    print(piece, end="", flush=True)
        output = stream.output
        receipts = session.collect_receipts()
        found = common.score(session, output.figures)
        if json:
            about = {"name": recipe.name, "digest": recipe.digest}
            more = {
                "recipe": about,
                "plan": found.as_dict(),
                "notes": [*session.notes, *output.notes],
            }
            common.print_json(common.as_json(output, receipts, **more))
            return
        print()
        common.print_notes(output.notes)
        if not quiet:
            line = common.figures_line(output.figures, output.finish_reason, session.device.type)
            print(f"\n{line}\n{common.planned(found)}\n", file=sys.stderr)
            common.print_receipts(receipts)

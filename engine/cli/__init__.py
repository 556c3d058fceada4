"""The command line: one short file per verb.

A verb imports what it needs when it is called: `engine --help` loads neither Hydra nor torch.
"""

from __future__ import annotations

import os
import sys

import typer

from engine.cli import chat, check, list_, run, show
from engine.errors import EngineError

EPILOG = """
Any value of a recipe can be changed behind its name, in Hydra's grammar:

  engine run tiny quantize=bitsandbytes quantize.bits=8 decode.max_new_tokens=64 -p "def add(a, b):"

RECIPE is a shipped name (engine list), a name in ./recipes or in the user's folder, or a .yaml
file. Without one, 'tiny' runs the small model that comes with the engine. Exit codes: 2 recipe,
3 checkpoint, 4 does not fit, 5 plugin, 6 run, 130 interrupted. ENGINE_DEBUG=1 shows tracebacks.
"""

app = typer.Typer(
    name="engine",
    help="Run transformer models from YAML recipes: checked before loading, proven after.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("check")(check.check)
app.command("show")(show.show)
app.command("list")(list_.list_)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from engine import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a verb; errors become one message and an exit code."""
    try:
        app()
    except EngineError as error:
        _debug()
        _say(error)
        sys.exit(error.exit_code)


def _say(error: EngineError) -> None:
    if "--json" in sys.argv:
        import json

        problems = [problem.as_dict() for problem in error.problems]
        print(json.dumps({"ok": False, "error": type(error).__name__, "problems": problems}))
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)


def _debug() -> None:
    if os.environ.get("ENGINE_DEBUG"):
        import traceback

        traceback.print_exc()

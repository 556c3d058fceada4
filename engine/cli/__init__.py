"""The command line: one short file per verb.

A verb imports what it needs when it is called: `engine --help` loads neither Hydra nor torch.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import NoReturn

import typer

from engine.cli import calibrate, chat, check, convert, explain, list_, plan, run, show, streams
from engine.cli.verb import Verb, ignore_interrupts
from engine.errors import EngineError, RuntimeFailure

# A paragraph behind \b keeps its lines, so that a command can be pasted.
EPILOG = """
Any value of a recipe can be changed behind its name, in Hydra's grammar:

\b
  engine run tiny quantize=bitsandbytes quantize.bits=8 -p "def add(a, b):"

RECIPE is a shipped name (engine list), a name in ./recipes or in the user's folder, or a .yaml
file. Without one, 'tiny' runs the small model that comes with the engine. Exit codes: 2 recipe,
3 checkpoint, 4 does not fit, 5 plugin, 6 run, 130 interrupted. ENGINE_DEBUG=1 shows tracebacks.
"""

# Brought by recipe-engine itself. Anything else that is missing is a bug, or a plugin's affair.
BROUGHT = {
    "torch", "transformers", "huggingface_hub", "accelerate", "safetensors", "hydra", "omegaconf",
    "packaging", "rich", "yaml", "jinja2", "numpy", "tokenizers",
}  # fmt: skip

app = typer.Typer(
    name="engine",
    help="Run transformer models from YAML recipes: checked before loading, proven after.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run", cls=Verb)(run.run)
app.command("chat", cls=Verb)(chat.chat)
app.command("check", cls=Verb)(check.check)
app.command("plan", cls=Verb)(plan.plan)
app.command("calibrate", cls=Verb)(calibrate.calibrate)
app.command("convert", cls=Verb)(convert.convert)
app.command("explain", cls=Verb)(explain.explain)
app.command("show", cls=Verb)(show.show)
app.command("list", cls=Verb)(list_.list_)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from engine import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run a verb; errors become one message and an exit code."""
    # What imports make stays: looking through it again and again takes a tenth of the time.
    gc.set_threshold(20_000, 10, 10)
    streams.prepare()
    try:
        try:
            app()
        finally:
            ignore_interrupts()
            sys.stdout.flush()  # what fails here can still be told
    except EngineError as error:
        _end(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BROUGHT:
            raise
        _end(_not_installed(error))
    except OSError as error:
        if not streams.discard(error):
            raise
        _end_unwritten(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_unwritten(error: OSError) -> NoReturn:
    if error.errno == errno.EPIPE:  # the reader has enough
        sys.exit(1)
    _end(
        RuntimeFailure(
            f"the output cannot be written: {error.strerror}", hint="send it elsewhere: > FILE"
        )
    )


def _not_installed(error: ModuleNotFoundError) -> EngineError:
    return EngineError(
        f"{error.name} is not installed: pip install recipe-engine brings it",
        hint="pip install recipe-engine; in a checkout: pip install -e .",
    )


def _end(error: EngineError) -> NoReturn:
    try:
        _say(error)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as unwritten:
        if not streams.discard(unwritten):
            raise
    sys.exit(error.exit_code)


def _say(error: EngineError) -> None:
    if os.environ.get("ENGINE_DEBUG"):
        import traceback

        traceback.print_exc()
    if "--json" in sys.argv:
        import json

        problems = [problem.as_dict() for problem in error.problems]
        print(json.dumps({"ok": False, "error": type(error).__name__, "problems": problems}))
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)

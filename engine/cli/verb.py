"""What guards each verb, inside of typer: it would take some errors for its own."""

from __future__ import annotations

import os
import signal
import traceback
from typing import Any

import typer
import typer.core

from engine.cli import streams
from engine.errors import PluginError, RecipeError
from engine.hookspecs import SLOTS

KEYS = ("model", "target", "workload", "seed", *SLOTS)


class Verb(typer.core.TyperCommand):
    """A verb that only its own code and typer can end."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; where a value of a recipe was typed as an option, say how it is typed."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", "")
            if option.lstrip("-").partition(".")[0] not in KEYS:
                raise
            raise RecipeError(
                f"there is no option {option}: values of a recipe are given without dashes",
                hint=_as_override(option, words),
            ) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        streams.require_stdout()
        _require_folder()
        try:
            return super().invoke(ctx)
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):
                raise  # so rich ends when the reader has enough
            last = traceback.extract_tb(stop.__traceback__)[-1]
            raise PluginError(
                f"something tried to end the program with SystemExit: {stop.code}, in "
                f"{last.filename}:{last.lineno}",
                hint="no plugin and no checkpoint may; choose another, or report it to its author",
            ) from stop
        except KeyboardInterrupt as error:
            ignore_interrupts()
            raise typer.Exit(130) from error


def ignore_interrupts() -> None:
    """Let nothing interrupt the end: it is near, and its exit code is known."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_override(option: str, words: list[str]) -> str:
    """Phrase `--key value` or `--key=value` as the override that it means."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            value = value if equals else "" if following.startswith("-") else following
            return f"{option.lstrip('-')}={value or '…'}"
    return f"{option.lstrip('-')}=…"


def _require_folder() -> None:
    """Refuse to run in a folder that is gone: recipes and models are looked for from there."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise RecipeError(
            "the current folder does not exist any more", hint="cd to one that does"
        ) from error

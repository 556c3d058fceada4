"""The standard streams, whatever state the caller left them in."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from engine.errors import RecipeError, RuntimeFailure

_closed: set[str] = set()


class _Output(io.TextIOWrapper):
    """A stream that takes any text, and remembers the error when it cannot be written."""

    broken: OSError | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.broken = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.broken = error
            raise


def prepare() -> None:
    """Let each stream take any text, and put something in the place of one that is closed."""
    _closed.update(name for name in ("stdin", "stdout") if getattr(sys, name) is None)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets this number, and what is printed.
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or _nothing("r")
    sys.stdout = sys.stdout or _nothing("w")
    sys.stderr = sys.stderr or _nothing("w")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Without the mark that some programs put in front of UTF-8.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    # What a program that embeds this one put in the place of a stream is left alone.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _output(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _output(sys.stderr)


def _output(stream: Any) -> _Output:
    return _Output(
        stream.buffer,
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _nothing(mode: str) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8", errors="replace")  # type: ignore[return-value]


def require_stdin() -> TextIO:
    """Return standard input.

    Raises:
        RecipeError: when it is closed.
    """
    if "stdin" in _closed:
        raise RecipeError("standard input is closed", hint="pipe text in, or < FILE")
    return sys.stdin


def require_stdout() -> None:
    """Refuse to work for nobody.

    Raises:
        RuntimeFailure: when standard output is closed.
    """
    if "stdout" in _closed:
        raise RuntimeFailure("standard output is closed", hint="> /dev/null discards the answer")


def discard(error: OSError) -> bool:
    """Tell whether a stream could not be written; then drop what it still holds."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if getattr(stream, "broken", None) is error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            return True
    return False

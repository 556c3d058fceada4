"""observe=trace: a line of JSON for every hook call and every event."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import hookimpl, hookspecs
from engine.contexts import CheckContext, Event, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Trace:
    """Append to `path` when which hook ran, how long it took and what it raised.

    Generators are timed until they return, not until they are read. A line that cannot be written
    is lost rather than the run, and that is said on standard error; the receipt then fails.
    """

    path: str = "engine-trace.jsonl"

    @hookimpl(specname="check")
    def refuse_path(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a path that cannot be written."""
        why = _why_not(Path(self.path))
        if why:
            yield Problem(
                slot="observe",
                code="unwritable",
                message=f"observe.path={self.path} {why}",
                hint="observe.path=engine-trace.jsonl, or leave tracing out: observe=null",
            )

    @hookimpl(specname="observe")
    def write_event(self, event: Event) -> None:
        """Append an event with its data."""
        self.append({"event": event.kind, **event.data})

    @hookimpl(specname="receipts")
    def count_lines(self, session: Session) -> Iterator[Receipt]:
        """Write a line and find it again: the file may have lines of other runs."""
        mark = time.time_ns()
        self.append({"mark": mark})
        lines, last = 0, b""
        with suppress(OSError), open(self.path, "rb") as file:
            for lines, last in enumerate(file, 1):  # noqa: B007
                pass
        yield Receipt(
            slot="observe",
            claim="hook calls are written down",
            evidence={"path": os.path.abspath(self.path), "lines": lines},
            ok=str(mark).encode() in last,
        )

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **entry}, default=str) + "\n")
        except OSError as error:
            print(f"observe=trace lost a line: {error}", file=sys.stderr)


def _why_not(path: Path) -> str:
    """Return why a file cannot be appended to, or nothing."""
    if path.is_dir():
        return "is a folder"
    if not path.parent.is_dir():
        return f"cannot be made: there is no folder {path.parent}"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "cannot be written: permission denied"
    return ""


def _traced(hook: str) -> Callable[..., Any]:
    """Return a wrapper that times every call of a hook."""

    def wrapper(self: Trace) -> Generator[None, Any, Any]:
        entry: dict[str, Any] = {"hook": hook}
        start = time.perf_counter()
        try:
            return (yield)
        except BaseException as error:
            entry["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.append({**entry, "seconds": time.perf_counter() - start})

    wrapper.__doc__ = f"Time `{hook}`."
    return hookimpl(wrapper=True)(wrapper)


for _name, _value in vars(hookspecs).items():
    if hasattr(_value, "engine_spec"):
        setattr(Trace, _name, _traced(_name))

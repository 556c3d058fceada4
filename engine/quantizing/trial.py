"""Try packed layers on this CPU before a model runs: once for each shape, and remember the verdict.

Operators on packed weights crash, or read other numbers without a word, for some shapes on some
CPUs. No list of these would stay true, so each shape that a model has is tried, in a process of its
own, which may crash: `trying` makes a small layer of that shape and multiplies by it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from threading import Timer
from typing import Any

from engine.quantizing import remembered

LARGEST = 2**24
"""Weights of a layer that is tried as it is. Of a larger one some outputs are left out."""

PERIOD = 1024
"""Outputs are left out by this number: kernels divide them into blocks, the rest is apart."""

PATIENCE = 120.0
"""Seconds without a sign after which a trial is given up."""

CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")
"""Signals by which an operator ends its process; by others somebody else did."""

_paused: ContextVar[bool] = ContextVar("paused", default=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed layer to try."""

    make: str
    """'module:function': called with the options, it gives a `trying.Packed`."""
    library: str
    """Distribution whose operators are tried: another version is tried again."""
    dtype: str
    """Number format of the model: 'float32', 'bfloat16', …"""
    outputs: int
    inputs: int
    options: tuple[tuple[str, Any], ...] = ()
    """Names and values, of types that JSON has."""

    @property
    def tried(self) -> Case:
        """Return what stands for it: of the same inputs, with as many outputs as can be tried."""
        most = max(LARGEST // (self.inputs * PERIOD), 1) * PERIOD
        return replace(self, outputs=min(self.outputs, most + self.outputs % PERIOD))


def cases(
    sizes: Mapping[str, tuple[int, int]],
    dtype: str,
    make: Callable[..., Any],
    library: str,
    **options: Any,
) -> dict[str, Case]:
    """Return what to try of layers that are packed alike.

    Args:
        sizes: layer → its outputs and inputs.
        dtype: number format of the model.
        make: function of a module that gives a `trying.Packed`, called with the options.
        library: distribution whose operators these are.
    """
    return {
        layer: Case(
            make=f"{make.__module__}:{make.__qualname__}",
            library=library,
            dtype=dtype,
            outputs=outputs,
            inputs=inputs,
            options=tuple(sorted(options.items())),
        )
        for layer, (outputs, inputs) in sizes.items()
    }


@contextmanager
def paused() -> Iterator[None]:
    """Start no trials meanwhile: only what is remembered is known."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def faults(layers: Iterable[Case]) -> dict[Case, str]:
    """Try layers on this CPU, or remember what came of it.

    Returns:
        Case → what went wrong with it, '' where nothing did. What could not be tried is absent:
        its library is missing, memory is short, or no process can be started.
    """
    asked = {case: case.tried for case in layers}
    known = remembered.read(asked.values())
    new: Sequence[Case] = [case for case in dict.fromkeys(asked.values()) if case not in known]
    while new and not _paused.get():
        found, new = _attempt(new)
        remembered.add(found)
        known |= found
    return {case: known[tried] for case, tried in asked.items() if tried in known}


def _attempt(cases: Sequence[Case]) -> tuple[dict[Case, str], Sequence[Case]]:
    """Try cases in a new process, up to one that ends it; return what was found, and the rest."""
    found: dict[Case, str] = {}
    at, step = -1, ""
    # Not from the current folder, where anything may lie. What glibc allocates is filled: what a
    # kernel forgets to write is then not what an earlier product left there.
    command = [sys.executable, "-P", "-m", "engine.quantizing.trying"]
    environment = {**os.environ, "MALLOC_PERTURB_": "1"}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return {}, ()
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin:
                json.dump([asdict(case) for case in cases], process.stdin)
            for line in _with_patience(process):
                told = json.loads(line)
                at, step = told["case"], told.get("step", "")
                if "fault" in told:
                    found[cases[at]] = told["fault"]
        except (OSError, ValueError, LookupError):
            pass  # it has ended, or is no such process
        finally:
            process.kill()
    if at < 0:
        return {}, ()
    crash = _crash(process.returncode)
    if cases[at] not in found and crash:
        found[cases[at]] = f"{step} ends the process ({crash})"
    return found, cases[at + 1 :]


def _with_patience(process: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines of a process; end it when it is silent for too long."""
    assert process.stdout is not None
    while True:
        watch = Timer(PATIENCE, process.kill)
        watch.start()
        try:
            line = process.stdout.readline()
        finally:
            watch.cancel()
        if not line.endswith("\n"):
            return
        yield line


def _crash(code: int) -> str:
    """Return by what an operator ended its process; '' where something else did."""
    if code < 0:
        name = signal.Signals(-code).name
        return name if name in CRASHES else ""
    return f"{code:#x}" if code >= 0xC0000000 else ""  # as Windows tells it

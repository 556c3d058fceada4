"""What trials of packed layers have shown on this CPU: kept in a file, a line of JSON for each.

Lines are only ever added, so that two processes can write at once; a damaged one counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.quantizing.trial import Case

VERSION = 1
"""Of how layers are tried: what other ways have shown is forgotten."""

LARGEST = 2**24
"""Bytes at which the file is begun anew: most of it is of versions that are gone."""

CPU = ("model name", "flags", "Features", "CPU implementer", "CPU part", "uarch", "isa", "cpu")
"""Lines of /proc/cpuinfo that tell a kind of CPU, on one architecture or another."""

SWITCHES = ("ATEN_CPU", "ONEDNN_", "DNNL_", "MKL_")
"""Beginnings of environment variables by which libraries choose their kernels."""


def file() -> Path:
    """Return where verdicts are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "engine" / "trials.jsonl"


def read(cases: Iterable[Case]) -> dict[Case, str]:
    """Return what is known of cases on this CPU, with the libraries that are installed."""
    keys = {_key(case): case for case in set(cases)}
    found: dict[Case, str] = {}
    try:
        lines = file().read_text("utf-8", errors="replace").splitlines() if keys else []
    except OSError:
        return {}
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            told = json.loads(line)
            key, fault = told["key"], told["fault"]
            if key in keys and isinstance(fault, str):
                found[keys[key]] = fault
    return found


def add(found: Mapping[Case, str]) -> None:
    """Keep verdicts, where that is possible."""
    place = file()
    lines = [
        json.dumps({"key": _key(case), "fault": fault, "cpu": cpu(), "case": asdict(case)})
        for case, fault in found.items()
    ]
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and place.stat().st_size > LARGEST:
            place.unlink()
        # In one piece, and apart from what a process that was killed left of its last line.
        with place.open("ab", buffering=0) as out:
            out.write("".join(f"\n{line}\n" for line in lines).encode())


def cpu() -> str:
    """Return what the CPU is called."""
    told = _cpu_lines()
    return told.get("model name") or platform.processor() or platform.machine()


@lru_cache(maxsize=16)
def version(distribution: str) -> str:
    """Return the installed version of a distribution; '' where there is none."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return ""


def _key(case: Case) -> str:
    """Return what a verdict holds for: the case, the CPU, and the code that runs on it."""
    switches = {k: v for k, v in os.environ.items() if k.startswith(SWITCHES)}
    versions = [version(name) for name in ("torch", case.library, "recipe-engine")]
    told = [VERSION, asdict(case), platform.machine(), _cpu_lines(), versions, switches]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _cpu_lines() -> Mapping[str, str]:
    found = {"processor": platform.processor()}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            if name in CPU:
                found.setdefault(name, value)
    return found

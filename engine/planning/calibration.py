"""What was measured of this machine: kept in a file, and looked up for the choices of a recipe.

Choices differ in what they take of a machine, so that each combination has figures of its own:
those that decide what runs (`SLOTS`), with the options that do. Where a combination was never
measured, those of plain choices stand in for it, and plugins' estimates tell the difference.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.contexts import UNPACKING
from engine.errors import EngineError
from engine.planning.devices import with_specification
from engine.planning.passes import Pricer
from engine.planning.speed import Rates
from engine.planning.speed import rates as by_the_book
from engine.recipe import Recipe
from engine.target import detect, is_here

SLOTS = ("quantize", "attention", "position_encoding", "cache", "decode")

IGNORED = frozenset({"max_tokens", "max_new_tokens", "stop", "draft", "draft_revision"})
"""Options that change how much is done, and not what runs."""

UNSTEADY = 2.0
"""Spread from which on a machine was too busy for its figures to be relied on."""

TINY, HUGE = 1e-12, 1e21
"""Between these is everything that a machine can show."""

VERSION = 1
"""Of the file's format: figures of another one are forgotten."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured with a model of one size."""

    bytes: int
    """Of its weights."""
    bandwidth: float
    """Bytes per second that a step of one token moves, and unpacks on their way."""
    flops: float
    """Operations per second in the pass of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a machine does with one combination of choices."""

    launch: float
    """Seconds to start an operator, as they are counted in estimates."""
    fixed: float
    """Seconds of every pass beside that."""
    points: tuple[Point, ...]
    """From small to large."""
    reserve: int | None
    """Bytes that the process takes beside its tensors; None where that does not show."""
    retained: float
    """How much memory a byte takes that passes: allocators keep some of what they get back."""
    measured: str
    """Day: year-month-day."""
    spread: float = 1.0
    """How many times as long the slowest turn took as the fastest, of the same work."""

    @property
    def steady(self) -> bool:
        """Tell whether the machine was as fast all the time."""
        return self.spread < UNSTEADY

    def rates(self, *, weights: int, formats: Sequence[str], overlaps: bool, origin: str) -> Rates:
        """Return the rates for a model with so many bytes of weights."""
        flops = self._between(weights, "flops")
        return Rates(
            launch=self.launch,
            bandwidth=self._between(weights, "bandwidth"),
            flops=dict.fromkeys(formats, flops) | {UNPACKING: math.inf},
            overlaps=overlaps,
            fixed=self.fixed,
            reserve=self.reserve,
            retained=self.retained,
            origin=origin,
        )

    def _between(self, size: int, name: str) -> float:
        """Return a figure for a size between those that were measured, by the logarithms."""
        points = [(point.bytes, float(getattr(point, name))) for point in self.points]
        below = [point for point in points if point[0] <= size] or points[:1]
        above = [point for point in points if point[0] >= size] or points[-1:]
        (low, first), (high, second) = below[-1], above[0]
        if low == high or not low <= size <= high:
            return first if size >= low else second
        share = math.log(size / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(first) + share * math.log(second))


FORMATS = ("float32", "bfloat16", "float16", "int8")
"""Number formats that terms name: what was measured of a combination holds for whichever it uses.
"""


def known(pricer: Pricer) -> Pricer:
    """Return a pricer with the rates of its target: measured ones of this machine, or by the book.

    None where the target's speed is not known.
    """
    target, recipe = pricer.target, pricer.recipe
    found, exact = None, False
    asked = recipe.target
    stated = asked.bandwidth_gbs or asked.launch_us or asked.tflops  # figures of the user's own
    if is_here(target) and not stated:
        plain = pricer.prompt(1, 2, 1)
        found, exact = find(recipe, plain.context.dtype or "float32")
    if found is None:
        return dataclasses.replace(pricer, rates=by_the_book(with_specification(target)))
    origin = f"what was measured of this machine on {found.measured}"
    if not found.steady:
        origin += f", when it was busy: turns differed by a factor of {found.spread:.1f}"
    if not exact:
        origin += ", with other choices: `engine calibrate` and the recipe's name measures these"
    measured = found.rates(
        weights=plain.weight_bytes,
        formats=FORMATS,
        overlaps=target.kind != "cpu",
        origin=origin,
    )
    return dataclasses.replace(pricer, rates=measured)


def file() -> Path:
    """Return where the figures of this machine are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "engine" / "calibration.json"


def key(recipe: Recipe, dtype: str) -> str:
    """Return the name of a combination: what decides which code runs, on which libraries."""
    found: dict[str, Any] = {"dtype": dtype}
    for slot in SLOTS:
        plugin = getattr(recipe, slot)
        options = {
            field.name: _plain(getattr(plugin, field.name))
            for field in dataclasses.fields(plugin)
            if field.name not in IGNORED
        }
        kind = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        # How tokens are picked takes nothing beside a pass; how they are guessed does.
        found[slot] = [kind] if slot == "decode" else [kind, options]
    return json.dumps(found, sort_keys=True)


def machine() -> dict[str, Any]:
    """Return what figures hold for: the device, and the libraries that drive it."""
    names = ("torch", "transformers", "recipe-engine")
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "format": VERSION,
        "device": detect().name,
        "host": platform.node(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "versions": versions,
    }


def find(recipe: Recipe, dtype: str) -> tuple[Calibration | None, bool]:
    """Return what was measured for the choices of a recipe, or for plain ones, and which it is."""
    entries = _read(file())
    exact = entries.get(key(recipe, dtype))
    if exact is not None:
        return exact, True
    same = f'"dtype": "{dtype}"'
    plain = [
        entry for name, entry in entries.items() if same in name and "Unquantized" in name
    ]  # fmt: skip
    others = plain or [entry for name, entry in entries.items() if "Unquantized" in name]
    return next(iter(others), None), False


def save(recipe: Recipe, dtype: str, found: Calibration) -> None:
    """Keep what was measured, beside what is there of this machine.

    Raises EngineError when it cannot be written.
    """
    kept = {name: dataclasses.asdict(entry) for name, entry in _read(file()).items()}
    kept[key(recipe, dtype)] = dataclasses.asdict(found)
    _write(kept)


def ensure_writable() -> None:
    """Write the figures that are there once more: before minutes are spent on measuring others.

    Raises EngineError when they cannot be written.
    """
    _write({name: dataclasses.asdict(entry) for name, entry in _read(file()).items()})


def _write(kept: Mapping[str, Any]) -> None:
    place = file()
    fresh = place.with_suffix(f".{os.getpid()}.new")
    text = json.dumps({"machine": machine(), "entries": kept}, indent=1)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text + "\n", encoding="utf-8")
        fresh.replace(place)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise EngineError(
            f"what is measured of this machine cannot be kept: {place}: {error.strerror}",
            hint="keep it elsewhere: XDG_CACHE_HOME=FOLDER",
        ) from error
    _parsed.cache_clear()


def _read(place: Path) -> Mapping[str, Calibration]:
    try:
        changed = place.stat().st_mtime_ns
    except OSError:
        return {}
    return _parsed(place, changed)


@lru_cache(maxsize=4)
def _parsed(place: Path, changed: int) -> Mapping[str, Calibration]:
    """Return the figures of this machine; nothing where they are of another, or unreadable."""
    try:
        content = json.loads(place.read_text("utf-8"))
        if content["machine"] != machine():
            return {}
        entries = dict(content["entries"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    found = {}
    for name, values in entries.items():
        with suppress(ValueError, LookupError, TypeError):  # the others are as good as before
            found[name] = _entry(values)
    return found


def _entry(values: dict[str, Any]) -> Calibration:
    points = tuple(Point(**point) for point in values["points"])
    found = Calibration(**{**values, "points": points})
    rates = [found.launch, *(rate for point in points for rate in (point.bandwidth, point.flops))]
    sizes = [found.retained, found.spread, *(point.bytes for point in points)]
    zeros = [found.fixed, found.reserve or 0]
    if not points or not all(TINY < each < HUGE for each in (*rates, *sizes)):
        raise ValueError("figures that no machine has")
    if not all(0 <= each < HUGE for each in zeros):
        raise ValueError("figures that no machine has")
    return found


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value

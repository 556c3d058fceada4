"""Fit what a machine does in a second to what stand-ins of several sizes showed of it.

What a step of a narrow model takes is starting operators; of two such models the deeper one tells
how long that takes. What a wide model takes more is moving weights, and in the pass of a prompt,
arithmetic.

A GPU moves the weights of a stand-in while operators are started, which then does not show: there
a product by a large matrix tells how fast it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from engine.contexts import UNPACKING
from engine.planning.calibration import Calibration, Point
from engine.planning.passes import Pass

STEPS = 20
"""In which bandwidth and arithmetic are told apart."""


@dataclass(frozen=True)
class Measured:
    """What one stand-in took."""

    prices: Mapping[str, Pass]
    """'prompt', 'token' → what the plan counts in their passes."""
    seconds: Mapping[str, float]
    """The same → medians."""
    least: Mapping[str, float]
    """The same → those of the fastest run."""
    peak_bytes: int
    """In the long prompt's run."""


def fit(
    found: Mapping[str, Measured], names: Sequence[str], reading: float | None = None
) -> Calibration:
    """Return the figures that give back what the stand-ins took.

    Args:
        names: of those that tell bandwidth and arithmetic.
        reading: bytes per second of a device that reads while operators are started.
    """
    launch, fixed = _launching(found["narrow"], found["deep"])
    reserve, retained = None, 1.0  # what an allocator of the device counts is tensors alone
    if reading is None:
        reserve, retained = _memory(found["narrow"], found["wide"])
        points = tuple(_point(found[name], launch, fixed) for name in names)
    else:
        beside = _beside_prompts(found["narrow"], found["deep"])
        points = tuple(_point_of_prompt(found[name], beside, reading) for name in names)
    return Calibration(
        launch=launch,
        fixed=fixed,
        points=points,
        reserve=reserve,
        retained=retained,
        measured=date.today().isoformat(),
    )


def _launching(narrow: Measured, deep: Measured) -> tuple[float, float]:
    """Return the seconds of an operator, and those of a pass beside."""
    ours, theirs = (_work(each.prices["token"])[0] for each in (narrow, deep))
    taken = deep.seconds["token"] - narrow.seconds["token"]
    launch = max(taken / (theirs - ours), 1e-7)
    fixed = narrow.seconds["token"] - launch * ours
    if fixed < 0:  # the machine was slower when it was the deep one's turn
        return deep.seconds["token"] / theirs, 0.0
    return launch, fixed


def _beside_prompts(narrow: Measured, deep: Measured) -> float:
    """Return the seconds of a long prompt's pass that are neither operators' nor the device's.

    Of the fastest runs: of a busy computer's others show that it starts operators more slowly.
    """
    launch, _ = _launching(*(replace(each, seconds=each.least) for each in (narrow, deep)))
    return max(narrow.least["prompt"] - launch * _work(narrow.prices["prompt"])[0], 0.0)


def _point(measured: Measured, launch: float, fixed: float) -> Point:
    """Return bandwidth and arithmetic: two unknowns, of a token's pass and a long prompt's."""
    passes = [(measured.prices[name], measured.seconds[name]) for name in ("token", "prompt")]
    rests = [
        max(seconds - fixed - launch * _work(priced)[0], seconds / 20) for priced, seconds in passes
    ]
    (_, moved, _), (_, _, flops) = (_work(priced) for priced, _ in passes)
    per_byte, per_flop = rests[0] / moved, rests[1] / flops
    for _ in range(STEPS):
        # What one term moves and computes goes on at once: the slower of the two counts.
        (moved, few), (more, flops) = (_slower(priced, per_byte, per_flop) for priced, _ in passes)
        if moved:
            per_byte = max(rests[0] - few * per_flop, rests[0] / 20) / moved
        if flops:
            per_flop = max(rests[1] - more * per_byte, rests[1] / 20) / flops
    return Point(bytes=passes[0][0].weight_bytes, bandwidth=1 / per_byte, flops=1 / per_flop)


def _point_of_prompt(measured: Measured, beside: float, reading: float) -> Point:
    """Return the arithmetic, of a device whose bandwidth is known and that waits for nothing."""
    priced, seconds = measured.prices["prompt"], measured.least["prompt"] - beside
    per_flop = 1e-15
    for _ in range(STEPS):
        moved, flops = _slower(priced, 1 / reading, per_flop)
        per_flop = max(seconds - moved / reading, seconds / 20) / flops
    return Point(bytes=measured.prices["token"].weight_bytes, bandwidth=reading, flops=1 / per_flop)


def _slower(priced: Pass, per_byte: float, per_flop: float) -> tuple[float, float]:
    """Return the bytes of the terms that wait for memory, and the operations of those that do not.

    Args:
        per_byte: seconds to move one.
        per_flop: seconds of an operation.
    """
    moved, flops = 0.0, 0.0
    for term in priced.terms:
        if term.rate == UNPACKING or term.moved * per_byte >= term.flops * per_flop:
            moved += term.moved
        else:
            flops += term.flops
    return moved, flops


def _memory(narrow: Measured, wide: Measured) -> tuple[int, float]:
    """Return what the process takes, and what it keeps of a byte that passes."""
    held = [sum(each.prices["prompt"].held.values()) for each in (narrow, wide)]
    passing = [sum(each.prices["prompt"].passing.values()) for each in (narrow, wide)]
    rest = [each.peak_bytes - size for each, size in zip((narrow, wide), held, strict=True)]
    retained = max((rest[1] - rest[0]) / max(passing[1] - passing[0], 1), 1.0)
    return max(int(rest[0] - retained * passing[0]), 0), retained


def _work(priced: Pass) -> tuple[float, float, float]:
    """Return operators, bytes and operations of a pass."""
    launches = sum(term.launches for term in priced.terms)
    moved = sum(term.moved for term in priced.terms)
    return launches, moved, sum(term.flops for term in priced.terms)

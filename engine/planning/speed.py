"""Turn the work of a pass into seconds, by what the target does in a second.

An accelerator computes while the next operators are started, so that the slower of the two counts;
a CPU does one after the other. Fitted to published rows of transformers (tests/engine/planning).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from engine.contexts import Term
from engine.target import Target

LAUNCH_US = {"cuda": 12.0, "mps": 12.0}
"""Microseconds in which a computer starts an operator of transformers, where the target does not
say: between the desktop and the server of the published rows."""

EFFICIENCY = {"bandwidth": 0.72, "tflops": 0.55}
"""Share of its specification that a device reaches, where the target does not say."""

FIXES = {
    "launches": "starting operators; a larger batch uses the time that the device waits, and so do "
    "compiled steps (decode=compiled cache=static, where `engine check` lets them)",
    "bandwidth": "reading memory; fewer bytes per weight (quantize) or a larger batch help",
    "compute": "arithmetic; a shorter prompt, or a number format that the device computes faster",
}
"""What binds → what that means, and what helps."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second, with the software that runs on it."""

    launch: float
    """Seconds to start an operator."""
    bandwidth: float
    """Bytes moved per second."""
    flops: Mapping[str, float]
    """Number format → operations per second."""
    overlaps: bool
    """Whether operators are started while others run."""
    fixed: float = 0.0
    """Seconds of every pass beside its terms."""
    reserve: int | None = None
    """Bytes that the process takes beside its tensors; None where nobody has measured that."""
    retained: float = 1.0
    """How much memory a byte takes that passes: allocators keep some of what they get back."""
    origin: str = ""
    """Where these figures are from."""


@dataclass(frozen=True)
class Cost:
    """How long a pass takes, and why."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds of 'launches', 'bandwidth' and 'compute', each by itself."""

    @property
    def binds(self) -> str:
        """Return which of the parts is the largest."""
        return max(self.parts, key=lambda part: self.parts[part])


def rates(target: Target) -> Rates | None:
    """Return what a target's specification promises; None where it does not say enough."""
    launch = target.launch_us or LAUNCH_US.get(target.kind)
    if target.bandwidth_gbs is None or launch is None or not target.tflops:
        return None
    share = EFFICIENCY | target.efficiency
    return Rates(
        launch=launch / 1e6,
        bandwidth=target.bandwidth_gbs * 1e9 * share["bandwidth"],
        flops={
            name: tflops * 1e12 * target.efficiency.get(name, share["tflops"])
            for name, tflops in target.tflops.items()
        },
        overlaps=target.kind != "cpu",
        origin=f"the specification of {target.name}",
    )


def cost(found: Rates, terms: Iterable[Term]) -> Cost:
    """Return the seconds of a pass with these terms."""
    launches, moved, computed, other = found.fixed, 0.0, 0.0, 0.0
    slowest = min(found.flops.values())
    for term in terms:
        launches += term.launches * found.launch
        other += term.seconds
        # What one term moves and computes goes on at once.
        moving, computing = term.moved / found.bandwidth, 0.0
        if term.flops:
            computing = term.flops / found.flops.get(term.rate, slowest)
        if moving >= computing:
            moved += moving
        else:
            computed += computing
    device = moved + computed + other
    total = max(launches, device) if found.overlaps else launches + device
    return Cost(total, {"launches": launches, "bandwidth": moved, "compute": computed})

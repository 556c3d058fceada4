"""How far a plan goes is found exactly, and in few passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.planning.planner import _most

CURVES: dict[str, Callable[[int], int]] = {
    "line": lambda n: 1000 + 17 * n,
    "bend": lambda n: 1000 + 17 * n + max(0, 40 * (n - 5000)),
    "square": lambda n: 1000 + n + n * n // 100,
    "steps": lambda n: 1000 + n // 512 * 4096,
    "root": lambda n: int(1000 * n**0.5),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("usable", [10, 1017, 40_000, 1_000_000])
def test_the_most_that_fits_is_found(curve: str, usable: int) -> None:
    needed, farthest = CURVES[curve], 2**20
    most = _most(needed, usable, farthest)
    assert most == 0 or needed(most) <= usable
    assert most == farthest or needed(most + 1) > usable


def test_a_line_takes_a_handful_of_passes() -> None:
    asked: list[int] = []

    def needed(number: int) -> int:
        asked.append(number)
        return 6 * 2**30 + 131_072 * number

    assert _most(needed, 14 * 2**30, 2**27) == 65_536
    assert len(asked) < 12

"""The figures of the guide come out of the shipped shapes, within 3 % but for what is listed."""

from __future__ import annotations

import pytest

from tools import guide

BEYOND = {
    "weights of falcon-40b in bfloat16": 0.034,  # the guide counts 40 billion, by the name
    "peak of OctoCoder in 4 bits (fp4)": 0.032,  # 0.3 % off what tools/gpu_guide.py measured
}
ROUGH = {
    "eager scores of 40 heads, 1,000 tokens, one matrix in bfloat16": 0.080,
    "eager scores of 40 heads, 16,000 tokens, one matrix in bfloat16": 19.07,
    "eager scores of 40 heads, 100,000 tokens, one matrix in bfloat16": 800,
}
"""Figures that the guide rounds to 'around 50 MB' and 'almost 1 TB' → what its formula gives."""


@pytest.mark.parametrize("row", list(guide.rows()), ids=lambda row: row.what)
def test_a_figure_of_the_guide_comes_out(row: guide.Row) -> None:
    if row.what in ROUGH:
        assert row.ours == pytest.approx(ROUGH[row.what], rel=1e-3)
    elif row.unit == "values":
        assert row.ours == row.guide
    elif row.unit == "MB":
        assert 0 < row.ours < row.guide
    else:
        assert abs(row.difference) < BEYOND.get(row.what, 0.03)

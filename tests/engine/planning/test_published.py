"""The latency model gives back what others have published, within 15 %."""

from __future__ import annotations

import pytest

from engine.planning.planner import plan
from engine.recipe import compose
from tests.engine.planning.published import BATCHES, RECIPES, SECONDS, TOKENS

ROWS = [
    (target, model, name, batch, seconds)
    for (target, model), recipes in SECONDS.items()
    for name, row in recipes.items()
    for batch, seconds in zip(BATCHES, row, strict=True)
    if seconds is not None
]


@pytest.mark.parametrize(("target", "model", "name", "batch", "seconds"), ROWS)
def test_a_step_takes_as_long_as_published(
    target: str, model: str, name: str, batch: int, seconds: float
) -> None:
    half = "float16" if target == "t4" or name.startswith("INT8") else "bfloat16"
    words = [
        f"target={target}", f"model={model}", f"model.dtype={half}", *RECIPES[name],
        f"workload.batch={batch}", f"workload.prompt_tokens={TOKENS}",
        f"decode.max_new_tokens={TOKENS}",
    ]  # fmt: skip
    found = plan(compose("base", words)).tokens_per_second
    assert found is not None
    assert batch / found == pytest.approx(seconds, rel=0.15)

"""Building: what only the machine at hand can refuse, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from engine import builder, recipe, verdict
from engine.errors import RecipeError
from engine.target import detect


@dataclass
class Cuda:
    """Run on a GPU only."""

    needs: ClassVar[dict[str, str]] = {"target.cuda": "attention=sdpa"}


@pytest.mark.skipif(detect().kind == "cuda", reason="the machine has what the choice needs")
def test_what_the_target_can_and_this_machine_cannot_is_refused_before_loading(
    model: Callable[[str], Path],
) -> None:
    words = [f"model.path={model('llama')}", "target=h100"]
    made = recipe.compose("base", words)
    made.observe = Cuda()
    steps: list[str] = []
    assert verdict.check(made).ok
    with pytest.raises(RecipeError, match=r"target\.cuda"):
        builder.build(made, progress=steps.append)
    assert not any("loading" in step for step in steps)

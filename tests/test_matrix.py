"""No combination of choices is wrong, late or silent: a part of what `tools/matrix.py` tries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine import registry
from tests import matrix

QUICK = 150


@pytest.mark.parametrize("cell", matrix.sample(QUICK), ids=lambda cell: cell.name)
def test_a_pair_is_right_or_refused(cell: matrix.Cell, model: Callable[[str], Path]) -> None:
    result = matrix.judge(cell, model)
    assert result.verdict in ("right", "refused"), result.why
    assert result.verdict == "right" or result.why


@pytest.mark.parametrize("cell", list(matrix.combos(20)), ids=lambda cell: cell.name)
def test_a_whole_recipe_is_right_or_refused(
    cell: matrix.Cell, model: Callable[[str], Path]
) -> None:
    result = matrix.judge(cell, model)
    assert result.verdict in ("right", "refused"), result.why


def test_every_shipped_choice_is_tried_or_tested_elsewhere() -> None:
    tried = {f"{variant.slot}={variant.choice}" for variant in matrix.variants()}
    shipped = {
        f"{slot}={choice}"
        for slot in matrix.BASE
        for choice, claims in registry.installed()[slot].items()
        if any(claim.distribution.startswith("recipe-engine ") for claim in claims)
    }
    base = {f"{slot}={choice}" for slot, choice in matrix.BASE.items()}
    assert shipped == tried | base | set(matrix.SKIPPED)
    assert not tried & set(matrix.SKIPPED)


def test_a_wrong_answer_is_found(model: Callable[[str], Path]) -> None:
    """Or the tests above would prove nothing."""
    cell = matrix.Cell("llama", ())
    import engine

    words = [f"model.path={model('llama')}", "model.dtype=float32", "decode.max_new_tokens=10"]
    with engine.build(engine.compose("base", words)) as session:
        plain = matrix.Plain(session, cell)
        prompt = list(session.tokenizer(matrix.PROMPTS[0])["input_ids"])
        right = session.generate(matrix.PROMPTS[0]).token_ids
    assert max(plain.gaps(prompt, right)) <= matrix.EXACT
    for place in range(len(right)):
        other = [*right[:place], right[place] + 1, *right[place + 1 :]]
        assert max(plain.gaps(prompt, other)) > 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix._Hand, "windows", [(0, 4, False)])
        assert max(plain.gaps(prompt, right)) > 0.05


def test_changed_weights_are_found(model: Callable[[str], Path]) -> None:
    import engine

    words = [f"model.path={model('llama')}", "model.dtype=float32"]
    with engine.build(engine.compose("base", words)) as session:
        plain = matrix.Plain(session, matrix.Cell("llama", ()))
        assert plain.unlike(model("llama")) == ""
        plain.weights["model.layers.1.mlp.up_proj.weight"].mul_(1.01)
        assert "up_proj" in plain.unlike(model("llama"))

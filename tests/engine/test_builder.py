"""Building: what only the machine at hand can refuse, and who is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine import builder, hookimpl, recipe, verdict
from engine.contexts import Attention, AttentionContext, Receipt
from engine.errors import RecipeError
from engine.session import Session
from engine.target import detect


@dataclass
class Cuda:
    """Run on a GPU only."""

    needs: ClassVar[dict[str, str]] = {"target.cuda": "attention=sdpa"}


@dataclass
class Near:
    """See the last two tokens only, in the way that comes to mind first."""

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Add to the mask function of transformers, and say nothing of skipping."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

        def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return query - key < 2

        def mask(**given: Any) -> Any:
            usual = given.pop("mask_function", causal_mask_function)
            return sdpa_mask(mask_function=and_masks(usual, near), **given)

        forward: Any = sdpa_attention_forward
        return Attention(forward=forward, mask=mask)

    @hookimpl
    def receipts(self, session: Session) -> list[Receipt]:
        """Count calls."""
        calls = session.probe.attention_calls
        return [Receipt(slot="attention", claim="called", evidence={"calls": calls}, ok=calls > 0)]


def test_a_mask_that_could_be_skipped_is_not(model: Callable[[str], Path]) -> None:
    """Or it would hide what it should in padded batches only."""
    words = [f"model.path={model('llama')}", "model.dtype=float32", "decode.max_new_tokens=8"]
    made = recipe.compose("base", words)
    made.attention = Near()
    with builder.build(made) as near, builder.build(recipe.compose("base", words)) as usual:
        prompt = "a prompt without padding"
        alone = near.generate(prompt).token_ids
        assert alone != usual.generate(prompt).token_ids
        assert near.generate(["x", prompt])[1].token_ids == alone


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

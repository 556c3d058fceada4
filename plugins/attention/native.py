"""attention=native: whatever transformers would choose by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.attending.scores import eager
from engine.contexts import Attention, AttentionContext, EstimateContext, Receipt, Term

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class NativeAttention:
    """Leave the model its own default implementation: SDPA where it has that, else eager.

    Position encodings that bias or make the scores are in no model's own code: with one of them
    it is the formula of Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1, in plain torch.
    """

    provides: ClassVar[tuple[str, ...]] = (
        "attention.unchanged",
        "attention.bias",
        "attention.rotation",
        "attention.scores",
    )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price what transformers would choose; positions of other kinds have every score."""
        if costs.special(context) or "model.sdpa" not in context.shape.traits:
            yield from costs.formula(context)
        else:
            yield from costs.fused(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name no implementation, but for a bias or scores, which a model's own may not know."""
        if context.bias is None and context.scores is None:
            return Attention()
        from transformers.masking_utils import eager_mask

        return Attention(forward=eager(context.scores), mask=eager_mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Tell which implementation it was, and that attention ran."""
        fused = session.probe.calls("scaled_dot_product")
        softmax = session.probe.calls("softmax")
        none = "model.attention_free" in session.shape.traits
        yield Receipt(
            slot="attention",
            claim="the model has no attention, and none was chosen"
            if none
            else "attention runs as transformers chose",
            evidence={
                "implementation": str(session.model.config._attn_implementation),
                "fused attention operators": fused,
                "softmax operators": softmax,
            },
            ok=none or fused + softmax > 0,
        )

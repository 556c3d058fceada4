"""attention=eager: matrix product, softmax, matrix product, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.attending.scores import eager
from engine.contexts import (
    Attention,
    AttentionContext,
    CheckContext,
    EstimateContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.rules import Rule

if TYPE_CHECKING:
    from engine.session import Session


FALCON = Rule(
    code="falcon-alibi-eager",
    why="the mask that its code makes for SDPA holds the ALiBi biases, and its eager code adds "
    "them to the scores once more: logits are off by 1 % and more",
    hint="attention=sdpa",
    source="transformers/models/falcon/modeling_falcon.py, FalconAttention.forward",
    seen="transformers 5.23.0, 2026-11-22",
)


@dataclass
class Eager:
    """Compute attention in plain torch operators: runs everywhere, every score is in memory.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1. It is the model's own code; with a
    position encoding that biases or makes the scores, the same formula in the engine's.
    """

    provides: ClassVar[tuple[str, ...]] = (
        "attention.bias",
        "attention.rotation",
        "attention.scores",
    )

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse the one model whose code in transformers is wrong."""
        shape = context.shape
        if shape is not None and shape.model_type == "falcon" and "model.alibi" in shape.traits:
            yield FALCON.problem("attention", "attention=eager is wrong for Falcon with ALiBi")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price every score, in memory."""
        yield from costs.formula(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name transformers' implementation, or give one that takes a bias or other scores."""
        if context.bias is None and context.scores is None:
            return Attention(implementation="eager")
        from transformers.masking_utils import eager_mask

        return Attention(forward=eager(context.scores), mask=eager_mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count softmaxes, and that no fused kernel ran, in the probe."""
        operators = session.probe.operators
        fused = session.probe.calls("scaled_dot_product")
        # _safe_softmax is what SDPA falls back to, so it is no evidence for eager.
        softmax = operators["aten::softmax"] + operators["aten::_softmax"]
        implementation = str(session.model.config._attn_implementation)
        own = session.built["attention"].forward is None
        yield Receipt(
            slot="attention",
            claim="attention is computed in plain torch",
            evidence={
                "implementation": implementation,
                "code": "the model's own" if own else "the engine's",
                "softmax operators": softmax,
                "fused attention operators": fused,
            },
            ok=(implementation == "eager" or not own) and softmax > 0 and fused == 0,
        )

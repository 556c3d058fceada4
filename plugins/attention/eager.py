"""attention=eager: matrix product, softmax, matrix product, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import Attention, AttentionContext, CheckContext, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Eager:
    """Compute attention in plain torch operators: runs everywhere, every score is in memory.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.
    """

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse the one model whose code in transformers is wrong."""
        shape = context.shape
        # The mask that SDPA needs holds the ALiBi biases, and eager adds them to the scores once
        # more: logits are off by 1 % and more (transformers 5.23.0, seen 2026-11-22).
        if shape is not None and shape.model_type == "falcon" and "model.alibi" in shape.traits:
            yield Problem(
                slot="attention",
                code="attention-wrong",
                message="attention=eager is wrong for Falcon with ALiBi: transformers adds the "
                "biases twice",
                hint="attention=sdpa",
            )

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name transformers' implementation, which is the model's own code."""
        return Attention(implementation="eager")

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count softmaxes, and that no fused kernel ran, in the probe."""
        operators = session.probe.operators
        fused = sum(count for name, count in operators.items() if "scaled_dot_product" in name)
        # _safe_softmax is what SDPA falls back to, so it is no evidence for eager.
        softmax = operators["aten::softmax"] + operators["aten::_softmax"]
        implementation = str(session.model.config._attn_implementation)
        yield Receipt(
            slot="attention",
            claim="attention is computed in plain torch",
            evidence={
                "implementation": implementation,
                "softmax operators": softmax,
                "fused attention operators": fused,
            },
            ok=implementation == "eager" and softmax > 0 and fused == 0,
        )

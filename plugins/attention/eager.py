"""attention=eager: matrix product, softmax, matrix product, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import Attention, AttentionContext, Receipt

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Eager:
    """Compute attention in plain torch operators: runs everywhere, every score is in memory.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1.
    """

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

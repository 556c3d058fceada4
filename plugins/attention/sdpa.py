"""attention=sdpa: torch's fused scaled dot product attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import Attention, AttentionContext, CheckContext, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Sdpa:
    """Compute attention with `torch.nn.functional.scaled_dot_product_attention`.

    Torch picks the kernel: flash attention (Dao et al. 2022, arXiv 2205.14135) where it can, so
    the scores never are in memory; its 'math' fallback, in plain operators, where it cannot.
    """

    provides: ClassVar[tuple[str, ...]] = ("attention.bias",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models that transformers has no SDPA for."""
        shape = context.shape
        if shape is not None and "model.sdpa" not in shape.traits:
            why = (
                "it caps attention scores, which torch's SDPA cannot"
                if "model.softcap" in shape.traits
                else "transformers computes its attention in plain torch only"
            )
            yield Problem(
                slot="attention",
                code="attention-unsupported",
                message=f"attention=sdpa does not run {shape.model_type}: {why}",
                hint="attention=eager",
            )

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name transformers' implementation, which brings its own masks."""
        return Attention(implementation="sdpa")

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Name the kernels that ran in the probe, and count them against the layers."""
        operators = session.probe.operators
        kernels = {name: count for name, count in operators.items() if "scaled_dot_product" in name}
        # Torch's fallback shows as _safe_softmax, an operator that nothing but SDPA calls.
        fallback = operators["aten::_safe_softmax"]
        calls = sum(kernels.values()) + (
            0 if "aten::scaled_dot_product_attention" in kernels else fallback
        )
        text = session.model.config.get_text_config()
        types = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
        layers = sum(kind.endswith("attention") and kind != "linear_attention" for kind in types)
        implementation = str(session.model.config._attn_implementation)
        yield Receipt(
            slot="attention",
            claim="every layer's attention is one fused operator",
            evidence={
                "implementation": implementation,
                "kernels": ", ".join(sorted(kernels)) or "math fallback",
                "calls": calls,
                "calls of the math fallback": fallback,
                "layers": layers,
                "forward passes": len(session.probe.tokens),
            },
            ok=implementation == "sdpa" and calls >= layers * len(session.probe.tokens) > 0,
        )

"""attention=window: attend to the nearest tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import Attention, AttentionContext, CheckContext, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from engine.session import Session


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Attention):
    """Forward and mask, and what they write down for the receipt."""

    widest: list[int] = field(default_factory=list)
    """For each call of the forward, the most tokens that any token attended to."""


@dataclass
class Window:
    """Attend to the last `size` tokens only, the token itself included.

    Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """

    size: int = 1024
    provides: ClassVar[tuple[str, ...]] = ("attention.window",)
    engine_api: ClassVar[str] = ">=1,<2"

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a window without tokens, and models that no plugin can bring attention to."""
        if self.size < 1:
            yield Problem(
                slot="attention",
                code="value",
                message=f"attention.size={self.size}: a window holds at least one token",
                hint="attention.size=1024",
            )
        shape = context.shape
        if shape is not None and "model.attention_interface" not in shape.traits:
            yield Problem(
                slot="attention",
                code="attention-unsupported",
                message=f"attention=window cannot replace the attention of {shape.model_type}",
                hint="attention=native",
            )

    @hookimpl
    def attention(self, context: AttentionContext) -> WindowAttention:
        """Give torch's fused attention, and transformers' mask cut down to the window."""
        from torch.nn.functional import scaled_dot_product_attention
        from transformers.masking_utils import (
            and_masks,
            causal_mask_function,
            sdpa_mask,
            sliding_window_overlay,
        )

        near = sliding_window_overlay(self.size)
        widest: list[int] = []

        def mask(*, mask_function: Any = causal_mask_function, **known: Any) -> Tensor:
            # Skipping the mask would leave causal attention, which sees everything.
            known |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return sdpa_mask(mask_function=and_masks(mask_function, near), **known)

        def forward(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
            *, scaling: float | None = None, **_: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            if len(widest) < 100:  # enough for a receipt; this is the token loop
                widest.append(int(attention_mask.sum(-1).max()))
            output = scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            return output.transpose(1, 2).contiguous(), None

        return WindowAttention(forward=forward, mask=mask, widest=widest)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the calls, and the tokens that the masks really let through."""
        widest = session.built["attention"].widest
        yield Receipt(
            slot="attention",
            claim=f"tokens attend to the last {self.size} only",
            evidence={"calls": len(widest), "most tokens attended to": max(widest, default=0)},
            ok=bool(widest) and max(widest) <= self.size,
        )

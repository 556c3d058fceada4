"""attention=nearby: attend to the nearest tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import Attention, AttentionContext, CheckContext, Receipt
from engine.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from engine.session import Session


@dataclass
class Nearby:
    """Attend to the last `size` tokens only, the token itself included.

    Beltagy et al. 2020, arXiv 2004.05150, section 3.1.
    """

    size: int = 64
    """Tokens, the one that looks included."""
    provides: ClassVar[tuple[str, ...]] = ("attention.window",)
    engine_api: ClassVar[str] = ">=1,<2"

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a window that is empty or all there is, and models that take no attention."""
        shape = context.shape
        native = "position_encoding.unchanged" in context.traits  # others may move the limit
        limit = shape.max_positions if shape is not None and native else None
        if self.size < 1:
            yield Problem(
                slot="attention",
                code="value",
                message=f"attention.size={self.size}: a window holds at least one token",
                hint="attention.size=64",
            )
        if limit is not None and self.size >= limit:
            yield Problem(
                slot="attention",
                code="does-nothing",
                message=f"attention.size={self.size} does nothing: the model has {limit} positions",
                hint=f"attention=native, or a smaller window: attention.size={limit // 2}",
            )
        if shape is not None and "model.attention_interface" not in shape.traits:
            yield Problem(
                slot="attention",
                code="attention-unsupported",
                message=f"attention=nearby cannot replace the attention of {shape.model_type}",
                hint="attention=native",
            )

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Give torch's fused attention, and transformers' mask cut down to the window."""
        from torch.nn.functional import scaled_dot_product_attention
        from transformers.masking_utils import (
            and_masks,
            causal_mask_function,
            sdpa_mask,
            sliding_window_overlay,
        )

        near = sliding_window_overlay(self.size)

        def mask(*, mask_function: Any = causal_mask_function, **known: Any) -> Tensor:
            # Skipping the mask would leave causal attention, which sees everything.
            known |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return sdpa_mask(mask_function=and_masks(mask_function, near), **known)

        def forward(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
            *, scaling: float | None = None, **_: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            output = scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            return output.transpose(1, 2).contiguous(), None

        return Attention(forward=forward, mask=mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the calls, and what the mask lets the last of more keys see than the window holds.

        The probe is too short to tell, so the mask is asked itself.
        """
        keys = self.size + 8
        mask = session.built["attention"].mask
        seen = int(mask(batch_size=1, q_length=1, q_offset=keys - 1, kv_length=keys).sum())
        calls = session.probe.attention_calls
        yield Receipt(
            slot="attention",
            claim=f"a token attends to the last {self.size} only",
            evidence={"calls": calls, "keys": keys, "attended": seen},
            ok=calls > 0 and seen == self.size,
        )

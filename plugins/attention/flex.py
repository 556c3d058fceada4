"""attention=flex: torch's flex attention, compiled for the masks that it meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.contexts import Attention, AttentionContext, EstimateContext, Receipt, Term
from engine.rules import Rule

if TYPE_CHECKING:
    import torch

    from engine.session import Session


@dataclass
class Flex:
    """Compute attention with `torch.nn.attention.flex_attention`, compiled by inductor.

    Dong et al. 2024, arXiv 2412.05496: masks are functions, blocks that they hide are skipped, and
    capped scores (Gemma 2) run fused. The first passes compile, for up to a minute.
    """

    needs: ClassVar[Mapping[str, Rule]] = {
        "model.flex": Rule(
            code="flex-model",
            why="transformers has not wired its code to flex attention",
            hint="attention=sdpa",
            source="transformers, _supports_flex_attn of the model's class",
            seen="transformers 5.23.0, 2026-11-22",
        ),
        "target.cuda": Rule(
            code="flex-cpu",
            why="the C++ that inductor writes for CPUs does not compile when a mask has many "
            "sizes, as with padding and sliding windows: it mistakes one size's name for the "
            "beginning of another's",
            hint="attention=sdpa, or attention=eager for capped scores",
            source="torch/_inductor/codegen/cpp_flex_attention_template.py",
            seen="torch 2.13.0, 2026-11-22",
        ),
    }
    excludes: ClassVar[Mapping[str, Rule]] = {
        "cache.static": Rule(
            code="flex-static-cache",
            why="generating with a static cache makes its masks contiguous, which a block mask "
            "cannot be",
            hint="cache=dynamic",
            source="transformers, generation/utils.py: prepare_inputs_for_generation",
            seen="transformers 5.23.0, 2026-11-22",
        ),
    }

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a fused kernel."""
        yield from costs.fused(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Give transformers' forward and block masks, and count how they meet."""
        from transformers.masking_utils import flex_attention_mask

        return Attention(forward=_Counted().forward, mask=flex_attention_mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the calls, and that each got a mask of blocks."""
        used = getattr(session.built["attention"].forward, "__self__", None)
        evidence: dict[str, str | int | float | bool] = {
            "implementation": str(session.model.config._attn_implementation)
        }
        if isinstance(used, _Counted):
            evidence |= {"calls": used.calls, "of them with a block mask": used.blocks}
        yield Receipt(
            slot="attention",
            claim="attention is flex attention, under a mask of blocks",
            evidence=evidence,
            ok=isinstance(used, _Counted) and used.calls == used.blocks > 0,
        )


class _Counted:
    """Transformers' forward, and how often it ran."""

    def __init__(self) -> None:
        self.calls = self.blocks = 0

    def forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call the compiled kernel."""
        import torch
        from torch.nn.attention.flex_attention import BlockMask
        from torch.utils._python_dispatch import _disable_current_modes
        from transformers.integrations.flex_attention import flex_attention_forward

        compute: Any = flex_attention_forward
        if torch.compiler.is_compiling():
            return compute(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
        self.calls += 1
        self.blocks += isinstance(attention_mask, BlockMask)
        # torch compiles nothing while the probe counts operators, and flex attention insists.
        with _disable_current_modes():
            return compute(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]

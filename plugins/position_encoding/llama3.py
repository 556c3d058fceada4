"""position_encoding=llama3: a longer context as Llama 3.1 was given one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import CheckContext, PositionContext, PositionEncoding, Receipt, ReshapeContext
from engine.errors import Problem
from engine.positions import rotary

if TYPE_CHECKING:
    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class Llama3:
    """Divide slow rotary frequencies by `factor`, keep fast ones, and blend those between.

    As Llama 3.1 does (Grattafiori et al. 2024, arXiv 2407.21783; `apply_scaling` in Meta's
    llama-models, and `rope_type: llama3` in transformers). The context becomes `factor` times
    `original_max_position_embeddings` tokens (None: the model's own context). A frequency that
    turns less than `low_freq_factor` times within the original context is slow, one that turns
    more than `high_freq_factor` times is fast. Llama 3.1 was trained on long texts afterwards.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor, self.original_max_position_embeddings)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and limits in the wrong order."""
        if context.shape is not None:
            yield from rotary.refusals("llama3", "llama3", context.shape)
            yield from self._unchanged(context.shape)
        low, original = self.low_freq_factor, self.original_max_position_embeddings
        above = self.high_freq_factor > low
        yield from rotary.outside(
            self,
            rotary.stretch(self.factor, "8"),
            ("low_freq_factor", low > 0, "must be more than 0", "1"),
            ("high_freq_factor", above, "must be more than low_freq_factor", "4"),
            ("original_max_position_embeddings", (original or 1) > 0, "must be above 0", "null"),
        )

    def _unchanged(self, shape: ModelShape) -> Iterator[Problem]:
        """Yield a problem where even the slowest frequency counts as fast, and so stays."""
        original = self.original_max_position_embeddings or shape.max_positions
        slowest = rotary.slowest(shape)
        if original and slowest and slowest * max(self.high_freq_factor, 0) <= original:
            yield Problem(
                slot="position_encoding",
                code="value",
                message=f"position_encoding=llama3 changes nothing: the slowest frequency turns "
                f"once in {slowest:.0f} tokens, more than {self.high_freq_factor:g} times within "
                f"the {original} that {shape.model_type} was made for",
                hint="position_encoding=yarn, or position_encoding.high_freq_factor="
                f"{math.ceil(original / slowest) + 1}",
            )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters of layers that see the whole context."""
        original = self.original_max_position_embeddings or rotary.context_of(context.config)
        config = rotary.edited(
            "llama3",
            context.config,
            {
                "rope_type": "llama3",
                "factor": self.factor,
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
            },
            max_positions=int(original * self.factor),
            original=original,
        )
        return PositionEncoding(config=config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        yield rotary.receipt(session, "slow rotary frequencies are stretched to a longer context")

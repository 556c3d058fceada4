"""position_encoding=yarn: a longer context for a model with rotary positions."""

from __future__ import annotations

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

MOST_TURNS = 1_000_000
"""No frequency turns as often within any context."""


@dataclass
class Yarn:
    """Stretch the rotary frequencies by parts: the slow ones by `factor`, the fast ones not.

    Peng et al. 2023, arXiv 2309.00071: frequencies in section 3.2 ("NTK-by-parts"), temperature of
    the scores in section 3.4. The context becomes `factor` times `original_max_position_embeddings`
    tokens (None: the model's own context). `attention_factor` scales queries and keys; None takes
    the paper's 0.1 ln(factor) + 1. A frequency that turns more than `beta_fast` times within the
    original context stays, one that turns less than `beta_slow` times is divided by `factor`.
    """

    factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor, self.original_max_position_embeddings)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and values outside the paper's ranges."""
        if context.shape is not None:
            yield from rotary.refusals("yarn", "yarn", context.shape)
        original = self.original_max_position_embeddings
        yield from rotary.outside(
            self,
            rotary.stretch(self.factor, "4"),
            ("beta_slow", self.beta_slow > 0, "must be more than 0", "1"),
            (
                "beta_fast",
                self.beta_slow < self.beta_fast <= MOST_TURNS,
                f"must be more than beta_slow, and at most {MOST_TURNS}",
                "32",
            ),
            ("attention_factor", (self.attention_factor or 1) > 0, "must be more than 0", "null"),
            ("original_max_position_embeddings", (original or 1) > 0, "must be above 0", "null"),
        )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters; layers with a sliding window see too little to need it."""
        original = self.original_max_position_embeddings or rotary.context_of(context.config)
        scaled = (
            {} if self.attention_factor is None else {"attention_factor": self.attention_factor}
        )
        config = rotary.edited(
            "yarn",
            context.config,
            {
                "rope_type": "yarn",
                "factor": self.factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                **scaled,
            },
            max_positions=int(original * self.factor),
            original=original,
        )
        return PositionEncoding(config=config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        yield rotary.receipt(session, "slow rotary frequencies are stretched to a longer context")

"""position_encoding=dynamic: rotary positions that stretch only as far as the text is long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    PositionContext,
    PositionEncoding,
    PrepareContext,
    Receipt,
    ReshapeContext,
)
from engine.errors import Problem
from engine.positions import rotary
from engine.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class Dynamic:
    """Raise the rotary base with the length of the text: dynamic NTK.

    Peng et al. 2023, arXiv 2309.00071, section 3.3 ("dynamic scaling") with the base of section 3.1
    ("NTK-aware"): beyond the trained length L, the base of a text of n tokens is multiplied by
    `(alpha * n / L - (alpha - 1)) ** (d / (d - 2))`; up to L it is the trained one. An `alpha` of 1
    is the paper's; None takes `factor`, as transformers does, which stretches further than needed.
    Texts may become `factor` times L long. In a batch, the longest text decides for all.

    Each new token changes the frequencies, and so the keys of all tokens before it: caches, which
    keep keys that were rotated earlier, are refused.
    """

    factor: float = 4.0
    alpha: float | None = None

    provides: ClassVar[tuple[str, ...]] = ("position.varies",)
    needs: ClassVar[dict[str, str | Rule]] = {
        "cache.none": Rule(
            code="dynamic-rope-cache",
            why="cached keys were rotated by the frequencies of a shorter text",
            hint="cache=none, or position_encoding=yarn, whose frequencies never change",
            source="arXiv 2309.00071, section 3.3, and dynamic_frequency_update in "
            "transformers.modeling_rope_utils",
            seen="transformers 5.23.0, 2026-11-22",
        )
    }

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and values that stretch nothing."""
        if context.shape is not None:
            yield from rotary.refusals("dynamic", "dynamic", context.shape)
        yield from rotary.outside(
            self,
            rotary.stretch(self.factor, "4"),
            ("alpha", self.alpha is None or self.alpha >= 1, "must be 1 or more", "null"),
        )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters; the context stays, since the formula reads L there."""
        parameters = {"rope_type": "dynamic", "factor": self._alpha}
        return PositionEncoding(config=rotary.edited("dynamic", context.config, parameters))

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Let each pass compute its own frequencies."""
        rotary.forget_lengths(context.model)
        return context.model

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the frequencies at the end of the new context with the checkpoint's."""
        yield rotary.receipt(
            session,
            "the rotary base rises with the length of the text",
            context=session.shape.max_positions,
        )

    @property
    def _alpha(self) -> float:
        return self.factor if self.alpha is None else self.alpha

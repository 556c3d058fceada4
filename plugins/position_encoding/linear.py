"""position_encoding=linear: a longer context by squeezing positions together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import hookimpl
from engine.contexts import CheckContext, PositionContext, PositionEncoding, Receipt, ReshapeContext
from engine.errors import Problem
from engine.positions import rotary

if TYPE_CHECKING:
    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class Linear:
    """Divide every rotary frequency by `factor`: position interpolation.

    Chen et al. 2023, arXiv 2306.15595, section 2.3. The context becomes `factor` times as long, and
    all positions lie between those that were trained. The paper fine-tunes for up to 1000 steps;
    without that, short texts are predicted worse than before.
    """

    factor: float = 4.0

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and a factor that stretches nothing."""
        if context.shape is not None:
            yield from rotary.refusals("linear", "linear", context.shape)
        yield from rotary.outside(self, rotary.stretch(self.factor, "4"))

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters of layers that see the whole context.

        The context that the config states stays, as transformers asks for; where types of layers
        differ, it is that of the whole model, and becomes longer.
        """
        text: Any = context.config.get_text_config()
        apart = "" not in rotary.by_label(getattr(text, "rope_parameters", None) or {})
        longer = int(rotary.context_of(context.config) * self.factor)
        config = rotary.edited(
            "linear",
            context.config,
            {"rope_type": "linear", "factor": self.factor},
            max_positions=longer if apart else None,
        )
        return PositionEncoding(config=config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        yield rotary.receipt(session, "rotary frequencies are divided, for a longer context")

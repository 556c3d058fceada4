"""position_encoding=native: positions as the checkpoint has them."""

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
)
from engine.errors import Problem
from engine.positions import rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.session import Session


@dataclass
class NativePositions:
    """Leave the position encoding alone."""

    provides: ClassVar[tuple[str, ...]] = ("position_encoding.unchanged",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse rotary positions of a kind that is not known: loading would fail over it."""
        for kind in rotary.unknown_kinds(context.shape) if context.shape is not None else []:
            yield Problem(
                slot="position_encoding",
                code="rope-type",
                message=f"config.json says rope_type={kind}, which transformers does not know",
                hint=f"it knows: default, {', '.join(sorted(rotary.kinds()))}; mend config.json",
            )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Give the config back."""
        return PositionEncoding(config=context.config)

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Let no answer depend on the length of earlier texts, where frequencies do."""
        rotary.forget_lengths(context.model)
        return context.model

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        text = session.model.config.get_text_config()
        source = session.source_config.get_text_config()
        found = rotary.measure(session.model, source)
        same = all(
            getattr(text, name, None) == getattr(source, name, None)
            for name in ("rope_parameters", "max_position_embeddings", "alibi")
        )
        yield Receipt(
            slot="position_encoding",
            claim="positions are encoded as the checkpoint says",
            evidence={
                "inverse frequencies": found.total,
                "of them changed": found.changed,
                "context": rotary.context_of(session.model.config),
            },
            ok=same and found.changed == 0,
        )

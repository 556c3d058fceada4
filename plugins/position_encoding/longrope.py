"""position_encoding=longrope: a longer context by a factor of its own for each frequency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import CheckContext, PositionContext, PositionEncoding, Receipt, ReshapeContext
from engine.errors import Problem
from engine.positions import rotary
from engine.rules import Rule

if TYPE_CHECKING:
    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class LongRope:
    """Divide each rotary frequency by its own of the `long_factor`s, which were found by search.

    Ding et al. 2024, arXiv 2402.13753, section 3.2; the scaling of queries and keys by
    sqrt(1 + ln(factor) / ln(original)) is that of Microsoft's LongRoPE code, and `attention_factor`
    takes its place. One factor per frequency: half of what a head rotates. The context becomes
    `factor` times `original_max_position_embeddings` tokens (None: the model's own context).

    `short_factor` divides the frequencies of texts within the original context (section 3.3); None
    takes the long ones for all texts. With it, frequencies change in the middle of a conversation,
    and caches, which keep keys that were rotated earlier, are refused.
    """

    long_factor: list[float] = field(default_factory=list)
    short_factor: list[float] | None = None
    factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None

    @property
    def provides(self) -> tuple[str, ...]:
        """Say whether frequencies change with the length of the text."""
        return () if self.short_factor in (None, self.long_factor) else ("position.varies",)

    @property
    def needs(self) -> dict[str, Rule]:
        """Return what a change of frequencies asks for."""
        if not self.provides:
            return {}
        return {
            "cache.none": Rule(
                code="longrope-switch-cache",
                why="keys that were cached within the original context were rotated by the short "
                "factors, and queries beyond it are rotated by the long ones",
                hint="position_encoding.short_factor=null, or cache=none",
                source="prepare_inputs_for_generation in transformers' modeling_phi3.py, which "
                "drops the cache there",
                seen="transformers 5.23.0, 2026-11-22",
            )
        }

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor, self.original_max_position_embeddings)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and lists that do not fit the model."""
        half = 0
        if context.shape is not None:
            yield from rotary.refusals("longrope", "longrope", context.shape)
            half = context.shape.rotary_dim // 2
        for name in ("long_factor", "short_factor"):
            given = getattr(self, name)
            if given is not None and (not given or (half and len(given) != half)):
                yield Problem(
                    slot="position_encoding",
                    code="value",
                    message=f"position_encoding.{name} has {len(given)} numbers, and the model "
                    f"has {half or 'more'} rotary frequencies",
                    hint=f"position_encoding.{name}=[…], one number per frequency",
                )
        original = self.original_max_position_embeddings
        numbers = [*self.long_factor, *(self.short_factor or ())]
        large = any(number != 1 for number in self.long_factor or [2])
        positive = all(number > 0 for number in numbers)
        yield from rotary.outside(
            self,
            rotary.stretch(self.factor, "4"),
            ("long_factor", positive and large, "must be above 0, and not all 1", "[…]"),
            ("attention_factor", (self.attention_factor or 1) > 0, "must be more than 0", "null"),
            ("original_max_position_embeddings", (original or 1) > 0, "must be above 0", "null"),
        )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters of layers that see the whole context."""
        original = self.original_max_position_embeddings or rotary.context_of(context.config)
        scaled = (
            {} if self.attention_factor is None else {"attention_factor": self.attention_factor}
        )
        short = self.long_factor if self.short_factor is None else self.short_factor
        config = rotary.edited(
            "longrope",
            context.config,
            {
                "rope_type": "longrope",
                "factor": self.factor,
                "long_factor": list(self.long_factor),
                "short_factor": list(short),
                **scaled,
            },
            max_positions=int(original * self.factor),
            original=original,
        )
        return PositionEncoding(config=config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the frequencies at the end of the new context with the checkpoint's."""
        yield rotary.receipt(session, "each rotary frequency is divided by a factor of its own")

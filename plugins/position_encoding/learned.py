"""position_encoding=learned: a longer context for a model with a learned table of positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.config_keys import POSITIONS
from engine.contexts import (
    CheckContext,
    PositionContext,
    PositionEncoding,
    Receipt,
    ReshapeContext,
)
from engine.errors import Problem, RecipeError
from engine.loading import places
from engine.loading.rewriting import were_rewritten
from engine.positions import position_tables

if TYPE_CHECKING:
    import torch

    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class Learned:
    """Stretch a learned table of positions to `factor` times its rows, by linear interpolation.

    Position m gets the row at m / `factor`, between two rows that were trained: the position
    interpolation of Chen et al. 2023, arXiv 2306.15595, section 2.3, on a table instead of rotary
    angles. The last rows, which have no neighbor above, repeat the last one. Without fine-tuning,
    text of any length is predicted worse than before.
    """

    factor: float = 2.0

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        shape = context.shape
        if shape.max_positions is None or not self._stretches:
            return None
        longer = int(shape.max_positions * self.factor)
        config = shape.configured(POSITIONS, longer)
        return replace(shape, max_positions=longer, config=config)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without a learned table, and a factor that stretches nothing."""
        if context.shape is not None:
            yield from _unsuitable(context.shape.model_type, context.shape.position)
        if not self._stretches:
            yield Problem(
                slot="position_encoding",
                code="value",
                message=f"position_encoding.factor={self.factor} must be a number above 1, or "
                "nothing is stretched",
                hint="position_encoding.factor=2",
            )
            return
        known = context.shape.max_positions if context.shape else None
        if known and int(known * self.factor) == known:
            yield Problem(
                slot="position_encoding",
                code="does-nothing",
                message=f"position_encoding.factor={self.factor} adds no position to {known}",
                hint="position_encoding.factor=2",
            )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Give a config with more positions, and what stretches the table while it loads."""
        text = context.config.get_text_config()
        table = position_tables.find(text.model_type)
        if table is None:
            raise RecipeError(list(_unsuitable(text.model_type, "learned")))

        def rewrite(stored: torch.Tensor, rows: int) -> torch.Tensor:
            return _stretched(stored, rows, table.offset, self.factor)

        longer = int(text.max_position_embeddings * self.factor)
        return PositionEncoding(
            config=position_tables.extended(context.config, longer),
            converters=position_tables.converters(table, rewrite),
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Read the rows of the real table, and recompute them from the checkpoint."""
        source = session.source_config.get_text_config()
        table = position_tables.find(source.model_type)
        assert table is not None
        rows = places.weight(position_tables.module(session, table))
        before = int(source.max_position_embeddings)
        after = rows.shape[0] - table.offset
        evidence: dict[str, str | int | float | bool] = {
            "table": table.name,
            "rows before": before + table.offset,
            "rows after": rows.shape[0],
            "context before": before,
            "context after": after,
        }
        claim = "the model was made with a table of this many rows; there was none to stretch"
        worst = 0.0
        if were_rewritten(session.model, f"{table.name}.weight"):
            claim = "the learned positions are stretched over a longer context"
            stored = position_tables.stored(session, table)
            if stored is not None:
                wanted = _stretched(stored, rows.shape[0], table.offset, self.factor)
                worst = float((wanted.to(rows.dtype) - rows.cpu()).abs().max())
                evidence["largest difference from the checkpoint's, stretched"] = worst
        yield Receipt(
            slot="position_encoding",
            claim=claim,
            evidence=evidence,
            ok=after > before and not worst,
        )

    @property
    def _stretches(self) -> bool:
        return 1 < self.factor < math.inf


def _unsuitable(model_type: str, position: str) -> Iterator[Problem]:
    """Yield why the positions of a model cannot be stretched."""
    why = ""
    if position != "learned":
        why = f"it stretches a learned table, and {model_type} has {position} positions"
    elif position_tables.find(model_type) is None:
        why = f"the code of {model_type} makes no table of exactly the config's positions"
    if why:
        yield Problem(
            slot="position_encoding",
            code="position-unsupported",
            message=f"position_encoding=learned: {why}",
            hint="position_encoding=native",
        )


def _stretched(stored: torch.Tensor, rows: int, offset: int, factor: float) -> torch.Tensor:
    """Interpolate between rows, those before the first position excepted, in float32."""
    import torch

    table = stored[offset:].float()
    places = (torch.arange(rows - offset, dtype=torch.float64) / factor).clamp(max=len(table) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(table) - 1)
    part = (places - below).float().unsqueeze(1)
    new = table[below] * (1 - part) + table[above] * part
    return torch.cat([stored[:offset].float(), new])

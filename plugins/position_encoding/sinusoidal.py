"""position_encoding=sinusoidal: positions by sine and cosine, for as many tokens as wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

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
from engine.families import family
from engine.loading import places
from engine.positions import position_tables

if TYPE_CHECKING:
    import torch

    from engine.session import Session
    from engine.shape import ModelShape

SMALLEST = 16
MOST = 2**24
"""Positions: beyond, float32 cannot tell each from the next."""


@dataclass
class Sinusoidal:
    """Put the sines and cosines of "Attention Is All You Need" in place of a learned table.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5: row m is sin(m / 10000^(2i/d)) at 2i and the
    cosine of the same at 2i + 1, for `max_positions` positions (None: the model's own context). A
    checkpoint was not trained with these rows, and answers nonsense until it is. A model whose own
    sinusoids have no end, as XGLM, keeps them, and gets the context of `max_positions` tokens.
    """

    max_positions: int | None = None

    excludes: ClassVar[dict[str, str]] = {"load.random": "load=transformers"}

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Set the context."""
        if self.max_positions is None or self.max_positions < 1:
            return None
        config = context.shape.configured(POSITIONS, self.max_positions)
        return replace(context.shape, max_positions=self.max_positions, config=config)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models that have neither a learned table nor sinusoids without an end."""
        shape = context.shape
        if shape is not None:
            yield from self._unsuitable(shape.model_type, shape.position, shape.max_positions)
        if self.max_positions is not None and self.max_positions < SMALLEST:
            yield Problem(
                slot="position_encoding",
                code="value",
                message=f"position_encoding.max_positions={self.max_positions}: a prompt and an "
                f"answer do not fit; {SMALLEST} is the least",
                hint="position_encoding.max_positions=4096",
            )
        if self.max_positions is not None and self.max_positions > MOST:
            yield Problem(
                slot="position_encoding",
                code="value",
                message=f"position_encoding.max_positions={self.max_positions}: {MOST} is the most",
                hint="position_encoding.max_positions=4096",
            )

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Give a config with these positions, and what rewrites the table while it loads."""
        text = context.config.get_text_config()
        table = position_tables.find(text.model_type)
        there = int(text.max_position_embeddings)
        position = "sinusoidal" if _is_endless(text.model_type) else "learned"
        if found := list(self._unsuitable(text.model_type, position, there)):
            raise RecipeError(found)
        config = position_tables.extended(context.config, self.max_positions or there)
        if position == "sinusoidal" or table is None:
            return PositionEncoding(config=config)

        def rewrite(stored: torch.Tensor, rows: int) -> torch.Tensor:
            return _sinusoids(rows, stored.shape[1], table.offset)

        return PositionEncoding(
            config=config, converters=position_tables.converters(table, rewrite)
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the rows of the real table with the formula."""
        source = session.source_config.get_text_config()
        before = int(source.max_position_embeddings)
        table = position_tables.find(source.model_type)
        if table is None:
            decoder = cast(Any, session.model).get_decoder()
            modules = [each for each in decoder.modules() if hasattr(each, "make_weights")]
            rows = int(modules[0].weights.shape[0]) - int(modules[0].offset)
            yield Receipt(
                slot="position_encoding",
                claim="the model's own sinusoids reach over a longer context",
                evidence={"context before": before, "positions in the table": rows},
                ok=rows > before,
            )
            return
        weight = places.weight(position_tables.module(session, table)).cpu()
        wanted = _sinusoids(weight.shape[0], weight.shape[1], table.offset).to(weight.dtype)
        differing = int((wanted != weight).any(dim=1).sum())
        yield Receipt(
            slot="position_encoding",
            claim="positions are sines and cosines, with which the checkpoint was not trained",
            evidence={
                "table": table.name,
                "rows": weight.shape[0],
                "rows that differ from the formula": differing,
                "context before": before,
                "context after": weight.shape[0] - table.offset,
            },
            ok=differing == 0,
        )

    def _unsuitable(self, model_type: str, position: str, there: int | None) -> Iterator[Problem]:
        """Yield why a model cannot have these positions."""
        why = ""
        if position == "learned":
            if position_tables.find(model_type) is None:
                why = f"the code of {model_type} makes no table of exactly the config's positions"
        elif position != "sinusoidal":
            why = f"it replaces a learned table, and {model_type} has {position} positions"
        elif not _is_endless(model_type):
            why = f"the code of {model_type} has sinusoids of its own, of a fixed length"
        elif there is not None and (self.max_positions or 0) <= there:
            why = f"{model_type} has sinusoids for {there} tokens already; set max_positions higher"
        if why:
            yield Problem(
                slot="position_encoding",
                code="position-unsupported",
                message=f"position_encoding=sinusoidal: {why}",
                hint="position_encoding=native",
            )


def _is_endless(model_type: str) -> bool:
    """Tell whether the code of a model type computes sinusoids as it needs them, as XGLM does."""
    code = family(model_type).model_code
    return "def make_weights" in code and "LearnedPositional" not in code


def _sinusoids(rows: int, width: int, offset: int) -> torch.Tensor:
    """Return the paper's table `[rows, width]`, float32; rows before the first position are 0."""
    import torch

    position = torch.arange(rows - offset, dtype=torch.float64).unsqueeze(1)
    even = torch.arange(0, width, 2, dtype=torch.float64)
    angle = position / 10000 ** (even / width)
    table = torch.zeros(rows, width, dtype=torch.float64)
    table[offset:, 0::2] = angle.sin()
    table[offset:, 1::2] = angle.cos()[:, : width // 2]
    return table.float()

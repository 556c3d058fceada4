"""quantize=rows: weights in 8 bits, by a quantizer that transformers does not have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    EstimateContext,
    Quantization,
    QuantizeContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.quantizing import packing, pricing, proving

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Rows:
    """Keep the weights of linear layers in 8-bit integers, with a scale per output.

    Zafrir et al. 2019, arXiv 1910.06188 (Q8BERT), section 3, with one scale per row.
    """

    skip_modules: list[str] = field(default_factory=list)
    """Names, ends of names, or expressions of layers to leave alone."""
    provides: ClassVar[tuple[str, ...]] = ("weights.packed",)
    engine_api: ClassVar[str] = ">=1,<2"

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without plain linear layers, and patterns that match none."""
        yield from packing.refusals(
            context, choice="rows", library="torch", extra="all", kinds=["Linear"],
            skip=self.skip_modules,
        )  # fmt: skip

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a byte per weight, and four per row."""

        def pack(rows: int, columns: int, value_bytes: int) -> tuple[int, int]:
            return rows * columns, 4 * rows

        kept = pricing.Packing(bytes=pack, launches=3, unpacked=2 * context.value_bytes)
        yield from pricing.terms(context, kept, kinds=["Linear"], skip=self.skip_modules)

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Register the quantizer for the time of the load, and give its config."""
        from acme_recipes.row_quantizer import NAME, RowConfig, RowQuantizer

        left = packing.left_alone(context.config, "rows", kinds=["Linear"], skip=self.skip_modules)
        forget = packing.register(RowConfig, RowQuantizer, NAME)
        return Quantization(config=RowConfig(left), finish=lambda model: forget())

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count layers and bytes, and hold a layer's answer against its unpacked weight."""
        from acme_recipes.row_quantizer import RowLinear

        modules = session.model.named_modules()
        yield proving.receipt(
            session,
            claim="linear layers are kept in 8 bits",
            packed={name: module for name, module in modules if isinstance(module, RowLinear)},
            parts=lambda module: (module.weight, module.scale),
            plain=lambda module: module.plain(),
            operators=lambda name: name == "aten::mul",
            left=session.built["quantize"].config.left,
            bits=8,
            tolerance=0.01,
        )

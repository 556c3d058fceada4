"""quantize=none: the weights as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    EstimateContext,
    PrepareContext,
    Quantization,
    QuantizeContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.quantizing import libraries, pricing, refusing

if TYPE_CHECKING:
    from engine.session import Session

LAYERS = ("Linear", "Conv1D")
WHO = "the checkpoint, which came packed,"


@dataclass
class Unquantized:
    """Keep the weights in the number format of `model.dtype`."""

    provides: ClassVar[tuple[str, ...]] = ("quantize.unchanged",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a packed checkpoint with layers that this CPU does not multiply rightly."""
        if context.shape is not None and context.shape.quantization:
            packing = context.shape.config.get("quantization_config") or {}
            skip = libraries.left_alone(packing)
            for cases, hint in _trials(packing, context.traits):
                yield from refusing.refuse_known(
                    context, cases, WHO, kinds=LAYERS, skip=skip, hint=hint
                )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the weights, where they are known."""
        yield from pricing.plain(context)

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Change nothing; a checkpoint that comes quantized stays as it is."""
        return Quantization(finish=libraries.keep_packing)

    @hookimpl
    def prepare(self, context: PrepareContext) -> None:
        """Refuse packed layers that this CPU does not multiply rightly."""
        quantizer: Any = getattr(context.model, "hf_quantizer", None)
        if quantizer is not None:
            packing = quantizer.quantization_config.to_dict()
            traits = getattr(context.recipe.decode, "provides", ())
            for cases, hint in _trials(packing, traits):
                refusing.refuse_loaded(context, cases, WHO, skip=None, hint=hint)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """List the number formats of the real tensors."""
        quantizer = getattr(session.model, "hf_quantizer", None)
        asked = getattr(session.source_config, "quantization_config", None) is not None
        dtypes: dict[str, int] = {}
        for tensor in session.model.parameters():
            name = str(tensor.dtype).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + tensor.numel() * tensor.element_size()
        yield Receipt(
            slot="quantize",
            claim="the weights are in the checkpoint's own format"
            if asked
            else "nothing is quantized",
            evidence={f"bytes in {name}": size for name, size in sorted(dtypes.items())}
            | {"quantizer": "none" if quantizer is None else type(quantizer).__name__},
            ok=(quantizer is not None) == asked
            and (asked or all(tensor.is_floating_point() for tensor in session.model.parameters())),
        )


def _trials(
    packing: Mapping[str, Any], traits: Collection[str]
) -> Iterator[tuple[refusing.Cases, str]]:
    """Yield what is to be tried of a packed checkpoint, and what to type where that fails."""
    yield partial(libraries.stated, packing), ""
    if "decode.compiled" in traits:
        yield partial(libraries.stated_compiled, packing), "decode=generate"

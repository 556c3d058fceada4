"""quantize=none: the weights as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import EstimateContext, Quantization, QuantizeContext, Receipt, Term
from engine.quantizing import misread, pricing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.session import Session


@dataclass
class Unquantized:
    """Keep the weights in the number format of `model.dtype`."""

    provides: ClassVar[tuple[str, ...]] = ("quantize.unchanged",)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the weights, where they are known."""
        yield from pricing.plain(context)

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Change nothing; a checkpoint that comes quantized stays as it is."""
        return Quantization(finish=_keep_packing)

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


def _keep_packing(model: PreTrainedModel) -> None:
    """Forbid bitsandbytes to repack the weights of a 4-bit checkpoint when they are first used.

    And refuse one that it would misread: how wide its layers are is not known before. On CPUs with
    AVX512-BF16 it repacks, in place; state_dict and save_pretrained then silently give garbage
    (bitsandbytes 0.50.2, its issue 2078; seen 2026-11-22).
    """
    packed: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    if packed:
        misread.refuse_misread(model, None)
    for module in packed:
        module.support_avx512bf16_for_cpu = False

"""quantize=torchao: weights in 8 bits, in plain torch, which can be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
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
from engine.loading.common import quiet
from engine.quantizing import libraries, packing, pricing, proving, refusing, trial
from engine.tensors import plain_parts

if TYPE_CHECKING:
    from engine.session import Session

LAYERS = ("Linear",)

OPERATORS = 12
"""Of a product, those of its tensor class included."""


class Kind(Enum):
    """What weights are multiplied by what."""

    int8 = "int8"
    """Integers, one scale per output; made plain again for each product."""
    float8 = "float8"
    """8-bit floats (e4m3), one scale per output; made plain again for each product."""
    int8_dynamic = "int8_dynamic"
    """Integers by integers: inputs are quantized too, per token, as they come."""


CONFIGS = {
    Kind.int8: "Int8WeightOnlyConfig",
    Kind.float8: "Float8WeightOnlyConfig",
    Kind.int8_dynamic: "Int8DynamicActivationInt8WeightConfig",
}
"""Kind → class in torchao.quantization."""


@dataclass
class TorchAo:
    """Keep the weights of linear layers in 8 bits with torchao, one scale per output.

    "TorchAO: PyTorch-Native Training-to-Serving Model Optimization", Or et al. 2025,
    arXiv 2507.16099; `int8_dynamic` with a scale per token, as in ZeroQuant, Yao et al. 2022,
    arXiv 2206.01861, section 4. There is no int4 here: torchao 0.18.0 packs that on GPUs only,
    with kernels of another package. `skip_modules` are names, ends of names or expressions of
    layers to leave alone, besides the head, which always is.
    """

    kind: Kind = Kind.int8
    skip_modules: list[str] = field(default_factory=list)
    provides: ClassVar[tuple[str, ...]] = ("weights.packed",)

    @property
    def excludes(self) -> Mapping[str, str]:
        """Name where there are no such numbers."""
        if self.kind is not Kind.float8:
            return {}
        return {"target.mps": "quantize=torchao: the GPU of a Mac has no 8-bit floating point"}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, models without layers that it packs, and idle patterns."""
        refused = list(
            packing.refusals(
                context,
                choice="torchao",
                library="torchao",
                extra="torchao",
                kinds=LAYERS,
                skip=self.skip_modules,
            )
        )
        yield from refused
        for cases, hint in () if refused else self._trials("decode.compiled" in context.traits):
            yield from refusing.refuse_known(
                context, cases, self._who, kinds=LAYERS, skip=self.skip_modules, hint=hint
            )

    @property
    def _who(self) -> str:
        return f"quantize=torchao with quantize.kind={self.kind.value}"

    def _trials(self, compiled: bool) -> Iterator[tuple[refusing.Cases, str]]:
        """Yield what is to be tried of layers on a CPU, and what to type where that fails."""
        config = CONFIGS[self.kind]
        yield partial(trial.cases, make=libraries.torchao, library="torchao", config=config), ""
        if compiled:
            yield partial(libraries.compiled, config=config), "decode=generate"

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price codes and scales, and products by what is unpacked for each."""

        def pack(rows: int, columns: int, value_bytes: int) -> tuple[int, int]:
            # A float32 scale per row; integers have a zero point too, though it is always 0.
            return rows * columns, rows * (4 if self.kind is Kind.float8 else 5)

        size, dynamic = context.value_bytes, self.kind is Kind.int8_dynamic
        kept = pricing.Packing(
            bytes=pack,
            launches=OPERATORS,
            unpacked=0 if dynamic else 2 * size,
            rate="int8" if dynamic else "",
            workspace=lambda tokens, rows, columns: (
                tokens * (columns + 4 * rows) if dynamic else rows * columns * size
            ),
        )
        yield from pricing.terms(context, kept, kinds=LAYERS, skip=self.skip_modules)

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Give transformers' config, with every layer by name that stays as it is."""
        with quiet():
            from torchao import quantization
            from transformers import TorchAoConfig

        # Of kernels that nobody asked for, it tells once more when a product first runs.
        logging.getLogger("torchao").setLevel(logging.ERROR)
        library: Any = quantization
        left = packing.left_alone(context.config, "torchao", kinds=LAYERS, skip=self.skip_modules)
        make: Any = TorchAoConfig
        # Unasked, it would set options of the compiler for the whole process, and for good.
        kind = getattr(library, CONFIGS[self.kind])(set_inductor_config=False)
        return Quantization(config=make(kind, modules_to_not_convert=left))

    @hookimpl
    def prepare(self, context: PrepareContext) -> None:
        """Refuse layers that this CPU does not multiply rightly, where `check` did not know."""
        traits = getattr(context.recipe.decode, "provides", ())
        for cases, hint in self._trials("decode.compiled" in traits):
            refusing.refuse_loaded(context, cases, self._who, skip=self.skip_modules, hint=hint)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count packed layers and their real bytes, and what made or multiplied the values."""
        import torch
        from torchao.utils import TorchAOBaseTensor

        packed = {
            name: module
            for name, module in session.model.named_modules()
            if isinstance(getattr(module, "weight", None), TorchAOBaseTensor)
        }
        codes = {next(plain_parts(module.weight)).dtype for module in packed.values()}
        inputs = {getattr(m.weight, "act_quant_kwargs", None) is not None for m in packed.values()}
        dynamic = self.kind is Kind.int8_dynamic
        wanted = torch.float8_e4m3fn if self.kind is Kind.float8 else torch.int8
        config: Any = session.built["quantize"].config
        yield proving.receipt(
            session,
            claim="linear layers are kept in 8 bits",
            packed=packed,
            parts=lambda module: plain_parts(module.weight),
            plain=lambda module: module.weight.dequantize(),
            # Codes become plain values by a cast; with quantized inputs they are multiplied.
            operators=lambda name: name == ("aten::_int_mm" if dynamic else "aten::_to_copy"),
            left=getattr(config, "modules_to_not_convert", None) or (),
            bits=8,
            tolerance=0.03 if dynamic else 0.01,
            more={
                "codes": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in codes)),
                "inputs quantized": inputs == {True},
            },
            holds=codes == {wanted} and inputs == {dynamic},
        )

"""quantize=quanto: weights in 8 or 4 bits, with optimum-quanto."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

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
from engine.rules import Rule
from engine.tensors import plain_parts

if TYPE_CHECKING:
    import torch

    from engine.session import Session

OPERATORS = 5
"""Of a product, unpacking included."""

# Falcon's own linear layer computes the plain product, so its replacement does the same.
LAYERS = ("Linear", "FalconLinear")

INT4_COMPILED = Rule(
    code="quanto-int4-compiled",
    why="the compiler cannot trace what its bfloat16 kernel keeps weights in",
    hint="model.dtype=float32, quantize.bits=8, or quantize=torchao",
    source="optimum/quanto/tensor/weights/tinygemm/qbits.py",
    seen="optimum-quanto 0.2.7, torch 2.13.0, 2026-11-22",
)

CONVERTED = Rule(
    code="quanto-converted-weights",
    why="transformers hands quanto the first row alone of a weight that was changed while loading",
    hint="heads=native, quantize=torchao or quantize=bitsandbytes",
    source="transformers/integrations/quanto.py, QuantoQuantize.convert",
    seen="transformers 5.23.0, 2026-11-22",
)


@dataclass
class Quanto:
    """Keep the weights of linear layers in 8 or 4 bits with optimum-quanto.

    The method of the guide "Optimizing LLMs for Speed and Memory", section 1, by another library.
    8: one scale per output. 4: a scale and a shift per group of 128 inputs of an output, or of 96,
    64 or 32 where these divide the inputs, or of all. `skip_modules` are names, ends of names or
    expressions of layers to leave alone, besides the head, which always is. Cannot be saved.
    """

    bits: int = 8
    skip_modules: list[str] = field(default_factory=list)
    provides: ClassVar[tuple[str, ...]] = ("weights.packed", "weights.unsavable")
    excludes: ClassVar[dict[str, Rule]] = {"heads.pooled": CONVERTED}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, bits that it has not, and what it cannot pack or compile."""
        if self.bits not in (4, 8):
            message = f"quantize.bits={self.bits}: quantize=quanto has 4 and 8"
            yield Problem(slot="quantize", code="value", message=message, hint="quantize.bits=8")
        yield from packing.refusals(
            context,
            choice="quanto",
            library="optimum.quanto" if find_spec("optimum") else "optimum",
            extra="quanto",
            kinds=LAYERS,
            skip=self.skip_modules,
        )
        compiled = "decode.compiled" in context.traits
        if self.bits == 4 and compiled and context.dtype == "bfloat16":
            what = "quantize=quanto in 4 bits and bfloat16 does not work with decode.compiled"
            yield INT4_COMPILED.problem("quantize", what)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price codes and scales, and products by what is unpacked for each."""

        def pack(rows: int, columns: int, value_bytes: int) -> tuple[int, int]:
            beside = 8  # two scales for inputs and outputs, which are not used, of each layer
            if self.bits == 8:
                return rows * columns, rows * value_bytes + beside
            group = _group(columns)
            groups = rows * columns // group
            # A single row gets a scale and a shift for each of its inputs.
            scales = 2 * (columns if groups == 1 else groups) * value_bytes
            return ceil(groups / 2) * group, scales + beside

        size = context.value_bytes
        kept = pricing.Packing(
            bytes=pack,
            launches=OPERATORS,
            unpacked=2 * size,
            workspace=lambda _, rows, columns: rows * columns * size,
        )
        yield from pricing.terms(context, kept, kinds=LAYERS, skip=self.skip_modules)

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Give transformers' config, with every layer by name that stays as it is."""
        from transformers import QuantoConfig

        if self.bits == 4:
            _unpack_in_torch()
        left = packing.left_alone(context.config, "quanto", kinds=LAYERS, skip=self.skip_modules)
        make: Any = QuantoConfig
        return Quantization(config=make(weights=f"int{self.bits}", modules_to_not_convert=left))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count packed layers and their real bytes, and the operators that used them."""
        from optimum.quanto import QLinear, QTensor

        packed = {
            name: module
            for name, module in session.model.named_modules()
            if isinstance(module, QLinear) and isinstance(module.weight, QTensor)
        }
        formats = {module.weight.qtype.name for module in packed.values()}
        groups: dict[str, int] = {}
        for module in packed.values():
            size = module.weight_group_size or module.in_features
            groups[f"{size}"] = groups.get(f"{size}", 0) + 1
        config: Any = session.built["quantize"].config
        yield proving.receipt(
            session,
            claim=f"linear layers are kept in {self.bits} bits",
            packed=packed,
            parts=_parts,
            plain=lambda module: module.weight.dequantize(),
            operators=lambda name: name.startswith("quanto::") or "int4pack" in name,
            left=getattr(config, "modules_to_not_convert", None) or (),
            bits=self.bits,
            tolerance=0.01,
            more={
                "codes": ", ".join(sorted(formats)),
                "layers by inputs per scale": ", ".join(
                    f"{size}: {count}" for size, count in sorted(groups.items())
                ),
            },
            holds=formats == {f"qint{self.bits}"},
        )


def _group(columns: int) -> int:
    """Return how many inputs share a scale in 4 bits; all, where nothing divides them."""
    if columns > 128:
        return next((size for size in (128, 96, 64, 32) if columns % size == 0), columns)
    return columns


def _parts(module: Any) -> Iterator[torch.Tensor]:
    yield from plain_parts(module.weight)
    yield module.input_scale
    yield module.output_scale


def _unpack_in_torch() -> None:
    """Unpack 4-bit codes by two shifts, for which quanto would compile C++ when first used.

    That takes a compiler and most of a minute, without a word, in the middle of the first answer.
    For the same reason its own CUDA kernels, of float16 only, stay out; torch's are used.
    """
    import torch
    from optimum.quanto.library.extensions import extension

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)])

    for name in ("quanto_cpp", "quanto_cuda"):
        kernels = extension._extensions.get(name)
        if kernels is not None and kernels._lib is None:
            kernels._lib = SimpleNamespace(unpack=unpack)
    extension._extensions.pop("quanto_cuda", None)

"""quantize=quanto: weights in 8 or 4 bits, with optimum-quanto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import ceil
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
from engine.quantizing import libraries, packing, pricing, proving, refusing, trial
from engine.rules import Rule
from engine.tensors import plain_parts

if TYPE_CHECKING:
    import torch

    from engine.quantizing.trial import Case
    from engine.session import Session

OPERATORS = 5
"""Of a product, unpacking included."""

# Falcon's own linear layer computes the plain product, so its replacement does the same.
LAYERS = ("Linear", "FalconLinear")

WHO, INSTEAD = "quantize=quanto in 4 bits", "quantize.bits=8"

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
        refused = list(
            packing.refusals(
                context,
                choice="quanto",
                library="optimum.quanto" if find_spec("optimum") else "optimum",
                extra="quanto",
                kinds=LAYERS,
                skip=self.skip_modules,
            )
        )
        yield from refused
        if self.bits == 4 and not refused:
            yield from refusing.refuse_known(
                context, self._cases, WHO, kinds=LAYERS, skip=self.skip_modules, instead=INSTEAD
            )
        compiled = "decode.compiled" in context.traits
        if self.bits == 4 and compiled and context.dtype == "bfloat16":
            what = "quantize=quanto in 4 bits and bfloat16 does not work with decode.compiled"
            yield INT4_COMPILED.problem("quantize", what)

    def _cases(self, sizes: Mapping[str, tuple[int, int]], dtype: str) -> Mapping[str, Case]:
        """Return what is to be tried of layers on a CPU."""
        found: dict[str, Case] = {}
        for name, size in sizes.items():
            options = {"bits": self.bits, "block": _group(size[1]) if self.bits == 4 else None}
            found |= trial.cases({name: size}, dtype, libraries.quanto, "optimum-quanto", **options)
        return found

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
            libraries.unpack_in_torch()
        left = packing.left_alone(context.config, "quanto", kinds=LAYERS, skip=self.skip_modules)
        make: Any = QuantoConfig
        return Quantization(config=make(weights=f"int{self.bits}", modules_to_not_convert=left))

    @hookimpl
    def prepare(self, context: PrepareContext) -> None:
        """Unpack what this CPU does not multiply rightly in 8 bits, for each product; refuse in 4.

        In 4 bits what unpacks a weight may be the operator that multiplies by it.
        """
        if self.bits == 4:
            refusing.refuse_loaded(
                context, self._cases, WHO, skip=self.skip_modules, instead=INSTEAD
            )
            return
        cases = refusing.loaded(context, self._cases)
        wrong = refusing.failing(cases)
        for name in wrong:
            context.model.get_submodule(name).__class__ = libraries.unpacked_linear()
        if wrong:
            layers = refusing.listed({name: cases[name] for name in wrong}, cases.keys() - wrong)
            context.notes.append(
                f"quantize=quanto unpacks weights for each product in {layers}: on this CPU, when "
                f"it was tried, {refusing.reasons(wrong)}"
            )

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
        unpacked = [name for name, m in packed.items() if type(m) is libraries.unpacked_linear()]
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
                "layers unpacked for each product": len(unpacked),
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

"""quantize=bitsandbytes: weights in 4 or 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING, Any

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
from engine.families import family
from engine.quantizing import libraries, packing, pricing, proving, refusing, trial
from engine.rules import Rule

if TYPE_CHECKING:
    import torch

    from engine.quantizing.trial import Case
    from engine.session import Session
    from engine.shape import ModelShape

LAYERS = ("Linear", "Conv1D")

FUSED_INT4, FUSED_DOUBLE_INT4 = 3.4, 5.4
UNPACKED_INT4, UNPACKED_DOUBLE_INT4 = 7.5, 10.0
INT8, SPLIT_INT8, SPLIT_INT8_OF_MORE = 8.2, 18.5, 20.0
"""Operators of a product: in 4 bits of one token, and of more (scales quantized or not); in 8 bits
without looking for outliers, and with it (of one token, and of more). Fitted to the rows that
bitsandbytes publishes (benchmarking/README.md in its repository, v0.45)."""
UNPACKING = 130.0
"""float32 operations in whose time a GPU unpacks a weight; fitted to the same rows."""
ROUNDING = 40.0
"""Bytes that its plain operators for CPUs move per input and per output, in 8 bits: counted in
bitsandbytes/backends/default/ops.py of bitsandbytes 0.50.2."""
L2_MISSES = 0.8
"""Share of the unpacked weights that goes to memory and back; fitted to the same rows."""

INT8_LATENTS = Rule(
    code="int8-latent-kv",
    why="without a GPU its 8-bit product takes inputs of 3 dimensions at most; latents have 4",
    hint="quantize.skip_modules=[kv_b_proj], or quantize.bits=4",
    source="bitsandbytes/backends/default/ops.py, int8_vectorwise_quant",
    seen="bitsandbytes 0.50.2, 2026-11-22",
)


class QuantType(Enum):
    """Which 16 values four bits stand for."""

    nf4 = "nf4"
    fp4 = "fp4"


class ComputeDtype(Enum):
    """In what 4-bit weights are multiplied."""

    auto = "auto"
    """The model's number format; bfloat16 where that is float32, which would only be slower."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass
class BitsAndBytes:
    """Keep the weights of linear layers in 8 bits, or in 4.

    8: LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, section 3: inputs are rounded too, but
    for columns with an outlier in any token of the pass, so that what goes through the model
    together rounds together. Values are outliers from `outlier_threshold` on; at 0 none are looked
    for, which is faster, and ruins the answers of large models. 4: NormalFloat (`nf4`) or a 4-bit
    float (`fp4`) in blocks of 64 with a scale each, Dettmers et al. 2023, arXiv 2305.14314 (QLoRA),
    section 3; `double_quant` also quantizes the scales. `skip_modules` are names, ends of names or
    patterns of layers to leave alone, besides the head, which always is.
    """

    bits: int = 4
    quant_type: QuantType = QuantType.nf4
    double_quant: bool = False
    compute_dtype: ComputeDtype = ComputeDtype.auto
    outlier_threshold: float = 6.0
    skip_modules: list[str] = field(default_factory=list)

    @property
    def provides(self) -> tuple[str, ...]:
        """Say that weights are packed, and whether outliers are those of a whole pass."""
        by_pass = self.bits == 8 and self.outlier_threshold > 0
        return ("weights.packed", "weights.by_pass") if by_pass else ("weights.packed",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, impossible options and quantizing twice."""
        refused = list(
            packing.refusals(
                context,
                choice="bitsandbytes",
                library="bitsandbytes",
                extra="bitsandbytes",
                kinds=LAYERS,
                skip=self.skip_modules,
            )
        )
        yield from refused
        if context.shape is not None and not refused:
            yield from self._misfits(context.shape, context.traits)
        if self.bits in (4, 8) and not refused:
            yield from refusing.refuse_known(
                context, self._cases, self._who, kinds=LAYERS, skip=self.skip_modules
            )
        if self.bits not in (4, 8):
            message = f"quantize.bits={self.bits}: bitsandbytes has 4 and 8"
            yield Problem(slot="quantize", code="value", message=message, hint="quantize.bits=4")
        if not self.outlier_threshold >= 0:
            message = f"quantize.outlier_threshold={self.outlier_threshold} must be 0 or more"
            hint = "quantize.outlier_threshold=6"
            yield Problem(slot="quantize", code="value", message=message, hint=hint)
        of_4_bits = ("quant_type", "double_quant", "compute_dtype")
        for name in of_4_bits if self.bits == 8 else ("outlier_threshold",):
            value, usual = getattr(self, name), getattr(BitsAndBytes, name)
            if value != usual:
                word, other = getattr(value, "value", value), 12 - self.bits
                yield Problem(
                    slot="quantize",
                    code="does-nothing",
                    message=f"quantize.{name}={str(word).lower()} does nothing in {self.bits} bits",
                    hint=f"quantize.bits={other}",
                )

    @property
    def _who(self) -> str:
        return f"quantize=bitsandbytes in {self.bits} bits"

    def _cases(self, sizes: Mapping[str, tuple[int, int]], dtype: str) -> Mapping[str, Case]:
        """Return what is to be tried of layers on a CPU."""
        make: Any = libraries.bitsandbytes_8_bits
        options: dict[str, Any] = {"threshold": self.outlier_threshold}
        if self.bits == 4:
            make = libraries.bitsandbytes_4_bits
            options = {
                "quant_type": self.quant_type.value,
                "double_quant": self.double_quant,
                "compute_dtype": self._computes_in(dtype),
            }
        return trial.cases(sizes, dtype, make, "bitsandbytes", **options)

    def _computes_in(self, dtype: str) -> str:
        """Return the number format of products in 4 bits, for a model in `dtype`."""
        if self.compute_dtype is ComputeDtype.auto:
            return dtype.replace("float32", "bfloat16")
        return str(self.compute_dtype.value)

    def _misfits(self, shape: ModelShape, traits: frozenset[str]) -> Iterator[Problem]:
        """Refuse layers that its plain operators do not multiply."""
        latent = "def expand_kv(" in family(shape.model_type).model_code
        if self.bits == 8 and "target.cuda" not in traits and latent:
            left = any(packing.matches("self_attn.kv_b_proj", [each]) for each in self.skip_modules)
            if not left:
                what = f"quantize=bitsandbytes in 8 bits does not work with {shape.model_type}"
                yield INT8_LATENTS.problem("quantize", what)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price codes and scales, and the products, by how its kernels on GPUs do them."""
        asked, compute = self.compute_dtype, context.value_bytes
        if self.bits == 4 and (asked is not ComputeDtype.auto or compute == 4):
            compute = 4 if asked is ComputeDtype.float32 else 2
        yield from pricing.terms(
            context,
            self._in_8_bits(context) if self.bits == 8 else self._in_4_bits(context, compute),
            kinds=LAYERS,
            skip=self.skip_modules,
            bias_bytes=compute,  # bitsandbytes casts biases when it first uses them
        )

    def _in_8_bits(self, context: EstimateContext) -> pricing.Packing:
        launches = SPLIT_INT8 if context.rows == 1 else SPLIT_INT8_OF_MORE
        packed = pricing.Packing(
            bytes=lambda rows, columns, _: (rows * columns, 4 * rows),
            launches=launches if self.outlier_threshold else INT8,
            rate="int8",
            # Inputs as codes, sums in 32 bits, and both parts of what they come to.
            workspace=lambda tokens, rows, columns: tokens * (columns + (4 + 2 + 2) * rows),
        )
        if context.target.kind != "cpu":
            return packed
        # Without AVX-512 codes are multiplied as float32 numbers; then the sums come in 32 bits
        # beside their scales, and what these come to twice over.
        return replace(
            packed,
            unpacked=2 * 4,
            rounding=ROUNDING,
            rate="float32",
            workspace=lambda tokens, rows, columns: max(
                4 * rows * columns + tokens * (5 * columns + 8 * rows), 16 * tokens * rows
            ),
        )

    def _in_4_bits(self, context: EstimateContext, compute: int) -> pricing.Packing:
        def size(rows: int, columns: int, _: int) -> tuple[int, int]:
            blocks = ceil(rows * columns / 64)
            # Quantized scales have scales of their own, their 256 values, and what is their mean.
            double = blocks + 4 * (ceil(blocks / 256) + 256 + 1)
            scales = 4 * 16 + (double if self.double_quant else 4 * blocks)
            return ceil(rows * columns / 2), scales

        if context.rows == 1 and context.target.kind == "cuda":  # its kernel unpacks as it goes
            launches = FUSED_DOUBLE_INT4 if self.double_quant else FUSED_INT4
            return pricing.Packing(bytes=size, launches=launches)
        return pricing.Packing(
            bytes=size,
            launches=UNPACKED_DOUBLE_INT4 if self.double_quant else UNPACKED_INT4,
            unpacked=L2_MISSES * 2 * compute,
            flops=UNPACKING,
            workspace=lambda _, rows, columns: rows * columns * compute,
        )

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Give transformers' config, and keep packed weights as they were packed."""
        import torch
        from transformers import BitsAndBytesConfig

        make: Any = BitsAndBytesConfig
        # Before bitsandbytes is imported: it complains of kernels that nobody asked for, and then
        # tells of each 8-bit product that its inputs become float16.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        skip = packing.left_alone(
            context.config, "bitsandbytes", kinds=LAYERS, skip=self.skip_modules
        )
        if self.bits == 8:
            config = make(
                load_in_8bit=True,
                llm_int8_threshold=self.outlier_threshold,
                llm_int8_skip_modules=skip,
            )
            return Quantization(config=config)
        computes_in = self._computes_in(str(context.dtype).removeprefix("torch."))
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type.value,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, computes_in),
            llm_int8_skip_modules=skip,
        )
        return Quantization(config=config, finish=libraries.keep_packing)

    @hookimpl
    def prepare(self, context: PrepareContext) -> None:
        """Refuse layers that this CPU does not multiply rightly, where `check` did not know."""
        refusing.refuse_loaded(context, self._cases, self._who, skip=self.skip_modules)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count packed layers and their real bytes, and the operators that used them."""
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        packed = {
            name: module
            for name, module in session.model.named_modules()
            if isinstance(module, (Linear4bit, Linear8bitLt))
        }
        states = [getattr(module.weight, "quant_state", None) for module in packed.values()]
        state = next(iter(states), None)
        more: dict[str, str | bool] = {}
        if state is not None:
            more = {"values": state.quant_type, "scales quantized": bool(state.nested)}
        config: Any = session.built["quantize"].config
        yield proving.receipt(
            session,
            claim=f"linear layers are kept in {self.bits} bits",
            packed=packed,
            parts=_parts,
            plain=_plain,
            operators=lambda name: name.startswith("bitsandbytes::"),
            left=getattr(config, "llm_int8_skip_modules", None) or (),
            bits=self.bits,
            tolerance=0.03,  # of products in bfloat16, or of inputs in 8 bits
            more=more,
            holds=(state is None) == (self.bits == 8)
            and (state is None or state.quant_type == self.quant_type.value)
            and (state is None or state.nested == self.double_quant),
        )


def _parts(module: Any) -> Iterator[torch.Tensor]:
    """Yield a packed weight and its scales."""
    weight = module.weight
    yield weight.data
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (each for each in (state.absmax, state.code, state.offset) if each is not None)
        state = state.state2
    if hasattr(module, "state"):
        # The scales move from the weight to the layer's state with the first forward pass.
        yield weight.SCB if weight.SCB is not None else module.state.SCB


def _plain(module: Any) -> torch.Tensor:
    """Return the values that a packed weight stands for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    plain: torch.Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    return plain

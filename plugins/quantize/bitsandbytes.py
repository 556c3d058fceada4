"""quantize=bitsandbytes: weights in 4 or 8 bits."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from math import ceil, prod
from typing import TYPE_CHECKING, Any, ClassVar, cast

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    EstimateContext,
    Quantization,
    QuantizeContext,
    Receipt,
    Term,
)
from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.session import Session
    from engine.shape import TensorSize

UNQUANTIZED = re.compile(r"embed|\.wte\.|\.wpe\.|lm_head|output_layer|experts|norm|ln_|vision")
"""Two-dimensional tensors that are no linear layer, or the last one: they stay as they are."""


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

    8: LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, section 3. 4: NormalFloat (`nf4`) or a
    4-bit float (`fp4`) in blocks of 64 with a scale each, Dettmers et al. 2023, arXiv 2305.14314
    (QLoRA), section 3; `double_quant` also quantizes the scales. `skip_modules` are names, ends of
    names or patterns of layers to leave alone, besides the head, which always is.
    """

    bits: int = 4
    quant_type: QuantType = QuantType.nf4
    double_quant: bool = False
    compute_dtype: ComputeDtype = ComputeDtype.auto
    skip_modules: list[str] = field(default_factory=list)
    provides: ClassVar[tuple[str, ...]] = ("weights.packed",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, impossible options and quantizing twice."""
        if find_spec("bitsandbytes") is None:
            message = "quantize=bitsandbytes needs bitsandbytes, which is not installed"
            hint = 'pip install "recipe-engine[bitsandbytes]"'
            yield Problem(slot="quantize", code="not-installed", message=message, hint=hint)
        if self.bits not in (4, 8):
            message = f"quantize.bits={self.bits}: bitsandbytes has 4 and 8"
            yield Problem(slot="quantize", code="value", message=message, hint="quantize.bits=4")
        if self.bits == 8:
            for name in ("quant_type", "double_quant", "compute_dtype"):
                value, usual = getattr(self, name), getattr(BitsAndBytes, name)
                if value != usual:
                    word = getattr(value, "value", value)
                    yield Problem(
                        slot="quantize",
                        code="does-nothing",
                        message=f"quantize.{name}={str(word).lower()} does nothing in 8 bits",
                        hint="quantize.bits=4",
                    )
        quantized = context.shape.quantization if context.shape else None
        if quantized:
            yield Problem(
                slot="quantize",
                code="checkpoint-quantized",
                message=f"the checkpoint is quantized already ({quantized})",
                hint="quantize=none",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price packed and other tensors, where the checkpoint's are known."""
        dtype = context.recipe.model.dtype.value
        tensors = context.shape.tensors
        if tensors:
            sizes = (self._bytes(name, tensor, dtype) for name, tensor in tensors.items())
            yield Term(name="weights", bytes=sum(sizes))

    @hookimpl
    def quantize(self, context: QuantizeContext) -> Quantization:
        """Give transformers' config, and keep packed weights as they were packed."""
        import torch
        from transformers import BitsAndBytesConfig

        make: Any = BitsAndBytesConfig
        # Before bitsandbytes is imported: it complains of kernels that nobody asked for, and then
        # tells of each 8-bit product that its inputs become float16.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        skip = _skipped(context.config, self.skip_modules) if self.skip_modules else None
        if self.bits == 8:
            config = make(load_in_8bit=True, llm_int8_skip_modules=skip)
            return Quantization(config=config, finish=_finish)
        name = self.compute_dtype.value
        if self.compute_dtype is ComputeDtype.auto:
            name = str(context.dtype).removeprefix("torch.").replace("float32", "bfloat16")
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type.value,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, name),
            llm_int8_skip_modules=skip,
        )
        return Quantization(config=config, finish=_finish)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count packed layers and their real bytes, and the operators that used them."""
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        kinds = (Linear4bit, Linear8bitLt)
        linear = [m for m in session.model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        packed = [module for module in linear if isinstance(module, kinds)]
        size = sum(_real_bytes(module) for module in packed)
        before = sum(module.in_features * module.out_features for module in packed)
        operators = session.probe.operators
        ran = Counter({n: c for n, c in operators.items() if n.startswith("bitsandbytes::")})
        evidence: dict[str, str | int | float | bool] = {
            "layers packed": len(packed),
            "linear layers": len(linear),
            "classes": ", ".join(sorted({type(module).__name__ for module in packed})),
            "bytes before": before * session.model.dtype.itemsize,
            "bytes after": size,
            "bits per weight": round(8 * size / before, 3) if before else 0.0,
            "operators": ", ".join(f"{name}: {count}" for name, count in sorted(ran.items())),
        }
        state = getattr(packed[0].weight, "quant_state", None) if packed else None
        if state is not None:
            evidence |= {"values": state.quant_type, "scales quantized": bool(state.nested)}
        yield Receipt(
            slot="quantize",
            claim=f"linear layers are kept in {self.bits} bits",
            evidence=evidence,
            ok=bool(packed)
            and ran.total() > 0
            and self.bits <= 8 * size / before < 2 * self.bits
            and (state is None) == (self.bits == 8)
            and (state is None or state.quant_type == self.quant_type.value)
            and (state is None or state.nested == self.double_quant),
        )

    def _bytes(self, name: str, tensor: TensorSize, dtype: str) -> int:
        """Return what a tensor of the checkpoint will take."""
        numbers = prod(tensor.shape)
        linear = len(tensor.shape) == 2 and name.endswith(".weight")
        skipped = any(re.match(rf"(?:{p})(?=\.|$)", name) or p in name for p in self.skip_modules)
        if not linear or skipped or UNQUANTIZED.search(name):
            return tensor.nbytes if dtype == "auto" else numbers * (4 if dtype == "float32" else 2)
        if self.bits == 8:
            return numbers + 4 * tensor.shape[0]
        blocks = ceil(numbers / 64)
        scales = blocks + 4 * (ceil(blocks / 256) + 256 + 1) if self.double_quant else 4 * blocks
        return ceil(numbers / 2) + scales + 4 * 16


def _skipped(config: PretrainedConfig, patterns: list[str]) -> list[str]:
    """Return the patterns and the layers that are left alone by default, which they replace."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    # A config class that came with the checkpoint was allowed by the recipe, and so is its model.
    trusted = type(config).__module__.startswith("transformers_modules.")
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=trusted)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for pattern in patterns:
        if all(should_convert_module(name, [pattern]) for name in layers):
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise RecipeError(
                f"quantize.skip_modules: no linear layer of {config.model_type} matches {pattern}",
                hint=f"their names end in: {', '.join(ends)}; the first is {layers[0]}",
            )
    return [*get_keys_to_not_convert(model), *patterns]


def _finish(model: PreTrainedModel) -> None:
    """Refuse a model of which nothing was packed, and keep packed weights as they are.

    On CPUs with AVX512-BF16 bitsandbytes would repack them in place at the first forward pass;
    state_dict, save_pretrained and dequantize then silently give garbage (bitsandbytes 0.50.2,
    its issue 2078; seen 2026-11-22).
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
    from torch import nn

    packed = [
        module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))
    ]
    if not packed:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)} - {"Linear"}
        raise RecipeError(
            f"quantize=bitsandbytes found nothing to pack in {type(model).__name__}: transformers "
            f"gives it torch.nn.Linear only, and these layers are {', '.join(kinds) or 'skipped'}",
            hint="quantize=none",
        )
    for module in packed:
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _real_bytes(module: Any) -> int:
    """Return the bytes of a packed weight and of its scales."""
    weight = module.weight
    found: list[torch.Tensor | None] = [weight.data]
    state = getattr(weight, "quant_state", None)
    while state is not None:
        found += [state.absmax, state.code, state.offset]
        state = state.state2
    if hasattr(module, "state"):
        # The scales move from the weight to the layer's state with the first forward pass.
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        found.append(scales)
    return sum(tensor.numel() * tensor.element_size() for tensor in found if tensor is not None)

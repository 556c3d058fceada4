"""How the libraries pack a layer: for trials, and what of a packed checkpoint is to be tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from logging import ERROR, getLogger
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from engine.quantizing import trial
from engine.quantizing.trial import Case
from engine.quantizing.trying import Packed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def packed(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the packed layers of a model that lie on the CPU, with their outputs and inputs."""
    found = {}
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        kind = type(module).__name__
        known = kind in ("Linear4bit", "Linear8bitLt") or hasattr(weight, "__tensor_flatten__")
        if known and hasattr(module, "in_features") and weight.device.type == "cpu":
            layer: Any = module
            found[name] = (layer.out_features, layer.in_features)
    return found


def keep_packing(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack the weights of 4-bit layers when they are first used.

    On CPUs with AVX512-BF16 it repacks, in place; state_dict, save_pretrained and dequantize then
    silently give garbage (bitsandbytes 0.50.2, its issue 2078; seen 2026-11-22).
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def stated(
    quantization: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], dtype: str
) -> dict[str, Case]:
    """Return what to try of the layers of a checkpoint that came packed.

    Nothing where it was packed in another way than those below.

    Args:
        quantization: `quantization_config` of config.json.
        sizes: layer → its outputs and inputs.
        dtype: number format of the model.
    """
    method = _method(quantization)
    if method == "torchao":
        config = _torchao_config(quantization)
        return trial.cases(sizes, dtype, torchao, "torchao", config=config) if config else {}
    if not method.startswith("bitsandbytes"):
        return {}
    if quantization.get("load_in_8bit"):
        threshold = float(quantization.get("llm_int8_threshold", 6.0))
        return trial.cases(sizes, dtype, bitsandbytes_8_bits, "bitsandbytes", threshold=threshold)
    return trial.cases(
        sizes,
        dtype,
        bitsandbytes_4_bits,
        "bitsandbytes",
        quant_type=str(quantization.get("bnb_4bit_quant_type", "fp4")),
        double_quant=bool(quantization.get("bnb_4bit_use_double_quant")),
        compute_dtype=str(quantization.get("bnb_4bit_compute_dtype") or "float32"),
    )


def stated_compiled(
    quantization: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]], dtype: str
) -> dict[str, Case]:
    """Return what to try beside that where steps are compiled; arguments as above."""
    if _method(quantization) != "torchao":
        return {}
    return compiled(sizes, dtype, config=_torchao_config(quantization))


def compiled(sizes: Mapping[str, tuple[int, int]], dtype: str, *, config: str) -> dict[str, Case]:
    """Return what to try of layers of torchao where steps are compiled."""
    if dtype != "bfloat16" or "Int8WeightOnlyConfig" not in config:
        return {}
    return trial.cases(sizes, dtype, torchao_compiled, "torch")


def _method(quantization: Mapping[str, Any]) -> str:
    method = quantization.get("quant_method", "bitsandbytes")
    return str(getattr(method, "value", method))


def _torchao_config(quantization: Mapping[str, Any]) -> str:
    """Return the config of torchao in JSON; '' where it is told in another way."""
    kind = quantization.get("quant_type")
    kind = kind.get("default") if isinstance(kind, Mapping) else None
    return json.dumps(kind, sort_keys=True) if kind else ""


def left_alone(quantization: Mapping[str, Any]) -> list[str]:
    """Return the layers that a packed checkpoint has left alone, as far as it says so."""
    names = ("llm_int8_skip_modules", "modules_to_not_convert")
    return [str(each) for name in names for each in quantization.get(name) or ()]


def bitsandbytes_4_bits(*, quant_type: str, double_quant: bool, compute_dtype: str) -> Packed:
    """Pack with bitsandbytes in 4 bits, as it is used here: without repacking for a CPU."""
    import torch

    library: Any = import_module("bitsandbytes")

    def pack(weight: Tensor) -> nn.Module:
        rows, columns = weight.shape
        dtype = getattr(torch, compute_dtype)
        layer = library.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, device="meta")
        layer.weight = library.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=double_quant,
            quant_type=quant_type,
            module=layer,
        ).to("cpu")
        keep_packing(layer)
        return cast("nn.Module", layer.eval())

    levels = library.functional.get_4bit_type(quant_type, device="cpu").sort().values
    return Packed(pack=pack, levels=levels.tolist(), block=64)


def bitsandbytes_8_bits(*, threshold: float) -> Packed:
    """Pack with bitsandbytes in 8 bits; inputs from `threshold` on are treated apart."""
    getLogger("bitsandbytes").setLevel(ERROR)
    library: Any = import_module("bitsandbytes")

    def pack(weight: Tensor) -> nn.Module:
        rows, columns = weight.shape
        layer = library.nn.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        layer.weight = library.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        ).to("cpu")
        return cast("nn.Module", layer.eval())

    return Packed(pack=pack, levels=_integers(127))


def torchao(*, config: str) -> Packed:
    """Pack with torchao: the name of a config without options, or one in JSON."""

    def pack(weight: Tensor) -> nn.Module:
        from torchao import quantization
        from torchao.core.config import config_from_dict

        library: Any = quantization
        made = config_from_dict(json.loads(config)) if "{" in config else getattr(library, config)()
        layer = _linear(weight)
        library.quantize_(layer, made)
        return layer

    float8 = "Float8" in config
    return Packed(pack=pack, levels=_floats() if float8 else _integers(127))


def torchao_compiled() -> Packed:
    """Pack in 8 bits as torchao does, and multiply as torch's compiler may have it on a CPU.

    It takes a product by integers with a scale per output for `torch._weight_int8pack_mm`
    (`_register_woq_lowerings` in torch/_inductor/fx_passes/quantization.py).
    """
    import torch

    class Product(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.scale = weight.abs().amax(1).float() / 127
            self.codes = (weight.float() / self.scale[:, None]).round().to(torch.int8)

        def forward(self, inputs: Tensor) -> Tensor:
            flat, scale = inputs.reshape(-1, inputs.shape[-1]), self.scale.to(inputs.dtype)
            found = torch._weight_int8pack_mm(flat, self.codes, scale)
            return found.reshape(*inputs.shape[:-1], -1)

    return Packed(pack=Product, levels=_integers(127))


def quanto(*, bits: int, block: int | None) -> Packed:
    """Pack with optimum-quanto; so many weights, or those of a row, share a scale."""

    def pack(weight: Tensor) -> nn.Module:
        from optimum import quanto as library

        unpack_in_torch()
        kind = {4: library.qint4, 8: library.qint8}[bits]
        layer: Any = library.QLinear.from_module(_linear(weight), weights=kind)
        layer.freeze()
        return cast("nn.Module", layer.eval())

    return Packed(pack=pack, levels=_integers(127 if bits == 8 else 7.5), block=block)


@lru_cache(maxsize=1)
def unpacked_linear() -> type[nn.Module]:
    """Return quanto's linear layer, but for its product: that is by the unpacked weight."""
    import torch
    from optimum.quanto import QLinear

    class UnpackedQLinear(QLinear):  # type: ignore[misc]
        """A packed layer that multiplies plainly."""

        def forward(self, inputs: Tensor) -> Tensor:
            """Multiply by the values that the codes stand for."""
            weight: Any = self.weight
            return torch.nn.functional.linear(inputs, weight.dequantize(), self.bias)

    return UnpackedQLinear


def _linear(weight: Tensor) -> nn.Linear:
    import torch

    rows, columns = weight.shape
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _integers(most: float) -> list[float]:
    """Return the values of codes up to `most`, and as many below zero, as shares of it."""
    return [(code - most) / most for code in range(round(2 * most) + 1)]


def _floats() -> list[float]:
    """Return the values of 8-bit floating point numbers (e4m3), as shares of the largest."""
    import torch

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    return (values / values[-1]).tolist()


def unpack_in_torch() -> None:
    """Unpack quanto's 4-bit codes by two shifts, for which it would compile C++ when first used.

    That takes a compiler and most of a minute, without a word, in the middle of the first answer.
    For the same reason its own CUDA kernels, of float16 only, stay out; torch's are used.
    """
    import torch
    from optimum.quanto.library.extensions import extension

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)])

    for name in ("quanto_cpp", "quanto_cuda"):
        kernels = extension._extensions.get(name)
        if kernels is not None and kernels._lib is None:
            kernels._lib = SimpleNamespace(unpack=unpack)
    extension._extensions.pop("quanto_cuda", None)

"""A quantizer for transformers; apart from the plugin, which must not import torch when listed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

NAME = "acme-rows"


class RowConfig(QuantizationConfigMixin):
    """What transformers asks of a quantization: its name, and here the layers left alone."""

    def __init__(self, left: list[str] | None = None, **_: Any) -> None:
        self.quant_method = NAME
        self.left = list(left or ())


class RowLinear(nn.Module):
    """A linear layer with integers for weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes = torch.empty(layer.weight.shape, dtype=torch.int8, device=layer.weight.device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", torch.empty(len(codes), 1, device=layer.weight.device))
        self.bias = layer.bias

    def pack(self, weight: torch.Tensor) -> None:
        """Round `[rows, columns]` to 127 steps up and down, per row."""
        weight = weight.float()
        self.scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def plain(self) -> torch.Tensor:
        """Return the values that the integers stand for, in float32."""
        return self.weight.float() * self.scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply by the plain values."""
        return nn.functional.linear(inputs, self.plain().to(inputs.dtype), self.bias)


class Pack(ConversionOps):
    """Pack each weight as soon as it is read, so that the plain ones are never all in memory."""

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str,
        missing_keys: set[str], **_: Any,
    ) -> dict[str, Any]:  # fmt: skip
        (value,) = input_dict.values()
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        layer.pack(value[0] if isinstance(value, list) else value)
        layer._is_hf_initialized = True
        missing_keys -= {f"{name}.weight", f"{name}.scale"}
        return {}


class RowQuantizer(HfQuantizer):
    """Swap the layers before the weights are read, and pack these while they are."""

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in self.quantization_config.left:
                with torch.device("meta"):
                    model.set_submodule(name, RowLinear(module))

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Tell transformers which tensors to hand to `Pack`."""
        name, _, kind = param_name.rpartition(".")
        return kind == "weight" and isinstance(model.get_submodule(name), RowLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """Give what packs."""
        return Pack()

    def is_serializable(self) -> bool:
        """Say that saved models could not be read again without this package."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Say that integers have no gradients."""
        return False

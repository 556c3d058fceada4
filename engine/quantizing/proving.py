"""Proof that weights are packed: counted, measured and multiplied in the built model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from engine.contexts import Receipt
from engine.quantizing.packing import matches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.session import Session


def receipt(
    session: Session,
    *,
    claim: str,
    packed: Mapping[str, Any],
    parts: Callable[[Any], Iterable[torch.Tensor]],
    plain: Callable[[Any], torch.Tensor],
    operators: Callable[[str], bool],
    left: Collection[str],
    bits: int,
    tolerance: float,
    more: Mapping[str, str | int | float | bool] | None = None,
    holds: bool = True,
) -> Receipt:
    """Count packed layers and their real bytes, and the operators that used them.

    Args:
        packed: layers by name.
        parts: all tensors that stand for the weight of one, scales included.
        plain: gives `[rows, columns]`, the values that the weight of one stands for.
        operators: tells those that work on packed weights from others.
        left: names of layers, and ends of names, that were to be left alone.
        bits: what a weight should take, scales apart.
        tolerance: how far a layer's answer may be from that with plain values, of its size.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = {n: m for n, m in session.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    forgotten = [name for name in linear if name not in packed and not matches(name, left)]
    size = sum(part.nbytes for module in packed.values() for part in parts(module))
    weights = sum(module.in_features * module.out_features for module in packed.values())
    ran = {n: c for n, c in session.probe.operators.items() if operators(n)}
    error = _error(packed.values(), plain, session.model.dtype) if packed else 1.0
    evidence: dict[str, str | int | float | bool] = {
        "layers packed": len(packed),
        "linear layers": len(linear),
        "neither packed nor to be left alone": len(forgotten),
        "classes": ", ".join(sorted({_class(module) for module in packed.values()})),
        "bytes before": weights * session.model.dtype.itemsize,
        "bytes after": size,
        "bits per weight": round(8 * size / weights, 3) if weights else 0.0,
        "operators": ", ".join(f"{name}: {count}" for name, count in sorted(ran.items())),
        "error of a layer against its unpacked weight": float(f"{error:.2g}"),
    }
    if experts := _fused_experts(session.model):
        evidence["bytes of fused experts, which stay as they are"] = experts
    return Receipt(
        slot="quantize",
        claim=claim,
        evidence=evidence | dict(more or {}),
        ok=holds
        and bool(packed)
        and not forgotten
        and error <= tolerance
        and bits <= 8 * size / weights < 2 * bits,
    )


def _error(
    modules: Iterable[Any], plain: Callable[[Any], torch.Tensor], dtype: torch.dtype
) -> float:
    """Return how far the smallest layer's answer is from that of the values it stands for."""
    import torch

    module = min(modules, key=lambda each: each.in_features * each.out_features)
    inputs = torch.arange(4 * module.in_features, device=module.weight.device).sin()
    inputs = inputs.view(4, -1).to(dtype)
    with torch.no_grad():
        expected = inputs.float() @ plain(module).float().T
        found = module(inputs).float() - (0.0 if module.bias is None else module.bias.float())
    return float((found - expected).norm() / expected.norm())


def _class(module: Any) -> str:
    import torch

    kind, tensor = type(module).__name__, type(module.weight.data)
    return kind if tensor is torch.Tensor else f"{kind} of {tensor.__name__}"


def _fused_experts(model: PreTrainedModel) -> int:
    """Return the bytes of experts that are one tensor together, which no library here packs."""
    return sum(
        tensor.nbytes
        for name, tensor in model.named_parameters()
        if tensor.dim() == 3 and ".experts." in name
    )

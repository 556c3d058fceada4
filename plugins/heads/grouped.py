"""heads=grouped: fewer key/value heads than the model was trained with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, Heads, HeadsContext, Receipt, ReshapeContext
from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from transformers.core_model_loading import WeightConverter

    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class GroupedHeads:
    """Pool key/value heads by their mean while loading: MHA becomes GQA, or MQA with one head.

    Ainslie et al. 2023, arXiv 2305.13245, section 2.1. The cache shrinks by the same ratio. The
    paper trains on afterwards ("uptraining"); without that, expect worse answers.
    """

    num_key_value_heads: int = 1
    provides: ClassVar[tuple[str, ...]] = ("heads.pooled",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without separate projections, and numbers that do not divide."""
        shape = context.shape
        if shape is None:
            return
        wanted, there = self.num_key_value_heads, shape.kv_heads
        if "model.split_kv" not in shape.traits:
            yield Problem(
                slot="heads",
                code="heads-unsupported",
                message=f"heads=grouped pools k_proj and v_proj, which {shape.model_type} has not: "
                "its queries, keys and values share one matrix",
                hint="heads=native",
            )
        elif "model.known" in shape.traits and "model.kv_heads" not in shape.traits:
            yield _always_as_many(shape.model_type)
        elif wanted == there:
            yield Problem(
                slot="heads",
                code="does-nothing",
                message=f"heads.num_key_value_heads={wanted} is what the model has already",
                hint="heads=native",
            )
        elif wanted not in _divisors(there):
            fitting = ", ".join(map(str, _divisors(there)[:-1])) or "none"
            yield Problem(
                slot="heads",
                code="value",
                message=f"heads.num_key_value_heads={wanted}: {there} key/value heads do not pool "
                f"into that many; these work: {fitting}",
                hint=f"heads.num_key_value_heads={_nearest(wanted, there)}",
            )
        if shape.quantization:
            yield Problem(
                slot="heads",
                code="checkpoint-quantized",
                message=f"heads=grouped cannot pool weights that are packed ({shape.quantization})",
                hint="heads=native, or the original checkpoint as model.path",
            )

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Keep fewer keys and values per token."""
        shape, wanted = context.shape, self.num_key_value_heads
        if wanted not in _divisors(shape.kv_heads)[:-1]:
            return None
        kept = tuple(values * wanted // shape.kv_heads for values in shape.kv_values)
        return replace(shape, kv_heads=wanted, kv_values=kept)

    @hookimpl
    def heads(self, context: HeadsContext) -> Heads:
        """Give a config with fewer heads, and converters for weights and biases."""
        config = copy.deepcopy(context.config)
        text = config.get_text_config()
        there = getattr(text, "num_key_value_heads", None)
        if not there:
            raise RecipeError(_always_as_many(text.model_type))
        if self.num_key_value_heads not in _divisors(there)[:-1]:
            raise RecipeError(
                f"heads=grouped cannot pool {there} key/value heads into "
                f"{self.num_key_value_heads}",
                hint=f"heads.num_key_value_heads={_nearest(self.num_key_value_heads, there)}",
            )
        text.num_key_value_heads = self.num_key_value_heads
        return Heads(config=config, converters=_converters(_head_dim(text)))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Read the rows of the real projections, and recompute a mean from the checkpoint."""
        import torch

        text = session.model.config.get_text_config()
        model: Any = session.model
        projections = {
            name: module
            for name, module in model.get_decoder().named_modules()
            if name.endswith((".k_proj", ".v_proj"))
        }
        rows = {int(module.out_features) for module in projections.values()}
        evidence: dict[str, str | int | float | bool] = {
            "kv heads before": session.source_config.get_text_config().num_key_value_heads,
            "kv heads after": text.num_key_value_heads,
            "projections": len(projections),
            "rows of each": ", ".join(map(str, sorted(rows))),
        }
        pooled = _were_pooled(session)
        worst = _largest_difference(session, _head_dim(text)) if pooled else None
        if worst is not None:
            evidence["largest difference from the checkpoint's mean"] = worst
        yield Receipt(
            slot="heads",
            claim="key/value heads are means of the checkpoint's"
            if pooled
            else "the model was made with this many key/value heads; there were none to pool",
            evidence=evidence,
            # Not 0: a GPU adds in another order than the CPU that recomputes.
            ok=rows == {self.num_key_value_heads * _head_dim(text)}
            and (worst or 0.0) <= torch.finfo(model.dtype).eps,
        )


def _always_as_many(model_type: str) -> Problem:
    return Problem(
        slot="heads",
        code="heads-unsupported",
        message=f"heads=grouped: the code of {model_type} has as many key/value heads as query "
        "heads, always",
        hint="heads=native",
    )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _nearest(wanted: int, there: int) -> int:
    return min(_divisors(there)[:-1] or [1], key=lambda each: abs(each - wanted))


def _head_dim(text: PretrainedConfig) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _pool(tensor: torch.Tensor, rows: int, head_dim: int) -> torch.Tensor:
    """Average neighboring heads: `[kv_heads * head_dim, …]` → `[rows, …]`, in float32."""
    grouped = tensor.float().reshape(rows // head_dim, -1, head_dim, *tensor.shape[1:])
    return grouped.mean(dim=1).flatten(0, 1).to(tensor.dtype)


def _were_pooled(session: Session) -> bool:
    """Tell weights that came from files, and so went through a conversion, from made up ones."""
    used = getattr(session.model, "_weight_conversions", None) or ()
    return any("k_proj.weight" in conversion.source_patterns for conversion in used)


def _largest_difference(session: Session, head_dim: int) -> float | None:
    """Return how far the first layer's keys and values are from means of the checkpoint's.

    Relative to the largest of them. None where it cannot be told: weights that are packed, on disk,
    or not in safetensors.
    """
    import torch
    from safetensors import safe_open
    from torch import nn

    stored: dict[str, Any] = getattr(session.built["load"], "files", {})
    worst = None
    for kind in (".k_proj", ".v_proj"):
        modules = session.model.named_modules()
        name, layer = next((name, module) for name, module in modules if name.endswith(kind))
        name = f"{name}.weight"
        packed = type(layer) is not nn.Linear or type(layer.weight.data) is not torch.Tensor
        if name not in stored or packed or layer.weight.is_meta:
            return None
        with safe_open(str(stored[name].file), framework="pt") as file:
            tensor = file.get_tensor(name).to(layer.weight.dtype)
        mean = tensor.float().unflatten(0, (layer.out_features // head_dim, -1, head_dim)).mean(1)
        mean = mean.flatten(0, 1).to(layer.weight.dtype)
        distance = (mean - layer.weight.detach().cpu()).abs().max() / mean.abs().max()
        worst = max(worst or 0.0, float(distance))
    return worst


def _converters(head_dim: int) -> list[WeightConverter]:
    """Return what pools k_proj and v_proj while they load, before they are quantized."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Keep(ConversionOps):
        """Save pooled tensors as they are."""

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **known: Any,
        ) -> dict[str, Any]:
            return input_dict

    class Pool(ConversionOps):
        """Average to the rows that the layer has; leave others, such as a vision tower's, alone."""

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **known: Any,
        ) -> dict[str, Any]:
            ((_, (tensor,)),) = input_dict.items()
            layer = known["model"].get_submodule(known["full_layer_name"].rpartition(".")[0])
            rows = layer.out_features
            if rows < tensor.shape[0] and tensor.shape[0] % rows == 0 == rows % head_dim:
                tensor = _pool(tensor, rows, head_dim)
            return {target_patterns[0]: tensor}

        @property
        def reverse_op(self) -> ConversionOps:
            return Keep()

    return [
        WeightConverter(f"{layer}.{part}", f"{layer}.{part}", [Pool()])
        for layer in ("k_proj", "v_proj")
        for part in ("weight", "bias")
    ]

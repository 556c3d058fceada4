"""heads=grouped: fewer key/value heads than the model was trained with."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.config_keys import KV_HEADS
from engine.contexts import CheckContext, Heads, HeadsContext, Receipt, ReshapeContext
from engine.errors import Problem, RecipeError
from engine.families import family
from engine.loading.rewriting import rewriting, were_rewritten
from engine.shape import read_shape

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from transformers.core_model_loading import WeightConverter

    from engine.session import Session
    from engine.shape import ModelShape

ALWAYS = "its code has as many key/value heads as query heads, always"
WIDTHS = 2
"""Keys have one width, and values may have another."""
SHARED = "its {} works on all key/value heads at once, and there is no mean of that"


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
        """Refuse models whose heads cannot be pooled, and numbers that do not divide."""
        shape = context.shape
        if shape is None:
            return
        wanted, there = self.num_key_value_heads, shape.kv_heads
        if why := _unpoolable(shape):
            yield _unsupported(shape.model_type, why)
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
        config = shape.configured(KV_HEADS, wanted)
        return replace(shape, kv_heads=wanted, kv_values=kept, config=config)

    @hookimpl
    def heads(self, context: HeadsContext) -> Heads:
        """Give a config with fewer heads, and converters for weights and biases."""
        config = copy.deepcopy(context.config)
        text = config.get_text_config()
        shape = read_shape(config.to_dict())
        why = _unpoolable(shape) if "model.known" in shape.traits else ""
        for layer, option in _shared_layers(shape.model_type).items():
            if not why and getattr(text, option, False):
                why = SHARED.format(layer)
        if why:
            raise RecipeError(_unsupported(shape.model_type, why))
        wanted, there = self.num_key_value_heads, shape.kv_heads
        if wanted not in _divisors(there)[:-1]:
            raise RecipeError(
                f"heads=grouped cannot pool {there} key/value heads into {wanted}",
                hint=f"heads.num_key_value_heads={_nearest(wanted, there)}",
            )
        text.num_key_value_heads = wanted
        return Heads(config=config, converters=_converters(wanted))

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
            "kv heads before": read_shape(session.source_config.to_dict()).kv_heads,
            "kv heads after": text.num_key_value_heads,
            "projections": len(projections),
            "rows of each": ", ".join(map(str, sorted(rows))),
        }
        pooled = were_rewritten(model, "k_proj.weight")
        heads = self.num_key_value_heads
        worst = _largest_difference(session, heads) if pooled else None
        if worst is not None:
            evidence["largest difference from the checkpoint's mean"] = worst
        yield Receipt(
            slot="heads",
            claim="key/value heads are means of the checkpoint's"
            if pooled
            else "the model was made with this many key/value heads; there were none to pool",
            evidence=evidence,
            # Not 0: a GPU adds in another order than the CPU that recomputes.
            ok=heads * _head_dim(text) in rows
            and not any(each % heads for each in rows)
            and len(rows) <= WIDTHS
            and (worst or 0.0) <= torch.finfo(model.dtype).eps,
        )


def _unsupported(model_type: str, why: str) -> Problem:
    return Problem(
        slot="heads",
        code="heads-unsupported",
        message=f"heads=grouped cannot pool the heads of {model_type}: {why}",
        hint="heads=native",
    )


def _unpoolable(shape: ModelShape) -> str:
    """Return why a model's heads cannot be pooled; '' if they can."""
    kept = {values for values in shape.kv_values if values}
    if "model.latent_kv" in shape.traits:
        return "keys and values of all heads are made from one latent vector (MLA)"
    if "model.split_kv" not in shape.traits:
        return "it has no k_proj and v_proj; queries, keys and values share one matrix"
    if "model.known" in shape.traits and "model.kv_heads" not in shape.traits:
        return ALWAYS
    if not kept:
        return "none of its layers keeps keys and values"
    if len(kept) > 1:
        return "its layers have key/value heads of different numbers or sizes"
    code = family(shape.model_type).model_code
    following = _following(code)
    # Where the language model is another family's, this one's code says nothing about it.
    if "self.k_proj" in code and "AutoModel" not in code and not {"k_proj"} <= following.keys():
        return ALWAYS
    for layer, option in following.items():
        if layer in ("k_proj", "v_proj"):
            continue
        if any(f".{layer}." in name for name in shape.tensors) or not (shape.tensors or option):
            return SHARED.format(layer)
    return ""


def _shared_layers(model_type: str) -> dict[str, str]:
    """Return layers over all key/value heads that a config switches on, and its word for that."""
    following = _following(family(model_type).model_code)
    return {layer: option for layer, option in following.items() if option}


def _following(code: str) -> dict[str, str]:
    """Return the layers whose size follows the number of key/value heads.

    And, where a switch of the config decides whether they are there, its name.
    """
    made = r"^( +)self\.(\w+) = (?:\w+\.)*\w+\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
    found = {}
    for match in re.finditer(made, code, re.MULTILINE):
        indent, name, given = match.groups()
        if "num_key_value_heads" in given:
            outside = rf"^ {{1,{len(indent) - 1}}}(?! )(.*)$"
            *_, above = re.findall(outside, code[: match.start()], re.MULTILINE) or [""]
            switch = re.match(r"if (?:self|config)\.(\w+):", above)
            found[name] = switch[1] if switch else ""
    return found


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _nearest(wanted: int, there: int) -> int:
    return min(_divisors(there)[:-1] or [1], key=lambda each: abs(each - wanted))


def _head_dim(text: PretrainedConfig) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _pool(tensor: torch.Tensor, rows: int, heads: int) -> torch.Tensor:
    """Average neighboring heads: `[kv_heads * head_dim, …]` → `[rows, …]`, in float32."""
    grouped = tensor.float().reshape(heads, -1, rows // heads, *tensor.shape[1:])
    return grouped.mean(dim=1).flatten(0, 1).to(tensor.dtype)


def _largest_difference(session: Session, heads: int) -> float | None:
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
        size = layer.out_features // heads
        mean = tensor.float().unflatten(0, (heads, -1, size)).mean(1)
        mean = mean.flatten(0, 1).to(layer.weight.dtype)
        distance = (mean - layer.weight.detach().cpu()).abs().max() / mean.abs().max()
        worst = max(worst or 0.0, float(distance))
    return worst


def _converters(heads: int) -> list[WeightConverter]:
    """Return what pools k_proj and v_proj while they load, before they are quantized."""

    def pool(tensor: torch.Tensor, layer: Any) -> torch.Tensor:
        rows = layer.out_features
        # Others, such as a vision tower's, have the rows that they had.
        if rows < tensor.shape[0] and tensor.shape[0] % rows == 0 == rows % heads:
            return _pool(tensor, rows, heads)
        return tensor

    layers, parts = ("k_proj", "v_proj"), ("weight", "bias")
    return rewriting([f"{layer}.{part}" for layer in layers for part in parts], pool)

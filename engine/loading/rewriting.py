"""Change weights while they load, by converters of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Change = Callable[["Tensor", Any], "Tensor"]
"""(tensor of the checkpoint, module that gets it) → the tensor that it gets."""


def rewriting(names: Iterable[str], change: Change) -> list[WeightConverter]:
    """Return what changes all tensors whose names end so; what was changed is saved as it is."""
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Keep(ConversionOps):
        """Save a changed tensor as it is."""

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **known: Any,
        ) -> dict[str, Any]:
            return input_dict

    class Rewrite(ConversionOps):
        """Change a tensor."""

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **known: Any,
        ) -> dict[str, Any]:
            ((_, (tensor,)),) = input_dict.items()
            module = known["model"].get_submodule(known["full_layer_name"].rpartition(".")[0])
            return {target_patterns[0]: change(tensor, module)}

        @property
        def reverse_op(self) -> ConversionOps:
            return Keep()

    return [WeightConverter(name, name, [Rewrite()]) for name in names]


def were_rewritten(model: PreTrainedModel, name: str) -> bool:
    """Tell tensors that came from files, and so went through a converter, from made up ones."""
    used = getattr(model, "_weight_conversions", None) or ()
    return any(name in each.source_patterns for each in used)

"""Masks of attention, as `transformers.AttentionMaskInterface` wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from engine.contexts import Bias

Mask = Callable[..., Any]
"""As `transformers.masking_utils.sdpa_mask`: called by keywords; gives `[batch, 1, queries, keys]`,
boolean or additive, or None where nothing is hidden but the future."""


def with_bias(mask: Mask, bias: Bias) -> Mask:
    """Return a mask function that adds a bias: once per forward pass, for all layers.

    What it gives is additive, `[batch, heads, queries, keys]`, in the model's number format.
    """

    def biased(**given: Any) -> torch.Tensor:
        import torch

        # Without the leave to skip, a plain causal mask is None, and there would be nothing to add.
        found = mask(**{**given, "allow_is_causal_skip": False, "allow_torch_fix": False})
        dtype: torch.dtype = given.get("dtype") or torch.float32
        device = found.device
        queries = torch.arange(given["q_length"], device=device) + given["q_offset"]
        keys = torch.arange(found.shape[-1], device=device) + given["kv_offset"]
        added = bias(queries, keys).to(dtype)
        hidden = found.logical_not() if found.dtype is torch.bool else found < 0
        return added.expand(found.shape[0], -1, -1, -1).masked_fill(hidden, torch.finfo(dtype).min)

    return biased

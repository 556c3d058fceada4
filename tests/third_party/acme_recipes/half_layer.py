"""A layer of a cache; apart from the plugin, which must not import torch when it is listed."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class HalfLayer(DynamicLayer):
    """Keep bfloat16, give back what the model computes in."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return everything."""
        new = key_states.bfloat16(), value_states.bfloat16()
        keys, values = super().update(*new, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

"""Masks of attention, as `transformers.AttentionMaskInterface` wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from engine.contexts import Bias

Mask = Callable[..., Any]
"""As `transformers.masking_utils.sdpa_mask`: called by keywords; gives `[batch, 1, queries, keys]`,
boolean or additive, or None where nothing is hidden but the future."""


def never_skipped(mask: Mask) -> Mask:
    """Return a mask function that may not answer None for a pass without padding.

    transformers lets masks be skipped where it sees nothing but the future to hide: what a plugin's
    own mask function hides besides would then be seen, without a word, except in padded batches.
    """

    def whole(**given: Any) -> Any:
        return mask(**{**given, "allow_is_causal_skip": False})

    return whole


def with_bias(mask: Mask, bias: Bias) -> Mask:
    """Return a mask function that adds a bias: once per forward pass, for all layers.

    What it gives is additive, `[batch, heads, queries, keys]`, in the model's number format; a mask
    that is made block by block stays one.
    """

    def biased(**given: Any) -> torch.Tensor:
        import torch

        # A mask that may be skipped is None, and there would be nothing to add.
        found = mask(**{**given, "allow_is_causal_skip": False, "allow_torch_fix": False})
        if not torch.compiler.is_compiling() and isinstance(found, _blockwise()):
            return _blockwise()(given, bias)  # type: ignore[no-any-return]
        return _added(found, bias, given, given.get("dtype") or torch.float32)

    return biased


def by_blocks(rows: int) -> Mask:
    """Return a mask function that makes masks of more than `rows` queries by blocks, when used.

    What it gives then is a tensor that has a shape and no memory: `block_of` makes any part of it,
    and any operator of torch makes all of it.
    """

    def mask(**given: Any) -> torch.Tensor:
        import torch

        if given["q_length"] <= rows or torch.compiler.is_compiling():
            return _visible(given)
        return _blockwise()(given)  # type: ignore[no-any-return]

    return mask


def block_of(mask: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """Return `[batch, heads or 1, rows, columns]` of a mask, boolean (True: seen) or additive."""
    import torch

    if torch.compiler.is_compiling() or not isinstance(mask, _blockwise()):
        return mask[..., rows, columns]
    return mask.block(rows, columns)  # type: ignore[no-any-return]


def seen(mask: torch.Tensor) -> torch.Tensor:
    """Return which pairs a mask leaves to be seen, whether it is boolean or additive."""
    import torch

    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible(given: Mapping[str, Any]) -> torch.Tensor:
    """Return the boolean mask, never skipped."""
    from transformers.masking_utils import sdpa_mask

    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    found: Any = sdpa_mask(**{**given, **whole})
    return found  # type: ignore[no-any-return]


def _added(
    found: torch.Tensor, bias: Bias, given: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    import torch

    device = found.device
    queries = torch.arange(found.shape[-2], device=device) + given["q_offset"]
    keys = torch.arange(found.shape[-1], device=device) + given["kv_offset"]
    added = bias(queries, keys).to(dtype).expand(found.shape[0], -1, -1, -1)
    return added.masked_fill(~seen(found), torch.finfo(dtype).min)


@cache
def _blockwise() -> Any:
    """Return the class of masks without memory: torch is imported when the first one is made."""
    import torch
    from torch.utils._pytree import tree_map_only

    class BlockwiseMask(torch.Tensor):
        """What `sdpa_mask` was asked for. A tensor, since models pass nothing else on."""

        given: Mapping[str, Any]
        bias: Bias | None

        # Results are plain tensors.
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

        @staticmethod
        def __new__(cls: Any, given: Mapping[str, Any], bias: Bias | None = None) -> Any:
            heads, dtype, device = 1, torch.bool, torch.device(given.get("device", "cpu"))
            if bias is not None:
                one = torch.zeros(1, dtype=torch.long, device=device)
                heads, dtype = bias(one, one).shape[1], given.get("dtype") or torch.float32
            shape = (given["batch_size"], heads, given["q_length"], given["kv_length"])
            made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
            made.given, made.bias = given, bias
            return made

        def block(
            self, rows: slice, columns: slice, dtype: torch.dtype = torch.float32
        ) -> torch.Tensor:
            """Make a part, as if it were a mask of its own, further to the right and down.

            In float32 as the scores are: biases of far tokens are large and close together.
            """
            (top, bottom, _), (left, right, _) = (
                each.indices(length)
                for each, length in zip((rows, columns), self.shape[-2:], strict=True)
            )
            given = {
                **self.given,
                "q_length": bottom - top,
                "q_offset": self.given["q_offset"] + top,
                "kv_length": right - left,
                "kv_offset": self.given["kv_offset"] + left,
            }
            found = _visible(given)
            return found if self.bias is None else _added(found, self.bias, given, dtype)

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            def whole(mask: Any) -> torch.Tensor:
                return mask.block(slice(None), slice(None), mask.dtype)  # type: ignore[no-any-return]

            args, kwargs = tree_map_only(cls, whole, (args, kwargs or {}))
            return func(*args, **kwargs)

    return BlockwiseMask

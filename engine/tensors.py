"""Look into tensors: the plain ones that one is made of, and the bytes of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of: codes and scales where it is packed."""
    import torch

    data = tensor.data
    names = getattr(data, "__tensor_flatten__", None)
    if type(data) is torch.Tensor or names is None:
        yield data.as_subclass(torch.Tensor)
        return
    for name in names()[0]:
        yield from plain_parts(getattr(data, name))


def raw(tensor: Tensor) -> bytes:
    """Return the numbers of a plain tensor, bit for bit."""
    import torch

    found = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return found.numpy().tobytes()

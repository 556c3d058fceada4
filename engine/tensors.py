"""Look into tensors: the plain ones that one is made of, and the bytes of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

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
    return _buffer(tensor).tobytes()


def _buffer(tensor: Tensor) -> memoryview:
    """Return them without a copy, where the tensor is on the CPU and contiguous."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digests(
    values: Mapping[str, Any], fetch: Callable[[str, Any], Any] = lambda name, value: value
) -> dict[str, str]:
    """Return for each tensor a digest of its kind and all of its bytes; several at a time.

    Of a tensor that is made of others, of all its parts; of what is no tensor, its `repr`.

    Args:
        fetch: gives a value's numbers where they wait elsewhere.
    """
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        found = pool.map(lambda name: _digest(fetch(name, values[name])), values)
        return dict(zip(values, found, strict=True))


def _digest(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(value)
    return " ".join(
        f"{part.dtype} {list(part.shape)} {hashlib.sha256(_buffer(part)).hexdigest()}"
        for part in plain_parts(value)
    )

"""Layers with faults of every kind, to be tried."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.quantizing.trying import Packed

if TYPE_CHECKING:
    from torch import Tensor, nn

Spoil = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(inputs `[1, rows, inputs]`, weight `[outputs, inputs]`, the right outputs) → outputs."""


def _packed(spoil: Spoil) -> Packed:
    """Return layers that multiply rightly, and then do what `spoil` does, in one operator."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.held = weight

        def forward(self, inputs: Tensor) -> Tensor:
            _SPOIL[:] = [spoil]
            found: Tensor = _product()(inputs, self.held)
            return found

    made: Callable[[Tensor], nn.Module] = Layer
    return Packed(pack=made)


_SPOIL: list[Spoil] = []


@lru_cache(maxsize=1)
def _product() -> Any:
    """Return an operator of torch's, whose operands are placed like those of any."""
    import torch

    def product(inputs: Tensor, weight: Tensor) -> Tensor:
        return _SPOIL[0](inputs, weight, inputs.detach() @ weight.detach().T)

    torch_library: Any = torch.library
    _LIBRARIES.append(torch_library.Library("tests", "FRAGMENT"))
    _LIBRARIES[0].define("product(Tensor inputs, Tensor weight) -> Tensor")
    _LIBRARIES[0].impl("product", product, "CPU")
    return torch.ops.tests.product.default


_LIBRARIES: list[Any] = []


def right() -> Packed:
    """Multiply rightly."""
    return _packed(lambda inputs, weight, found: found)


def wrong(*, rows: int) -> Packed:
    """Compute one wrong number, the last, for so many rows."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        if inputs.shape[1] == rows:
            found[..., -1] *= 1.5
        return found

    return _packed(spoil)


def neighbour() -> Packed:
    """Multiply by the scale of the row before."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        scales = weight.abs().amax(1)
        return found / scales * scales.roll(1)

    return _packed(spoil)


def ends(*, by: str, rows: int = 1) -> Packed:
    """End the process by a signal, for so many rows."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        if inputs.shape[1] == rows:
            os.kill(os.getpid(), signal.Signals[by])
        return found

    return _packed(spoil)


def reads_on(*, operand: str, beyond: int) -> Packed:
    """Read beyond an operand and do nothing with it: which most often goes well.

    Args:
        beyond: bytes after those that belong to it, since memory comes in pieces of 64.
    """

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        read = inputs if operand == "inputs" else weight
        ctypes.string_at(read.data_ptr(), -(read.nbytes // -64) * 64 + beyond)
        return found

    return _packed(spoil)


def adds_what_follows() -> Packed:
    """Add the number behind the inputs, which is in the memory that they have been given."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        behind = ctypes.string_at(inputs.data_ptr() + inputs.nbytes, inputs.itemsize)
        import torch

        return found + torch.frombuffer(bytearray(behind), dtype=inputs.dtype)

    return _packed(spoil)


def forgets_to_write() -> Packed:
    """Leave the last output as the memory had it."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        written = found.new_empty(found.shape)
        written[..., :-1] = found[..., :-1]
        return written

    return _packed(spoil)


def raises() -> Packed:
    """Refuse."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        raise NotImplementedError("not for this CPU\nand more")

    return _packed(spoil)


def needs_another_library() -> Packed:
    """Fail for a reason that says nothing of the CPU."""
    raise ModuleNotFoundError("there is no such library")


def lacks_memory() -> Packed:
    """Fail as torch does where there is too little memory."""

    def spoil(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
        return found.new_empty(2**60)

    return _packed(spoil)

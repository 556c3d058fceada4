"""The process in which packed layers are tried: `python -m engine.quantizing.trying`.

It reads cases from its input and tells on its output, line by line, what it is about to do and what
came of it; where it crashes, the last line tells at what. The weights of a layer are values that
its number format holds exactly, so that the right product is known without unpacking anything.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.quantizing.trial import Case

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 33, 129)
"""Tokens of the products: one, as decoding has it, a few, as drafts and batches have, and prompts.
Blocks of kernels are powers of two; one more leaves a rest, and is the first of the next size."""

TOLERANCE = 0.1
"""How far an output may be off, in standard deviations of such outputs."""

ELSEWHERE = (ImportError, MemoryError, OSError)
"""Errors that say nothing of the CPU: a library is not there, or memory is short."""

ALIGNED = 64
"""torch aligns what it allocates to so many bytes, and kernels may rely on it."""

EXTREMES = 32
"""Weights among which the extremes are: no library divides rows into smaller parts."""

POISON = 0xFF
"""Byte beside operands: not a number in each floating point format, and not 0 in integers."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How a layer is packed, to be tried."""

    pack: Callable[[Tensor], nn.Module]
    """Gives a layer, in evaluation mode, for a weight `[outputs, inputs]` in the model's format."""
    levels: Sequence[float] = (-1.0, 1.0)
    """Values that a weight can have beside its scale; the first and the last are the extremes."""
    block: int | None = None
    """Weights, one after the other, that share a scale; None for a row."""


def main() -> None:
    """Try what comes in, and say what comes of it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not the answer
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cases = json.load(sys.stdin)

    def say(number: int, **told: str) -> None:
        print(json.dumps({"case": number, **told}), file=out, flush=True)

    for number, case in enumerate(cases):
        say(number)
        with suppress(*ELSEWHERE):
            steps = fault(Case(**{**case, "options": tuple(map(tuple, case["options"]))}))
            try:
                while True:
                    say(number, step=next(steps))
            except StopIteration as end:
                say(number, fault=end.value)


def fault(case: Case) -> Generator[str, None, str]:
    """Yield each step before it is taken; return what went wrong, '' where nothing did."""
    import torch

    packed = _packed(case)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    weight = _weight(case, packed).to(dtype)
    step = "packing"
    try:
        with torch.no_grad():
            yield step
            layer = packed.pack(weight)
            weight, guard = weight.float(), _guard()
            usual = weight.square().mean().sqrt()
            for number, rows in enumerate(ROWS):
                # Some libraries treat large inputs apart.
                inputs = (8 if number % 2 else 1) * _inputs(rows, case.inputs)
                inputs = inputs.to(dtype)
                expected = inputs.float() @ weight.T
                size = usual * inputs.float().norm(dim=1, keepdim=True)
                step = f"the product of {rows} row{'s' if rows > 1 else ''} of inputs"
                yield step
                with guard:
                    found = layer(inputs[None])[0].float()
                off = float(((found - expected).abs() / size).max())
                if not off <= TOLERANCE:
                    return f"{step} is off by {off:.1g} times its size"
    except ELSEWHERE:
        raise
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):  # torch's word for too little memory
            raise MemoryError from error
        what = next(iter(str(error).splitlines()), "")
        return f"{step} raises {type(error).__name__}: {what:.200}"
    return ""


def _packed(case: Case) -> Packed:
    module, _, name = case.make.partition(":")
    found: Packed = getattr(importlib.import_module(module), name)(**dict(case.options))
    return found


def _weight(case: Case, packed: Packed) -> Tensor:
    """Return a weight `[outputs, inputs]`; neighbours of a block have other scales than it has."""
    import torch

    size, block = case.outputs * case.inputs, packed.block or case.inputs
    levels = torch.tensor(packed.levels, dtype=torch.float32)
    values = levels[torch.randint(len(levels), (size,))]
    nearby = min(block, EXTREMES)
    values[0::nearby], values[1::nearby] = levels[0], levels[-1]
    scales = 1 - (torch.arange(-(size // -block)) * 7 % 16) / 32
    return (values * scales.repeat_interleave(block)[:size]).view(case.outputs, case.inputs)


def _inputs(rows: int, columns: int) -> Tensor:
    """Return inputs `[rows, columns]` that 8 bits and a scale per row hold exactly."""
    import torch

    values = torch.randint(-127, 128, (rows, columns)) / 127
    values[:, 0] = 1
    return values


def _guard() -> Any:
    """Return a context in which each operand of an operator ends where memory ends.

    Who reads on crashes. Between the end of an operand and that of memory are fewer bytes than
    operands are aligned to, and these are no numbers.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if not any(argument.alias_info for argument in func._schema.arguments):
                args = [_at_the_end(value) for value in args]
                kwargs = {name: _at_the_end(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)

    return Guard()  # type: ignore[no-untyped-call]


def _at_the_end(value: Any) -> Any:
    """Return a copy of a plain tensor whose last byte is, nearly, the last that can be read."""
    import torch

    protect = _mprotect()
    if protect is None or not isinstance(value, torch.Tensor) or not value.numel():
        return value
    if hasattr(value, "__tensor_flatten__") or value.device.type != "cpu":
        return value
    plain = value.detach().as_subclass(torch.Tensor)
    span = 1 + sum((n - 1) * step for n, step in zip(plain.shape, plain.stride(), strict=True))
    size = span * plain.itemsize
    taken = -(size // -ALIGNED) * ALIGNED
    whole = -(taken // -mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    held = torch.frombuffer(memory, dtype=torch.uint8, count=whole)
    held[: whole - taken], held[whole - taken + size :] = POISON, POISON
    protect(ctypes.c_void_p(held.data_ptr() + whole), ctypes.c_size_t(mmap.PAGESIZE), 0)
    flat = held[whole - taken :][:size].view(plain.dtype)
    flat.copy_(plain.as_strided((span,), (1,)))
    return flat.as_strided(plain.shape, plain.stride())


@lru_cache(maxsize=1)
def _mprotect() -> Any:
    return getattr(ctypes.CDLL(None), "mprotect", None) if os.name == "posix" else None


if __name__ == "__main__":
    main()

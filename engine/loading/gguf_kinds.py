"""The kinds of blocks in which llama.cpp stores numbers, and how they are unpacked."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

_REMOVED = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
"""Kinds that llama.cpp once wrote, and no longer reads."""


@lru_cache(maxsize=64)
def unreadable(number: int) -> str:
    """Return why tensors of a kind cannot be unpacked; '' where they can be."""
    from importlib.metadata import version

    import gguf
    import numpy as np

    known = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    if number not in known:
        word = _REMOVED.get(number)
        why = "which llama.cpp reads no more" if word else f"unknown to gguf {version('gguf')}"
        return f"tensors of kind {word or number}, {why}"
    kind = known[number]
    try:
        gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return f"tensors of kind {kind.name}, which gguf {version('gguf')} does not unpack"
    return ""


def unpack(file: Path, start: int, kind: str, shape: tuple[int, ...]) -> Any:
    """Return the tensor that begins at a byte of a file: float32, in memory of its own."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    row = (*shape[:-1], shape[-1] // block * size)
    packed = np.memmap(file, np.uint8, "r", offset=start, shape=row)
    with np.errstate(all="ignore"):  # what is not finite is told, by name
        values = gguf.dequantize(packed, number)
    # Of F32 it is the file itself: one that is cut later would end the process.
    return (np.array(values) if kind == "F32" else values).reshape(shape)

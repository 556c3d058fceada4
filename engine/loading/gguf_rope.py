"""What rotary frequencies are divided by: in llama.cpp tensors, in transformers in the config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.errors import CheckpointError
from engine.loading.gguf_header import GgufHeader, refused
from engine.positions import rotary
from engine.shape import ModelShape

FREQS, LONG, SHORT = TABLES = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
"""Tensors of a file that are no weights."""

SAME = 1e-4
"""Relative difference of factors that are the same: they were computed in 32 bits."""

_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of Llama 3.1 to 3.3. llama.cpp's conversion takes this length, whatever rope_scaling says."""

Values = Mapping[str, Any]


def differences(header: GgufHeader, shape: ModelShape, config: str) -> Iterator[str]:
    """Yield the factors of the file that are not those of `config`."""
    rope, size = _far(shape), shape.rotary_dim
    due = {
        FREQS: _llama3(rope, size) if rotary.kind_of(rope) == "llama3" else [],
        LONG: list(rope.get("long_factor") or ()),
        SHORT: list(rope.get("short_factor") or ()),
    }
    for name in TABLES:
        there = header.numbers(name)
        if there and not _same(there, due[name] or [1.0] * (size // 2)):
            told = _shown(due[name]) if due[name] else "no factors"
            yield f"{name} is {_shown(there)} in the file, and {config} says {told}"


def adopted(header: GgufHeader, shape: ModelShape) -> dict[str, Any]:
    """Return what the file's factors put into a config that scales nothing; {} if nothing.

    Raises CheckpointError for factors that no config of transformers can say.
    """
    rope = _far(shape)
    tables = {name: header.numbers(name) for name in TABLES}
    scaled = any(not _same(each, [1.0] * len(each)) for each in tables.values())
    if not scaled or rotary.kind_of(rope) != "default":
        return {}
    if "" not in rotary.by_label(shape.rope_parameters):  # one set of factors, several of layers
        raise _unsaid(header, [name for name in TABLES if tables[name]])
    original = header.get("rope.scaling.original_context_length")
    if tables[LONG] and tables[SHORT] and original:
        told = {"rope_type": "longrope", "original_max_position_embeddings": original}
        told |= {"long_factor": tables[LONG], "short_factor": tables[SHORT]}
        return {"rope_parameters": {**rope, **told}, "original_max_position_embeddings": original}
    told = {**rope, **_LLAMA3, "factor": max(tables[FREQS], default=0.0)}
    if tables[FREQS] and _same(tables[FREQS], _llama3(told, shape.rotary_dim)):
        return {"rope_parameters": told}
    raise _unsaid(header, [name for name in TABLES if tables[name]])


def _unsaid(header: GgufHeader, names: Sequence[str]) -> CheckpointError:
    what = (
        f"the file scales its rotary positions ({', '.join(names)}), and not as Llama 3.1 does; "
        "how, its header does not tell"
    )
    hint = "put the config.json of the original checkpoint, with its rope_scaling, beside the file"
    return refused(header.file, what, hint)


def _far(shape: ModelShape) -> Values:
    """Return the rotary parameters of layers that see the whole context."""
    return next(iter(rotary.far_sighted(shape.rope_parameters).values()), {})


def _llama3(rope: Values, size: int) -> list[float]:
    """Return what Llama 3 divides each frequency by (modeling_rope_utils.py)."""
    theta, factor = float(rope.get("rope_theta", 10_000.0)), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])

    def divisor(turns: float) -> float:
        if turns < low or turns > high:
            return factor if turns < low else 1.0
        smooth = (turns - low) / (high - low)
        return 1 / ((1 - smooth) / factor + smooth)

    waves = (2 * math.pi * theta ** (place / size) for place in range(0, size, 2))
    return [divisor(original / wave) for wave in waves]


def _same(found: Sequence[float], due: Sequence[float]) -> bool:
    if len(found) != len(due):
        return False
    return all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(found, due, strict=True))


def _shown(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:4])
    return f"[{shown}{', …' if len(values) > 4 else ''}] ({len(values)} factors)"

"""Which tensors of a GGUF file make a weight of transformers, and what llama.cpp did to them.

The names are those of the package `gguf`. `CHANGED` undoes what llama.cpp's conversion does to
values and their order (https://github.com/ggml-org/llama.cpp, conversion/*.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from engine.loading.gguf_header import GgufHeader, Stored
from engine.loading.gguf_rope import TABLES
from engine.loading.model_json import some

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Shape = tuple[int, ...]
Undo = Callable[["Array", Any], "Array"]
"""Gets an array as the file has it, and the text config; gives it as transformers has it."""


@dataclass(frozen=True)
class Change:
    """What is undone to those tensors of the file whose names match."""

    pattern: str
    undo: Undo
    moves: bool = True
    """Whether the values stay what they are, and only their order changes."""


def _interleaved(heads: str) -> Undo:
    """Return what puts the rows of each head back in halves; llama.cpp has pairs side by side."""

    def undo(array: Array, config: Any) -> Array:
        count = getattr(config, heads)
        pairs = array.reshape(count, len(array) // count // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)

    return undo


def _bloom(array: Array, config: Any) -> Array:
    parts = array.reshape(3, config.num_attention_heads, -1, *array.shape[1:])
    return parts.swapaxes(0, 1).reshape(array.shape)


def _falcon(array: Array, config: Any) -> Array:
    import numpy as np

    heads = config.num_attention_heads
    size = config.hidden_size // heads
    groups = len(array) // size - heads >> 1
    query, key, value = np.split(array, [heads * size, (heads + groups) * size])
    parts = (part.reshape(groups, -1, size, *array.shape[1:]) for part in (query, key, value))
    return np.concatenate(list(parts), axis=1).reshape(array.shape)


def _transposed(array: Array, config: Any) -> Array:
    return array.swapaxes(-1, -2)


def _less_one(array: Array, config: Any) -> Array:
    return array - 1


def _log_negated(array: Array, config: Any) -> Array:
    import numpy as np

    return np.log(-array)


_NORMS = (Change(r"norm\.weight\Z", _less_one, moves=False),)
CHANGED: Mapping[str, tuple[Change, ...]] = {
    "llama": (
        Change(r"\.attn_q\.", _interleaved("num_attention_heads")),
        Change(r"\.attn_k\.", _interleaved("num_key_value_heads")),
    ),
    "gemma": _NORMS,
    "gemma2": _NORMS,
    "gemma3": _NORMS,
    "nemotron": _NORMS,
    "gpt2": (Change(r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight\Z", _transposed),),
    "bloom": (Change(r"\.attn_qkv\.", _bloom),),
    "falcon": (Change(r"\.attn_qkv\.", _falcon),),
    "mamba": (Change(r"\.ssm_a\Z", _log_negated, moves=False),),
    "gpt-oss": (Change(r"_exps\.weight\Z", _transposed),),
}
"""By architecture; where a file's tensors are as transformers has them, nothing."""

_EXPERTS = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)(_bias)?\Z")


def _words(name: str) -> list[str]:
    """Return what the conversion calls the parts of a weight, before it is given its GGUF name."""
    if found := _EXPERTS.match(name):
        parts = {"gate_up_proj": ("gate_proj", "up_proj")}.get(found[2], (found[2],))
        return [f"{found[1]}{part}.{'bias' if found[3] else 'weight'}" for part in parts]
    return [f"{name}.weight" if name.endswith(".sinks") else name]


def sources(
    architecture: str, layers: int, names: Iterable[str]
) -> dict[str, tuple[str, ...] | None]:
    """Return for each weight of a model which tensors of the file it is made of; None for none.

    Two for the experts' gate and up projections, which transformers keeps as one.
    """
    import gguf

    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, layers)

    def named(word: str) -> str | None:
        # BLOOM's are those of the model inside: without what the class of the whole puts before.
        tried = (word, word.removeprefix("transformer."))
        return next(
            filter(None, (table.get_name(each, (".weight", ".bias")) for each in tried)), None
        )

    found: dict[str, tuple[str, ...] | None] = {}
    for name in names:
        parts = [named(word) for word in _words(name)]
        found[name] = None if None in parts else tuple(map(str, parts))
    return found


def mismatches(header: GgufHeader, layers: int, needed: Mapping[str, Shape]) -> Iterator[str]:
    """Yield what a model needs and the file lacks, what it has no place for, and other shapes.

    Args:
        needed: the model's weights, of tied ones one, each with its shape.
    """
    stored, made_of = header.tensors, sources(header.architecture, layers, needed)
    nameless = sorted(name for name, parts in made_of.items() if parts is None)
    if nameless:
        yield f"llama.cpp has no tensors for {some(nameless)}"
    used = {part for parts in made_of.values() for part in parts or ()}
    if lacking := sorted(used - stored.keys()):
        yield f"missing from the file: {some(lacking)}"
    if more := sorted(stored.keys() - used - {*TABLES, "output.weight"}):
        yield f"of the file without a place in the model: {some(more)}"
    shapes = []
    for name, parts in made_of.items():
        there = [stored[part] for part in parts or () if part in stored]
        if len(there) == len(parts or ()) and not _fits(there, needed[name]):
            sizes = " and ".join(str(list(each.shape)) for each in there)
            shapes.append(f"{' and '.join(parts or ())} is {sizes}, not {list(needed[name])}")
    if shapes:
        yield f"of another shape than the model's: {some(shapes, 3)}"


def _fits(parts: Sequence[Stored], needed: Shape) -> bool:
    """Tell whether tensors can become a weight: in whatever order, but for dimensions of one."""
    if len(parts) > 1:
        return sum(each.numbers for each in parts) == prod(needed)
    return _long(parts[0].shape) == _long(needed) if parts else True


def _long(shape: Shape) -> list[int]:
    return sorted(size for size in shape if size > 1)


def unpacked(header: GgufHeader, parts: Sequence[str], config: Any, shape: Shape) -> Array:
    """Return a weight of transformers, unpacked, from those tensors of the file."""
    import numpy as np

    arrays = [_undone(header, name, config) for name in parts]
    if len(arrays) == 1:
        (made,) = arrays
    elif header.architecture == "gpt-oss":  # gate and up in turns, along the last dimension
        made = np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
    else:
        made = np.concatenate(arrays, axis=1)
    alike = [size for size in made.shape if size > 1] == [size for size in shape if size > 1]
    return np.ascontiguousarray(made.reshape(shape) if alike else made)


def _undone(header: GgufHeader, name: str, config: Any) -> Array:
    array: Array = header.array(name)
    for change in CHANGED.get(header.architecture, ()):
        if re.search(change.pattern, name):
            array = change.undo(array, config)
    return array


def keeps_values(header: GgufHeader, name: str) -> bool:
    """Tell whether the values of a tensor are in the model as they are in the file."""
    changes = CHANGED.get(header.architecture, ())
    return not any(re.search(each.pattern, name) and not each.moves for each in changes)

"""Refuse keys of a GGUF header whose values are of a type that says nothing."""

from __future__ import annotations

from collections.abc import Mapping

from engine.loading.gguf_header import AGAIN, GgufHeader, refused
from engine.loading.gguf_keys import ROWS, shown
from engine.loading.model_json import some
from engine.shape import MOST_LAYERS

_TEXTS = ("rope.scaling.type", "tensor_data_layout")
_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "attention.sliding_window_pattern",
)
"""Keys that may have a list, of a value for each layer."""


def verify_types(header: GgufHeader) -> None:
    """Raise CheckpointError for keys whose values are of a type that says nothing."""
    wrong = [
        f"{header.architecture}.{key} is {shown(value)!r}"
        for key in ROWS
        if (value := header.get(key)) is not None
        if isinstance(value, str) != (key in _TEXTS)
        or (isinstance(value, list) and (key not in _PER_LAYER or not value))
    ]
    for name, value in header.keys.items():
        if name.startswith("tokenizer.ggml."):
            kind = next((kind for end, kind in _TOKENIZER.items() if name.endswith(end)), object)
            wrong += [] if isinstance(value, kind) else [f"{name} is {shown(value)!r}"]
    layers = header.get("block_count", 0)
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        wrong.append(f"block_count is {layers}, and no model has more than {MOST_LAYERS}")
    if wrong:
        raise refused(header.file, f"of another type than it should be: {some(wrong)}", AGAIN)


_TOKENIZER: Mapping[str, type] = {
    "_token_id": int,
    ".model": str,
    ".pre": str,
    ".tokens": int,  # how many there are
    ".merges": int,
    ".token_type": list,
}

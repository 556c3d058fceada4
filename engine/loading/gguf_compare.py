"""Hold the header of a GGUF file against a config: what contradicts it, and what is not used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.loading import gguf_keys, gguf_rope, gguf_tensors, gguf_tokenizer
from engine.loading.gguf_header import GgufHeader
from engine.loading.model_json import some
from engine.shape import ModelShape


def differences(header: GgufHeader, shape: ModelShape, config: str) -> list[str]:
    """Return what of a file is not of the model that a config describes.

    Args:
        config: what the config is called.
    """
    found = [
        *gguf_keys.differences(header, shape, config),
        *gguf_rope.differences(header, shape, config),
    ]
    if shape.blueprint is not None:
        needed = {weight.name: weight.shape for weight in shape.blueprint.weights}
        found += gguf_tensors.mismatches(header, shape.layers, needed)
    return list(dict.fromkeys(found))  # two keys may say one thing


def notes(
    header: GgufHeader, shape: ModelShape, folder: Path, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what a file says that is not used."""
    if keys := [*gguf_keys.unused(header, shape), *gguf_tokenizer.unused(header)]:
        yield f"{header.file.name}: not used of its header: {some(keys)}"
    for each in gguf_tokenizer.other_than_beside(header, folder, config):
        yield f"{header.file.name}: {each}"

"""What keys and values depend on, in a form that a file can hold and two sessions can compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, Any

from engine.tensors import plain_parts, raw

if TYPE_CHECKING:
    import torch

    from engine.recipe import Recipe
    from engine.session import Session

SLOTS = ("quantize", "heads", "position_encoding", "attention", "cache")
"""Slots whose choice and options shape what a cache holds."""

SAMPLES = 64
"""Numbers of each tensor that are compared: no training leaves all of them as they were."""

Fingerprint = Mapping[str, Any]


def of_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the options of all choices that shape a cache, by name."""
    found: dict[str, Any] = {}
    for slot in SLOTS:
        plugin = getattr(recipe, slot)
        found[slot] = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        for field in dataclasses.fields(plugin):
            value = getattr(plugin, field.name)
            found[f"{slot}.{field.name}"] = value.name if isinstance(value, Enum) else value
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def of_session(session: Session) -> dict[str, Any]:
    """Return that, and what the built model is: its number format, its config, its weights."""
    return {
        **of_recipe(session.recipe),
        "device": session.device.type,
        "number format": str(session.model.dtype).removeprefix("torch."),
        "the model's config": _config(session.model.config.to_dict()),
        "the model's weights": _weights(session.model),
    }


def differences(here: Fingerprint, there: Fingerprint) -> list[str]:
    """Return what differs of all that both tell, in words."""
    return [
        name
        if name.startswith("the model's")
        else f"{name} (there {there[name]}, here {here[name]})"
        for name in here
        if name in there and here[name] != there[name]
    ]


def _config(values: Any) -> str:
    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # Where it lies, who wrote it, and what computes it, make no other model.
        return {
            str(key): kept(each)
            for key, each in value.items()
            if not str(key).startswith("_") and key not in ("transformers_version", "dtype")
        }

    text = json.dumps(kept(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights(model: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), _buffers(model)):
        for part in plain_parts(tensor):
            found.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            if part.device.type == "meta" or not part.numel():
                continue
            every = max(1, part.numel() // SAMPLES)
            found.update(raw(part.reshape(-1)[::every][:SAMPLES]))
    return found.hexdigest()[:16]


def _buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to a checkpoint; others change while the model runs."""
    for name, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}", tensor

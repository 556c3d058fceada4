"""What keys and values depend on, in a form that a file can hold and two sessions can compare."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.loading.places import real
from engine.tensors import digests

if TYPE_CHECKING:
    from engine.recipe import Recipe
    from engine.session import Session

SLOTS = ("quantize", "heads", "position_encoding", "attention", "cache")
"""Slots whose choice and options shape what a cache holds."""

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
    """Return that, and what was built: number format, config, weights, and what tokens mean."""
    return {
        **of_recipe(session.recipe),
        "device": session.device.type,
        "number format": str(session.model.dtype).removeprefix("torch."),
        "the model's config": _config(session.model.config.to_dict()),
        "the model's weights": session.weights_digest,
        "the model's tokenizer": _tokenizer(session.tokenizer),
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


def weights(model: Any) -> str:
    """Return a digest of every byte that a checkpoint of the model would hold.

    All of it: of a merge into one layer, or of a few new rows, no sample is sure to have a part;
    and of packed weights the scales belong to it, which are no parameters. It takes about as long
    as looking for values that are not finite, which loading does.
    """
    return _digest(
        digests(
            model.state_dict(),
            lambda name, value: real(model, name, value) if hasattr(value, "is_meta") else value,
        )
    )


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

    return _digest(kept(values))


def _tokenizer(tokenizer: Any) -> str:
    """Return a digest of how text becomes ids, and which: all of its parts, special tokens too."""
    if tokenizer.is_fast:
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        for passing in ("padding", "truncation"):  # as the last call had them
            told.pop(passing, None)
    else:
        named = (getattr(tokenizer, key, None) for key in tokenizer.vocab_files_names)
        told = {
            "vocabulary": tokenizer.get_vocab(),
            "added": {id: repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
            "files": [Path(file).read_bytes().hex() for file in named if file],
        }
    told["special tokens"] = tokenizer.special_tokens_map
    return _digest(told)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""The config of a model in a GGUF file: what config.json says, or what the file's header does."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from engine.blueprint import sources
from engine.contexts import ModelConfig
from engine.errors import CheckpointError
from engine.loading import gguf_compare, gguf_rope
from engine.loading.gguf_families import (
    ARCHITECTURES,
    PLAIN,
    Config,
    for_all_layers,
    scaled_rope,
    verify_model,
)
from engine.loading.gguf_header import GgufHeader, refused
from engine.loading.gguf_keys import ROWS
from engine.loading.gguf_types import verify_types
from engine.loading.model_json import read_config
from engine.shape import read_shape

REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")
"""Keys for which llama.cpp, too, has no default, where a config class has a word for them."""

_EPSILON = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_ENDS = ("eos", "eot", "eom")
_IDS = ("bos", "padding", *_ENDS)


def described(header: GgufHeader, folder: Path) -> ModelConfig:
    """Return the config of the model in a file: that beside it, or the header's; and notes.

    Raises CheckpointError for what is no model, or of another family than config.json says.
    """
    verify_model(header)
    verify_types(header)
    beside = (folder / "config.json").is_file()
    config = read_config(folder) if beside else of_header(header)
    name, accepted = config.get("model_type"), ARCHITECTURES[header.architecture].model_types
    if name not in accepted:
        what = f"model_type is {' or '.join(accepted)} in the file and {name} in config.json"
        raise refused(header.file, what, _instead(header))
    config.pop("quantization_config", None)  # it would be of weights that are not loaded
    more = gguf_rope.adopted(header, read_shape(config)) if beside else {}
    config |= more
    told = [*gguf_compare.notes(header, read_shape(config), folder, config)]
    if more:
        told.append(
            f"{header.file.name}: config.json scales no positions, so the file's factors do"
        )
    return ModelConfig(config=config, notes=told)


def verify(header: GgufHeader, folder: Path) -> None:
    """Raise CheckpointError where a file is not of the model that its config describes."""
    beside = (folder / "config.json").is_file()
    shape = read_shape(described(header, folder).config)
    found = gguf_compare.differences(header, shape, "config.json" if beside else _MADE)
    if found:
        raise refused(header.file, "; ".join(found), _instead(header) if beside else _MISSING)


_MADE = "the config that the header gives"
_MISSING = "put the config.json of the checkpoint that the file was made of beside it"


def _instead(header: GgufHeader) -> str:
    """Say which config to take instead of the one beside: none will do if the header tells all."""
    hint = "config.json is another model's, or was changed: take that of the checkpoint that the "
    hint += "file was made of"
    with suppress(CheckpointError):
        if not gguf_compare.differences(header, read_shape(of_header(header)), _MADE):
            hint += ", or none: then the header tells"
    return hint


def of_header(header: GgufHeader) -> Config:
    """Return the config that a header describes.

    Raises CheckpointError where it leaves something open.
    """
    one = ARCHITECTURES[header.architecture]
    _verify_complete(header, _words(one.model_types[0]))
    config: Config = {"model_type": one.model_types[0], **one.more(header)}
    for key, name in _words(config["model_type"]).items():
        value = header.get(key)
        if value is not None:
            config.setdefault(name, for_all_layers(value))
    if not config.get("sliding_window"):  # 0 stands for none
        config.pop("sliding_window", None)
    if "rope_parameters" in _fields(config["model_type"]):
        config.setdefault("rope_parameters", scaled_rope(header))
    ids = {name: header.keys.get(f"tokenizer.ggml.{name}_token_id") for name in _IDS}
    ends = sorted({int(each) for name in _ENDS if (each := ids[name]) is not None})
    table = header.tensors.get("token_embd.weight")
    config |= {
        "vocab_size": table.shape[0] if table else header.keys.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids["padding"],
        **_dtype(header),
    }
    try:
        return config | gguf_rope.adopted(header, read_shape(config))
    except CheckpointError as error:  # which speaks of a config.json
        what = "; ".join(problem.message for problem in error.problems)
        raise refused(header.file, what, _MISSING) from error


def _fields(model_type: str) -> Collection[str]:
    """Return the names that a config class has."""
    fields: Collection[str] = sources.config_class(model_type).__dataclass_fields__
    return fields


def _words(model_type: str) -> dict[str, str]:
    """Return what a config class calls the keys for which it has a word."""
    fields = _fields(model_type)
    found = {key: [name for name in row.names if name in fields] for key, row in ROWS.items()}
    return {key: names[0] for key, names in found.items() if names}


def _verify_complete(header: GgufHeader, words: Collection[str]) -> None:
    """Raise CheckpointError where a key is missing that nothing else tells.

    Args:
        words: the keys for which the config class has a word.
    """
    due = [*REQUIRED, *ARCHITECTURES[header.architecture].required]
    missing = [key for key in due if key in words and header.get(key) is None]
    if not any(header.get(key) for key in _EPSILON):
        missing.append(_EPSILON[0])
    if header.get("expert_count") and not header.get("expert_used_count"):
        missing.append("expert_used_count")
    if missing:
        names = ", ".join(f"{header.architecture}.{key}" for key in missing)
        raise refused(header.file, f"the header lacks {names}", _MISSING)


def _dtype(header: GgufHeader) -> Config:
    """Return the number format of the matrices, where it is a plain one."""
    kinds = [tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1]
    most = max(kinds, key=kinds.count, default="")
    return {"dtype": PLAIN[most]} if most in PLAIN else {}

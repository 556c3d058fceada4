"""Draw a model: every weight with its name, shape and layer, as its code makes it from a config."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from engine.blueprint import sources
from engine.blueprint.stand_ins import Buffer, Linear, Module, Parameter


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a model that its checkpoint holds."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """Class of the layer that it belongs to: 'Linear', 'Conv1D', 'LlamaRMSNorm', …"""
    linear: bool = False
    """Whether it is the matrix of a layer that multiplies by it, or that layer's bias."""
    head: bool = False
    """Whether it belongs to the output layer, which gives the logits."""
    trained: bool = True
    """Whether it is a parameter, and no buffer."""

    @cached_property
    def module(self) -> str:
        """Return the name of its layer."""
        return self.name.rpartition(".")[0]

    @property
    def matrix(self) -> bool:
        """Tell whether it is the matrix of a linear layer."""
        return self.linear and len(self.shape) == 2

    @cached_property
    def numbers(self) -> int:
        """Return how many numbers it has."""
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Return the outputs of a linear layer; Conv1D, of GPT-2, has its matrix transposed."""
        return self.shape[1 if self.kind == "Conv1D" else 0]

    @property
    def columns(self) -> int:
        """Return the inputs of a linear layer."""
        return self.shape[0 if self.kind == "Conv1D" else 1]


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model without its values."""

    weights: tuple[Weight, ...]
    """In the order of the model; of tied ones the first."""
    modules: tuple[tuple[str, str], ...]
    """Path and class of every module."""
    buffers: int
    """Bytes of the tensors that no checkpoint holds, such as masks."""
    stated: Mapping[str, frozenset[str]]
    """Attribute of its classes → the words in it, of all of them together."""

    @property
    def parameters(self) -> int:
        """Return how many numbers its parameters have."""
        return sum(weight.numbers for weight in self.weights if weight.trained)


def draw(config: Mapping[str, Any]) -> Blueprint | None:
    """Return what `AutoModelForCausalLM` makes of a parsed config.json; None where that is unknown.

    Unknown are models that transformers does not know, and those whose code takes a shape from
    values.
    """
    try:
        return _drawn(json.dumps(config, sort_keys=True))
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=64)
def _drawn(text: str) -> Blueprint | None:
    # Any error of code that runs on stand-ins means the same: it cannot be told.
    try:
        model = make(json.loads(text))
        weights = tuple(_weights(model))
    except Exception:
        return None
    tied = set(_tied(model))
    return Blueprint(
        weights=tuple(weight for weight in weights if weight.name not in tied),
        modules=tuple((path, type(each).__name__) for path, each in model.named_modules()),
        buffers=sum(_buffers(model)),
        stated={name: _stated(model, name) for name in STATED},
    )


STATED = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""What the classes of a model say of its weights."""


def configure(config: Mapping[str, Any]) -> Any:
    """Make the config as transformers does, defaults and what follows from them filled in.

    Whatever its code raises comes out.
    """
    given = copy.deepcopy(dict(config))
    return sources.config_class(str(given.pop("model_type", "")))(**given)


def make(config: Mapping[str, Any]) -> Any:
    """Make the model of stand-ins; whatever its code raises comes out."""
    made = configure(config)
    kind = sources.model_class(str(config.get("model_type", "")))
    # As AutoModelForCausalLM does with models of several parts: some classes want the text's.
    text = made.sub_configs.get("text_config")
    if text is not None and kind.config_class is text:
        made = made.get_text_config()
    return kind(made)


def _weights(model: Module) -> Iterator[Weight]:
    seen: set[int] = set()
    layers = dict(model.named_modules())
    for name, tensor in model.named_tensors():
        trained = isinstance(tensor, Parameter)
        if id(tensor) in seen or not (trained or tensor.persistent):
            continue
        seen.add(id(tensor))
        if tensor.shape is None:
            if trained:
                raise ValueError(f"the shape of {name} is not known")
            continue
        layer = layers[name.rpartition(".")[0]]
        linear = is_linear(type(layer))
        yield Weight(
            name=name,
            shape=tuple(tensor.shape),
            kind=type(layer).__name__,
            linear=linear,
            head=linear and name.count(".") == 1,
            trained=trained,
        )


SIZES = {"bool": 1, "uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "half": 2, "int64": 8}
"""Number format → bytes; four for the others."""


def _buffers(model: Module) -> Iterator[int]:
    seen: set[int] = set()
    for _, tensor in model.named_tensors():
        passing = isinstance(tensor, Buffer) and not tensor.persistent
        if passing and tensor.shape is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield prod(tensor.shape) * SIZES.get(str(tensor.dtype), 4)


def is_linear(kind: type) -> bool:
    """Tell whether a class multiplies by a matrix."""
    return issubclass(kind, Linear) or any(each.__name__ == "Conv1D" for each in kind.__mro__)


def _tied(model: Module) -> Iterator[str]:
    """Yield the weights that are another's, by what each part says of itself."""
    for path, part in model.named_modules():
        keys = getattr(part, "_tied_weights_keys", None)
        config = getattr(part, "config", None)
        if not (keys and isinstance(keys, dict) and getattr(config, "tie_word_embeddings", False)):
            continue
        names = sorted(name for name, _ in part.named_parameters())
        for target, source in keys.items():
            theirs = [name for name in names if re.search(f"^{target}", name)]
            ours = [name for name in names if re.search(f"^{source}", name)]
            for index, name in enumerate(theirs if ours else ()):
                if name != ours[index % len(ours)]:
                    yield f"{path}.{name}".lstrip(".")


def _stated(model: Module, name: str) -> frozenset[str]:
    found: set[str] = set()
    for part in model.modules():
        found |= set(vars(type(part)).get(name) or getattr(part, name, None) or ())
    return frozenset(found)

"""A conversation in one safetensors file: its cache, and what it was made with.

Tensors go in as they are, whatever the cache's class calls them; numbers, names and the messages
go into the file's metadata, as JSON. Nothing in a file is ever run: reading one fills a fresh cache
that the recipe made, attribute by attribute, and refuses classes that are not the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, Problem, RuntimeFailure
from engine.loading.safetensors_header import read_header

if TYPE_CHECKING:
    import torch
    from transformers import Cache

FORMAT = 2
_KEY = "conversation"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a file holds."""

    about: Mapping[str, Any]
    """Messages, token ids, what the cache was made with, and versions."""
    cache: Any = None
    """The cache's attributes, with the names of tensors in the place of tensors; None without."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)


class NotPlain(Exception):
    """Something in a cache is neither a tensor nor a number, and no file holds it."""


# Writing.


def write(path: Path, about: Mapping[str, Any], cache: Cache | None, fresh: Cache | None) -> None:
    """Write a conversation, all of it or nothing.

    Args:
        fresh: an empty cache of the same kind and size, on which reading is tried before.

    Raises:
        RuntimeFailure: when no file can hold the cache, its values are not finite, or the file
            cannot be written.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    try:
        held = None if cache is None else _Taking(tensors).out(cache, "cache")
        if fresh is not None:
            _Filling(tensors, torch.device("cpu")).into(fresh, held, "cache")
    except (NotPlain, ValueError) as error:
        raise RuntimeFailure(
            Problem(
                message=f"this cache cannot be saved, for it holds more than tensors and plain "
                f"values: {error}",
                hint="cache=dynamic, or go on without --save",
                code="conversation-unsaved",
                slot="cache",
            )
        ) from error
    if strange := _not_finite(tensors):
        raise RuntimeFailure(
            f"the conversation is not saved: values of its cache are NaN or infinite: {strange}",
            hint="begin anew, in another number format: model.dtype=float32",
        )
    text = json.dumps({"format": FORMAT, "about": about, "cache": held})
    metadata = {_KEY: text, "sha256": _digest(text, tensors)}
    path = Path(os.path.realpath(path))  # where a link leads to
    beside = _beside(path)
    try:
        beside.write_bytes(save(tensors, metadata=metadata))
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RuntimeFailure(
            f"the conversation cannot be saved to {path}: {error.strerror}",
            hint="name a file in a folder that exists and can be written: --save FILE",
        ) from error


def unwritable(path: Path) -> str:
    """Return why a file cannot be written, after trying; '' where it can."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        return "that is a folder"
    if path.exists() and not path.is_file():
        return "that is no file"
    if path.exists() and not _is_conversation(path):
        return "there is a file, and it holds no conversation"
    if not path.parent.is_dir():
        return "there is no such folder"
    beside = _beside(path)
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        return f"it cannot be written: {error.strerror}"
    return ""


def _is_conversation(path: Path) -> bool:
    try:
        return bool(read_about(path))
    except CheckpointError:
        return False


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


class _Taking:
    """Turn objects into what JSON holds, their tensors put aside under their names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._inside: list[int] = []

    def out(self, value: Any, name: str) -> Any:
        """Return a value as JSON holds it.

        Raises:
            NotPlain: when it is of a kind that no file holds.
        """
        import torch

        if value is None or isinstance(value, bool | str) or type(value) is int:
            return value
        if isinstance(value, float):
            return {"float": repr(float(value))}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": value.type}
        if isinstance(value, torch.Tensor):
            if type(value) is not torch.Tensor:
                raise NotPlain(f"{name} is a {type(value).__name__}")
            self._tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name, "device": value.device.type}
        if isinstance(value, type):
            return {"class": _name(value)}
        if isinstance(value, Enum):
            return {"enum": value.name}
        if id(value) in self._inside:
            raise NotPlain(f"{name} holds itself")
        self._inside.append(id(value))
        try:
            return self._parts(value, name)
        finally:
            self._inside.pop()

    def _parts(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            each = value.items()
            return {"dict": [[self.out(k, name), self.out(v, f"{name}.{k}")] for k, v in each]}
        if isinstance(value, list | tuple):
            items = [self.out(each, f"{name}.{n}") for n, each in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        if callable(value) or not hasattr(value, "__dict__"):
            raise NotPlain(f"{name} is a {type(value).__name__}")
        state = {key: self.out(each, f"{name}.{key}") for key, each in vars(value).items()}
        return {"object": _name(type(value)), "state": state}


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# Reading.


def read_about(path: Path) -> Mapping[str, Any]:
    """Return what a file says of its conversation, without torch; its data is not looked at.

    Raises:
        CheckpointError: when it is no file of a conversation, or is cut short.
    """
    about: Mapping[str, Any] = _metadata(path)[0]["about"]
    return about


def read(path: Path) -> Saved:
    """Read a file, and verify every byte of it.

    Raises:
        CheckpointError: when it is damaged, or holds values that are not finite.
    """
    from safetensors.torch import load_file

    content, text, digest = _metadata(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise damaged(path, f"cannot be read: {error}") from error
    if digest != _digest(text, tensors):
        raise damaged(path, "does not hold what was written: its checksum differs")
    if strange := _not_finite(tensors):
        raise damaged(path, f"holds values that are NaN or infinite: {strange}")
    return Saved(about=content["about"], cache=content["cache"], tensors=tensors)


def _metadata(path: Path) -> tuple[Mapping[str, Any], str, str]:
    if not path.is_file():
        what = "is no file" if path.exists() else "is not there"
        raise CheckpointError(
            Problem(
                message=f"the conversation {path} {what}",
                hint="a file that engine chat --save wrote, or begin anew without --resume",
                code="conversation-missing",
            )
        )
    read_header(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    metadata = header.get("__metadata__") or {}
    try:
        text, digest = metadata[_KEY], metadata["sha256"]
        content = json.loads(text)
        about, _ = content["about"], content["cache"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, "holds no conversation") from error
    if content.get("format") != FORMAT or not isinstance(about, dict):
        raise damaged(path, f"has format {content.get('format')}, and this engine reads {FORMAT}")
    return content, text, digest


def fill(cache: Cache, saved: Saved, device: torch.device) -> None:
    """Put what a file holds into a fresh cache of the same class.

    Raises:
        ValueError: when the classes differ, or the file names what no cache has.
    """
    _Filling(saved.tensors, device).into(cache, saved.cache, "cache")


class _Filling:
    """Give a fresh object the attributes of one that was saved."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device

    def into(self, fresh: Any, saved: Any, name: str) -> None:
        """Fill an object, and those inside of it."""
        if saved["object"] != _name(type(fresh)):
            here = _name(type(fresh))
            raise ValueError(f"{name} is a {saved['object']} in the file, and a {here} here")
        state = saved["state"]
        _grow(fresh, state)
        self._allocate(fresh, state)
        for key, each in state.items():
            if key.startswith("__") or callable(getattr(type(fresh), key, None)):
                raise ValueError(f"{name}.{key} is no value")
            now = vars(fresh).get(key)
            value = self.made(each, now, f"{name}.{key}")
            if value is not now:
                setattr(fresh, key, value)

    def _allocate(self, fresh: Any, state: Any) -> None:
        """Let a layer of fixed size allocate as it does, so that compiled code finds its place."""
        from transformers.cache_utils import StaticLayer

        if not isinstance(fresh, StaticLayer) or fresh.is_initialized:
            return
        keys, values = (self.made(state.get(each), None, each) for each in ("keys", "values"))
        if keys is not None and values is not None:
            StaticLayer.lazy_initialization(fresh, keys, values)

    def made(self, saved: Any, now: Any, name: str) -> Any:
        """Return a value of a file: what is there already, where that is filled or equal."""
        import torch

        if not isinstance(saved, dict):
            return now if type(saved) is type(now) and saved == now else saved
        kind, value = next(iter(saved.items()))
        if kind == "object":
            self.into(now, saved, name)
            return now
        if kind == "tensor":
            return self._placed(self._tensors[value], saved["device"], now)
        if kind == "dict":
            there = now if isinstance(now, dict) else {}
            pairs = [(self.made(key, None, name), each) for key, each in value]
            return {key: self.made(each, there.get(key), f"{name}.{key}") for key, each in pairs}
        if kind in ("list", "tuple"):
            before: list[Any] = list(now) if isinstance(now, list | tuple) else []
            before += [None] * (len(value) - len(before))
            items = [self.made(v, before[n], f"{name}.{n}") for n, v in enumerate(value)]
            return items if kind == "list" else tuple(items)
        if kind in ("class", "enum"):
            told = value if now is None or kind == "enum" else _name(now)
            if now is None or value != told:
                raise ValueError(f"{name} is {value} in the file, and {now} here")
            return now if kind == "class" else type(now)[value]
        made: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "dtype": partial(getattr, torch),
            "device": self._home,
        }
        return made[kind](value)

    def _home(self, kind: str) -> torch.device:
        import torch

        # What was put out of the way of the device, to the CPU, stays there.
        return torch.device("cpu") if kind == "cpu" else self._device

    def _placed(self, tensor: torch.Tensor, device: str, now: Any) -> torch.Tensor:
        import torch

        tensor = tensor.to(self._home(device))
        same = isinstance(now, torch.Tensor) and (now.shape, now.dtype, now.device) == (
            tensor.shape, tensor.dtype, tensor.device,
        )  # fmt: skip
        # In its place, where there is one: compiled code knows where that is.
        return now.copy_(tensor) if same else tensor


def _grow(fresh: Any, state: Any) -> None:
    """Append the layers that a growing cache makes when the first keys come."""
    replicated = getattr(fresh, "layer_class_to_replicate", None)
    wanted = (state.get("layers") or {}).get("list", ())
    while replicated is not None and len(fresh.layers) < len(wanted):
        fresh.layers.append(replicated())


# What both need.


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the name of a tensor with values that are NaN or infinite; '' where there is none."""
    return next(
        (
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not tensor.float().isfinite().all()
        ),
        "",
    )


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the refusal of a file that is not what was written."""
    return CheckpointError(
        Problem(
            message=f"{path.name} {what}",
            hint="take another copy of the file, or begin anew without --resume",
            code="conversation-damaged",
            where=str(path),
        )
    )

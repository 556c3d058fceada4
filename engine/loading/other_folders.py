"""Refuse a folder or file that is something else than a checkpoint of transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, Problem
from engine.loading.folder_kinds import (
    KINDS,
    ORIGINAL,
    TEXT,
    UNUSUAL,
    Kind,
    gguf_hint,
    given,
    typed,
)


def refuse_other(
    folder: Path, names: Collection[str] | None = None, *, config_counts: bool = True
) -> None:
    """Raise CheckpointError for a folder that is something else than a checkpoint.

    Args:
        names: paths of all files, where the folder has only some of them: those of the hub.
        config_counts: whether a config.json would be that of a model.
    """
    there = _top(names_in(folder) if names is None else names)
    here = config_counts and "config.json" in there
    for kind in KINDS:
        if (kind.anyway or not here) and (found := _match(kind, there)):
            raise _error(folder, *kind.told(folder, found))
    if not here and (inside := _models_inside(folder)):
        listed = ", ".join(each.name for each in inside)
        what = f"a folder of folders, and the models are in these: {listed}"
        raise _error(folder, what, given(inside[0]))


def refuse_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config.json of another library."""
    packed = config.get("quantization")
    if isinstance(packed, Mapping) and {"group_size", "bits"} <= packed.keys():
        what = f"a model packed by MLX, for the GPUs of Apple, in {packed['bits']} bits"
        raise _error(folder, what, ORIGINAL + ", and to pack it: quantize=nf4")
    if config.get("model_type") or config.get("architectures"):
        return
    if "architecture" in config and "pretrained_cfg" in config:
        what = f"a model of timm ({config['architecture']}), which sees images"
        raise _error(folder, what, TEXT)
    if "_class_name" in config and "_diffusers_version" in config:
        what = f"a part of a pipeline of diffusers ({config['_class_name']})"
        raise _error(folder, what, TEXT)
    refuse_other(folder, config_counts=False)


def refuse_weights(folder: Path, names: Collection[str]) -> None:
    """Raise CheckpointError for weights that are there, but in a form of no use here.

    Args:
        names: paths of all files, at the hub too.
    """
    for kind in (*(kind for kind in KINDS if kind.weights), *UNUSUAL):
        if found := _match(kind, _top(names)):
            raise _error(folder, *kind.told(folder, found))


def refuse_file(file: Path) -> None:
    """Raise CheckpointError for a file where a folder is asked for."""
    if file.suffix == ".gguf":
        raise _error(file, "a GGUF file, of llama.cpp", gguf_hint(file.parent, file.name))
    here = (file.parent / "config.json").is_file()
    hint = f"its folder: {given(file.parent)}" if here else "a folder with config.json in it"
    raise _error(file, "a file, and a model is a folder", hint)


def names_in(folder: Path) -> set[str]:
    """Return what is in a folder, and in its data; names of folders with a slash."""
    try:
        found = {each.name + "/" * each.is_dir() for each in folder.iterdir()}
        return found | {f"data/{each.name}" for each in folder.glob("data/*")}
    except OSError:
        return set()


def _error(folder: Path, what: str, hint: str) -> CheckpointError:
    message = f"{typed(folder)} is {what}"
    return CheckpointError(
        Problem(code="folder-kind", message=message, hint=hint, where=str(folder))
    )


def _match(kind: Kind, names: Collection[str]) -> str:
    """Return the name that the last sign matches; '' unless each matches one."""
    found = [next((n for n in sorted(names) if fnmatchcase(n, sign)), "") for sign in kind.signs]
    other = any(fnmatchcase(name, sign) for name in names for sign in kind.without)
    return found[-1] if all(found) and not other else ""


def _top(names: Collection[str]) -> set[str]:
    """Return the same of paths of files."""
    data = {name for name in names if name.startswith("data/")}
    return data | {name.split("/")[0] + "/" * ("/" in name) for name in names}


def _models_inside(folder: Path) -> list[Path]:
    try:
        inside = sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []
    return [each for each in inside if (each / "config.json").is_file()]

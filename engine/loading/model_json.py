"""Read a checkpoint's JSON files, and say which value of theirs transformers refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, Problem
from engine.families import family
from engine.loading.other_folders import refuse_config, refuse_other
from engine.loading.safetensors_header import disguise

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

AGAIN = "fetch it from its source again"
CODE = (
    "the checkpoint brings code: read it, then model.trust_remote_code=true model.revision=COMMIT"
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, parsed and nothing else.

    Raises CheckpointError when it is missing, not a JSON object, describes no model, or asks for
    a kernel of the hub, which would be code from elsewhere; and for a folder of another kind.
    """
    refuse_other(folder)
    config = json_object(folder / "config.json")
    refuse_config(folder, config)
    if not (config.get("model_type") or config.get("architectures")):
        message = "config.json has neither model_type nor architectures: it describes no model"
        raise bad_file(folder / "config.json", message)
    for key, value in _implementations(config):
        # CVE-2026-4372: "org/name" here made transformers download and run code.
        if "/" in str(value):
            message = f"config.json asks for code from elsewhere: {key}={value}"
            hint = f"remove {key} from it; the recipe chooses: attention=sdpa"
            raise bad_file(folder / "config.json", message, hint)
    return config


def _implementations(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if re.match(r"_?(attn|experts)_implementation", key):
                yield key, value
            else:
                yield from _implementations(value)
    elif isinstance(node, list):
        for item in node:
            yield from _implementations(item)


def json_object(file: Path) -> dict[str, Any]:
    """Return a JSON file that holds an object; raise CheckpointError for anything else."""
    try:
        content = file.read_bytes()
    except OSError as error:
        hint = f"in {file.parent} there is: {listing(file.parent)}"
        raise bad_file(file, f"{file.name} cannot be read: {error.strerror}", hint) from error
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        what, hint = disguise(content[:256]) or (f"not JSON: {error}", "fetch it again, or mend it")
        raise bad_file(file, f"{file.name} is {what} ({len(content)} bytes)", hint) from error
    if not isinstance(parsed, dict):
        raise bad_file(file, f"{file.name} is not a JSON object but {type(parsed).__name__}")
    return parsed


def bad_file(file: Path, message: str, hint: str = AGAIN, code: str = "file") -> CheckpointError:
    """Return the error that names a file of a checkpoint."""
    return CheckpointError(Problem(code=code, message=message, hint=hint, where=str(file)))


def listing(folder: Path) -> str:
    """Name what a folder holds, in a few words."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return "nothing, the folder cannot be read"
    return some(names) or "nothing"


def some(names: Collection[str], limit: int = 5) -> str:
    """Name the first of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more


def generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """Return the tokens that begin, end and pad, from generation_config.json or else the config.

    How to sample is for the recipe to say, so nothing else in that file can do harm; its
    temperature is kept, to be told. Raises CheckpointError for what is no token of the model.
    """
    from transformers import GenerationConfig

    file, text = folder / "generation_config.json", config.get_text_config()
    given: Mapping[str, Any]
    if file.is_file():
        given = json_object(file)
    else:
        file, given = folder / "config.json", {**text.to_dict(), **_set(config.to_dict())}
    rows = int(getattr(text, "vocab_size", 0)) or sys.maxsize
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = {name: _tokens(file, name, given.get(name), rows) for name in names}
    temperature = given.get("temperature")
    if isinstance(temperature, float) and temperature > 0:
        values["temperature"] = temperature
    made: Any = GenerationConfig
    return made(**values)  # type: ignore[no-any-return]


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _tokens(file: Path, name: str, value: Any, rows: int) -> Any:
    """Return one id, or for the end several; None for -1, as old configs say that there is none."""
    several = value if name == "eos_token_id" and isinstance(value, list) else [value]
    for one in several:
        whole = isinstance(one, int) and not isinstance(one, bool)
        if one is not None and not (whole and -1 <= one < rows):
            message = f"{file.name}: {name}={value!r} is no token of a model with {rows} of them"
            hint = f"mend {name}: a number from 0 to {rows - 1}; or {AGAIN}"
            raise bad_file(file, message, hint, "generation-config")
    known = [one for one in several if one not in (None, -1)]
    return known if isinstance(value, list) else next(iter(known), None)


def unusable(folder: Path, error: Exception, what: str, hint: str = "") -> CheckpointError:
    """Return the error for what transformers could not make of a checkpoint, with the cause.

    Its own errors seldom name the file, never the key.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    message = f"{what}: {type(error).__name__}: {first}"
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    if sys.flags.optimize >= 2:
        message = f"{what}: it needs docstrings, which PYTHONOPTIMIZE=2 (python -OO) takes away"
        hint = "PYTHONOPTIMIZE=1, or unset it"
    elif pretender := _pretender(folder):
        message, hint = f"{what}: {pretender[0]}", pretender[1]
    elif found := _culprit(config, str(error)):
        message = f"{what}: it does not take {found} from config.json"
        hint = f"mend that value of config.json, or {AGAIN}"
    elif not hint:
        mend = f"config.json does not suit it: {AGAIN}, or take another model"
        mend = "install what it names" if isinstance(error, ImportError) else mend
        hint = CODE if _has_code(config) else mend
    return bad_file(folder, message, hint, "load")


def _pretender(folder: Path) -> tuple[str, str] | None:
    """Name a small file that is a page or a pointer instead of itself, and say what to do."""
    for file in sorted(each for each in folder.iterdir() if each.is_file()):
        with file.open("rb") as stream:
            found = disguise(stream.read(256))
        if found and file.suffix in (".json", ".model", ".txt"):
            return f"{file.name} is {found[0]}", found[1]
    return None


def _has_code(config: Mapping[str, Any]) -> bool:
    return bool(config.get("auto_map")) or not family(str(config.get("model_type"))).known


def _culprit(node: Any, error: str, key: str = "") -> str:
    """Return `key=value` of the first text in a config that an error quotes, or ''."""
    if isinstance(node, Mapping):
        inside = ((f"{key}.{name}".lstrip("."), value) for name, value in node.items())
        return next(filter(None, (_culprit(value, error, name) for name, value in inside)), "")
    quoted = isinstance(node, str) and re.search(rf"""['"`]{re.escape(node)}['"`]""", error)
    return f"{key}={node}" if quoted else ""

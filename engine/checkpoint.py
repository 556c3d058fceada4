"""Find a model's files, and refuse the ones that are not what they should be.

In the order of use: `locate` and `read_config` before anything is loaded, `tensors`,
`verify_checksums` and `verify_finite` before the weights are, `verify_loaded` and
`verify_tokenizer` after. What transformers would only warn of, or not notice, is an error here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, Problem
from engine.model_folder import SMALL_FILES, escapes, fetch, is_local, locate
from engine.safetensors_header import Header, TensorInfo, disguise, read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Header",
    "TensorInfo",
    "fetch_weights",
    "locate",
    "read_config",
    "read_header",
    "tensors",
    "verify_checksums",
    "verify_finite",
    "verify_loaded",
    "verify_tokenizer",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Causal masks that old checkpoints of GPT-2, GPT-Neo and GPT-J hold; models make their own now.
_RELICS = ("*.attn.bias", "*.attn.attention.bias", "*.masked_bias")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json, parsed and nothing else.

    Raises CheckpointError when it is missing, not a JSON object, describes no model, or asks for
    a kernel of the hub, which would be code from elsewhere.
    """
    config = _json_object(folder / "config.json")
    if not (config.get("model_type") or config.get("architectures")):
        message = "config.json has neither model_type nor architectures: it describes no model"
        raise _bad_file(folder / "config.json", message)
    for key, value in _implementations(config):
        # CVE-2026-4372: "org/name" here made transformers download and run code.
        if "/" in str(value):
            message = f"config.json asks for code from elsewhere: {key}={value}"
            hint = f"remove {key} from it; the recipe chooses: attention=sdpa"
            raise _bad_file(folder / "config.json", message, hint)
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


def _bad_file(
    file: Path, message: str, hint: str = "fetch it from its source again", code: str = "file"
) -> CheckpointError:
    return CheckpointError(Problem(code=code, message=message, hint=hint, where=str(file)))


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        hint = f"in {file.parent} there is: {_listing(file.parent)}"
        raise _bad_file(file, f"{file.name} cannot be read: {error.strerror}", hint) from error
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        what, hint = disguise(content[:256]) or (f"not JSON: {error}", "fetch it again, or mend it")
        raise _bad_file(file, f"{file.name} is {what} ({len(content)} bytes)", hint) from error
    if not isinstance(parsed, dict):
        raise _bad_file(file, f"{file.name} is not a JSON object but {type(parsed).__name__}")
    return parsed


def _listing(folder: Path) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return "nothing, the folder cannot be read"
    return _some(names) or "nothing"


def _some(names: Collection[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more


def _counted(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Return every tensor that the safetensors files of a checkpoint hold, from their headers.

    Nothing when `allow_pickle` lets pickle files pass: what they hold is known only by running
    them. Raises CheckpointError for files that are missing, refused, damaged or inconsistent.
    """
    if (folder / _WEIGHTS).is_file():  # transformers, too, takes this before an index
        return read_header(folder / _WEIGHTS)
    if (folder / _INDEX).is_file():
        return _sharded(folder)
    if pickles := sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern)):
        if allow_pickle:
            return {}
        raise _bad_file(
            folder,
            f"the weights are only there as pickle, which can run code: {_some(pickles)}",
            "take a revision with safetensors, or convert them where that can do no harm "
            "(from_pretrained, save_pretrained), or trust them: load.allow_pickle=true",
            "pickle",
        )
    message = f"no weights: neither {_WEIGHTS} nor {_INDEX}"
    raise _bad_file(folder, message, f"in the folder there is: {_listing(folder)}", "weights")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _json_object(folder / _INDEX).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise _bad_file(folder / _INDEX, f"{_INDEX} has no weight_map of tensor → file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or escapes(shard) or not shard.endswith(".safetensors"):
            message = f"{_INDEX} maps {name} to {shard}: no safetensors file of this folder"
            raise _bad_file(folder / _INDEX, message)
    return weight_map


def _shards(folder: Path) -> list[str]:
    return sorted(set(_weight_map(folder).values()))


def _sharded(folder: Path) -> Header:
    weight_map, shards = _weight_map(folder), _shards(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        message = f"missing: {len(missing)} of {len(shards)} shards: {_some(missing)}"
        raise _bad_file(folder, message, "an interrupted download? fetch them again", "shards")
    headers = {shard: read_header(folder / shard) for shard in shards}
    if lost := [name for name, shard in weight_map.items() if name not in headers[shard]]:
        where = [f"{name} (not in {weight_map[name]})" for name in lost]
        message = f"{_counted(lost)} that {_INDEX} promises: {_some(where)}"
        hint = "index and shards are of different checkpoints: fetch all of them again"
        raise _bad_file(folder / _INDEX, message, hint, "shards")
    return {name: info for header in headers.values() for name, info in header.items()}


def fetch_weights(path: str, revision: str | None, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a model with its weights in it, fetched where it is one of the hub.

    Pickle files are fetched only with `allow_pickle`, and where there are no safetensors. Raises
    CheckpointError as `locate` does.
    """
    folder = locate(path, revision, download=True)
    assert folder is not None
    if is_local(path):
        return folder
    shards = _shards(folder) if (folder / _INDEX).is_file() else [_WEIGHTS]
    folder = fetch(path, revision, [*SMALL_FILES, *shards])
    if allow_pickle and not any((folder / shard).is_file() for shard in shards):
        folder = fetch(path, revision, [*SMALL_FILES, "pytorch_model*.bin"])
    return folder


def verify_checksums(folder: Path) -> int:
    """Hash every file that SHA256SUMS lists, and return how many; 0 where there is no such list.

    Raises CheckpointError naming every file that is missing or has other bytes.
    """
    manifest = folder / "SHA256SUMS"
    if not manifest.is_file():
        return 0
    listed = [_checksum(manifest, line) for line in manifest.read_text("utf-8").splitlines()]
    problems = [
        Problem(
            code="checksum",
            message=f"{name}: SHA256SUMS says {expected[:12]}…, "
            + (f"the file has {actual[:12]}…" if actual else "there is no such file"),
            hint="a bit flip, or another version of the file: fetch it again",
            where=str(folder / name),
        )
        for expected, name in listed
        if (actual := _sha256(folder / name)) != expected
    ]
    if problems:
        raise CheckpointError(problems)
    return len(listed)


def _checksum(manifest: Path, line: str) -> tuple[str, str]:
    match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
    if match is None:
        raise _bad_file(manifest, f"SHA256SUMS has a line that sha256sum does not write: {line}")
    if escapes(match[2]):
        raise _bad_file(manifest, f"SHA256SUMS lists a file outside of the folder: {match[2]}")
    return match[1].lower(), match[2]


def _sha256(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_finite(folder: Path, names: Collection[str] | None = None) -> None:
    """Look for NaN and infinity in every floating tensor (of `names`), one tensor at a time.

    4- and 6-bit floats are skipped: they have neither. Pickle files are not looked into at all.
    Raises CheckpointError with the count for each bad tensor.
    """
    from safetensors import safe_open

    files: dict[Path, list[str]] = {}
    for name, info in tensors(folder, allow_pickle=True).items():
        can_be_bad = info.nbytes and info.dtype.startswith(("F8", "F16", "BF16", "F32", "F64", "C"))
        if can_be_bad and (names is None or name in names):
            files.setdefault(info.file, []).append(name)
    bad = []
    for file, group in files.items():
        with safe_open(str(file), framework="pt") as handle:
            bad += [found for name in group if (found := _not_finite(name, handle))]
    if bad:
        hint = "training diverged or the file is damaged: take another checkpoint"
        message = f"{_counted(bad)} with values that are not finite: {_some(bad)}"
        raise _bad_file(folder, message, hint, "not-finite")


def _not_finite(name: str, handle: Any) -> str:
    import torch

    tensor: torch.Tensor = handle.get_tensor(name)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # float8 has no reductions; exact, NaN and all
    # Both ends carry NaN on, in one pass without a copy: 20 times as fast as isfinite().all().
    if all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        return ""
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{name} ({nan} NaN and {inf} Inf of {tensor.numel()})"


def verify_loaded(
    folder: Path,
    info: Mapping[str, Any],
    *,
    model: PreTrainedModel,
    tensors: Mapping[str, TensorInfo] | None = None,
    reshaped: Iterable[str] = (),
    expected_missing: Iterable[str] = (),
    expected_unexpected: Iterable[str] = (),
) -> None:
    """Compare what `model` needed with what its checkpoint had, from `output_loading_info`.

    Load with `ignore_mismatched_sizes=True`, so that shapes are told here. transformers does not
    compare those of layers that it quantizes: with `tensors` they are, but for names in which an
    expression of `reshaped` is found. Tied weights and what the model's class ignores are not in
    `info` anymore; the two `expected_…` are names or patterns (`*.bias`) of what else may differ.
    Raises CheckpointError with all differences.
    """
    missing = _unmatched(info["missing_keys"], expected_missing)
    unexpected = _unmatched(info["unexpected_keys"], [*_RELICS, *expected_unexpected])
    differing = [
        *info["mismatched_keys"],
        *_linear_mismatches(tensors or {}, model, [re.compile(each) for each in reshaped]),
    ]
    shapes = [
        f"{name} has shape {list(there)} in the checkpoint and {list(needed)} in the model"
        for name, there, needed in sorted({(n, tuple(t), tuple(s)) for n, t, s in differing})
    ]
    kind = type(model).__name__
    total = sum(1 for _ in model.parameters())
    findings = [
        (
            missing,
            f"missing from the checkpoint that the config promises ({kind} has {total})",
            "config.json has more layers than the weights, or weights are missing or renamed",
        ),
        (
            unexpected,
            f"of the checkpoint without a place in {kind}",
            "config.json has fewer layers than the weights, or is another model's",
        ),
        (shapes, "with another shape than the config says", "config.json is another model's"),
        (
            list(info["error_msgs"]),
            "that could not be loaded",
            "the file may be damaged: fetch it again",
        ),
    ]
    problems = [
        Problem(
            code="tensors",
            message=f"{_counted(names)} {what}: {_some(names)}",
            hint=hint,
            where=str(folder),
        )
        for names, what, hint in findings
        if names
    ]
    if problems:
        raise CheckpointError(problems)


def _linear_mismatches(
    tensors: Mapping[str, TensorInfo], model: PreTrainedModel, reshaped: list[re.Pattern[str]]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight not in tensors or any(each.search(weight) for each in reshaped):
            continue
        if tensors[weight].dtype.startswith(("U", "I")):
            continue  # packed by whoever made the checkpoint
        rows, columns = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
        there = tensors[weight].shape
        # A layer of Conv1D has them the other way round.
        if rows and columns and sorted(there) != sorted((rows, columns)):
            yield weight, there, (rows, columns)


def _unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return sorted(n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns))


def verify_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_rows: int) -> None:
    """Raise CheckpointError when the tokenizer gives ids that the embedding has no row for.

    A placeholder may be beyond: a special token that neither the chat template nor padding, the
    beginning or the end of a text uses, such as `<image_soft_token>` in Gemma 3's text models.
    """
    beyond = {
        token: index
        for token, index in tokenizer.get_vocab().items()
        if index >= vocab_rows and not _is_placeholder(tokenizer, token, index)
    }
    if beyond:
        token, largest = max(beyond.items(), key=lambda item: item[1])
        message = (
            f"the tokenizer's largest id is {largest} ({token}), "
            f"but the model's embedding has {vocab_rows} rows"
        )
        hint = "the tokenizer is another model's, or tokens were added and the weights not resized"
        raise CheckpointError(Problem(code="tokenizer", message=message, hint=hint))


def _is_placeholder(tokenizer: PreTrainedTokenizerBase, token: str, index: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(index)
    used = {
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.unk_token,
    }
    in_template = token in str(tokenizer.chat_template or "")
    return bool(added and added.special) and token not in used and not in_template

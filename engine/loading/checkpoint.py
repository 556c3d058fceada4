"""Find a model's files, and refuse the ones that are not what they should be.

In the order of use: `locate` and `read_config` before anything is loaded, `tensors`,
`verify_checksums` and `verify_finite` before the weights are, `verify_loaded` and
`verify_tokenizer` after. What transformers would only warn of, or not notice, is an error here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, Problem
from engine.families import family
from engine.loading.model_folder import (
    SMALL_FILES,
    escapes,
    fetch,
    is_local,
    listed,
    locate,
    refuse_listed,
)
from engine.loading.model_json import (
    bad_file,
    generation_config,
    json_object,
    listing,
    read_config,
    some,
    unusable,
)
from engine.loading.other_folders import names_in, refuse_weights
from engine.loading.safetensors_header import (
    FLOATS,
    Header,
    TensorInfo,
    read_header,
    tensor_digest,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from engine.shape import ModelShape

__all__ = [
    "FLOATS",
    "Header",
    "TensorInfo",
    "fetch_weights",
    "generation_config",
    "left_out",
    "locate",
    "other_parts",
    "read_config",
    "read_header",
    "some",
    "tensors",
    "unusable",
    "verify_checksums",
    "verify_dtypes",
    "verify_files",
    "verify_finite",
    "verify_loaded",
    "verify_promises",
    "verify_tokenizer",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Causal masks that old checkpoints of GPT-2, GPT-Neo and GPT-J hold; models make their own now.
_RELICS = ("*.attn.bias", "*.attn.attention.bias", "*.masked_bias")
_PARTS = "model|transformer|gpt_neox|decoder|language_model"
_LAYER = re.compile(rf"(?:(?:{_PARTS})\.)*(?:layers|h)\.(\d+)\.")
_LAYER_LOOP = re.compile(r"range\(config\.(?:num_hidden_layers|n_layer)\)")
_OTHER_PART = re.compile(
    r"(?:[a-z]\w*\.)*?(?:\w+_)?(?:vision|visual|image|images|video|audio|speech|sound|vq|vqmodel|mm|"
    r"multi_modal|multimodal|projector|connector|resampler|perceiver|qformer|talker|token2wav|"
    r"code2wav)(?:_\w+)?(?:\.|$)"
)
_PICKLES = "pytorch_model*.bin"
_PACKED_HERE = ".quant_state.bitsandbytes__"
"""Behind a weight's name: how bitsandbytes packed it in 4 bits."""


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
    if allow_pickle and any(folder.glob(_PICKLES)):
        return {}
    raise _without_weights(folder, names_in(folder))


def verify_files(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise CheckpointError, as `tensors` does, for weights that are there and of no use."""
    try:
        tensors(folder, allow_pickle=allow_pickle)
    except CheckpointError as error:
        if {problem.code for problem in error.problems} != {
            "weights"
        }:  # none at all can be planned
            raise


def left_out(folder: Path, names: Mapping[str, TensorInfo]) -> list[str]:
    """Return the safetensors files of a folder that hold none of its model's tensors."""
    used = {info.file.name for info in names.values()}
    return sorted(file.name for file in folder.glob("*.safetensors") if file.name not in used)


def _without_weights(folder: Path, names: Collection[str]) -> CheckpointError:
    """Return the refusal of a folder without safetensors; raise a more telling one where it can.

    Args:
        names: of all that is there, at the hub too.
    """
    if pickles := sorted(name for name in names if fnmatchcase(name, _PICKLES)):
        return bad_file(
            folder,
            f"the weights are only there as pickle, which can run code: {some(pickles)}",
            "take a revision with safetensors, or convert them where that can do no harm "
            "(from_pretrained, save_pretrained), or trust them: load.allow_pickle=true",
            "pickle",
        )
    refuse_weights(folder, names)
    message = f"no weights: neither {_WEIGHTS} nor {_INDEX}"
    return bad_file(folder, message, f"in the folder there is: {listing(folder)}", "weights")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = json_object(folder / _INDEX).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise bad_file(folder / _INDEX, f"{_INDEX} has no weight_map of tensor → file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or escapes(shard) or not shard.endswith(".safetensors"):
            message = f"{_INDEX} maps {name} to {shard}: no safetensors file of this folder"
            raise bad_file(folder / _INDEX, message)
    return weight_map


def _shards(folder: Path) -> list[str]:
    return sorted(set(_weight_map(folder).values()))


def _sharded(folder: Path) -> Header:
    weight_map, shards = _weight_map(folder), _shards(folder)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        message = f"missing: {len(missing)} of {len(shards)} shards: {some(missing)}"
        raise bad_file(folder, message, "an interrupted download? fetch them again", "shards")
    headers = {shard: read_header(folder / shard) for shard in shards}
    if lost := [name for name, shard in weight_map.items() if name not in headers[shard]]:
        where = [f"{name} (not in {weight_map[name]})" for name in lost]
        message = f"{_counted(lost)} that {_INDEX} promises: {some(where)}"
        hint = "index and shards are of different checkpoints: fetch all of them again"
        raise bad_file(folder / _INDEX, message, hint, "shards")
    _refuse_ambiguous(folder, headers)
    return {name: info for header in headers.values() for name, info in header.items()}


def _refuse_ambiguous(folder: Path, headers: Mapping[str, Header]) -> None:
    """Raise CheckpointError for a tensor of which shards hold different values."""
    holders: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for name in header:
            holders.setdefault(name, []).append(shard)
    differing = [
        f"{name} (in {' and '.join(shards)})"
        for name, shards in holders.items()
        if len(shards) > 1 and len({tensor_digest(folder / each, name) for each in shards}) > 1
    ]
    if differing:
        message = f"{_counted(differing)} of which shards hold different values: {some(differing)}"
        hint = "shards of two checkpoints are mixed: fetch all of them again"
        raise bad_file(folder, message, hint, "shards")


def _unlisted(folder: Path) -> set[str]:
    """Return the tensors in the folder's files that its index does not name."""
    if not (folder / _INDEX).is_file():
        return set()
    files = sorted(folder.glob("*.safetensors"))
    return {name for file in files for name in read_header(file)} - set(_weight_map(folder))


def fetch_weights(path: str, revision: str | None, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a model with its weights in it, fetched where it is one of the hub.

    Pickle files are fetched only with `allow_pickle`, and where there are no safetensors. Raises
    CheckpointError as `locate` does.
    """
    folder = locate(path, revision, download=True)
    assert folder is not None
    if is_local(path):
        return folder
    refuse_listed(path, revision, folder)
    shards = _shards(folder) if (folder / _INDEX).is_file() else [_WEIGHTS]
    folder = fetch(path, revision, [*SMALL_FILES, *shards])
    if any((folder / shard).is_file() for shard in shards):
        return folder
    if allow_pickle:
        return fetch(path, revision, [*SMALL_FILES, _PICKLES])
    raise _without_weights(folder, listed(path, revision) or [])


def verify_promises(shape: ModelShape) -> None:
    """Raise CheckpointError where the headers of the weights contradict config.json.

    Only where neither can mean something else: the usual names of layers, in a model whose code
    makes as many as the config counts.
    """
    where, code = Path("config.json"), family(shape.model_type).model_code
    found = [match for match in map(_LAYER.match, shape.tensors) if match]
    there = max((int(match[1]) + 1 for match in found), default=0)
    # A layer that only predicts tokens further ahead comes behind the others, and is left out.
    more = there > shape.layers and not re.search(r"_on_load_unexpected = .*layers", code)
    if found and (there < shape.layers or more) and _LAYER_LOOP.search(code):
        message = f"config.json says {shape.layers} layers, the weights have {there}"
        raise bad_file(where, message, "config.json is another model's: fetch both again", "layers")


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
        raise bad_file(manifest, f"SHA256SUMS has a line that sha256sum does not write: {line}")
    if escapes(match[2]):
        raise bad_file(manifest, f"SHA256SUMS lists a file outside of the folder: {match[2]}")
    return match[1].lower(), match[2]


def _sha256(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify_finite(folder: Path, names: Collection[str] | None = None) -> None:
    """Look for NaN and infinity in every floating tensor (of `names`), one tensor at a time.

    4- and 6-bit floats are skipped: they have neither; so are the codes that bitsandbytes stores as
    floats where it is told to (`bnb_4bit_quant_storage`). Pickle files are not looked into at all.
    Raises CheckpointError with the count for each bad tensor.
    """
    from safetensors import safe_open

    files: dict[Path, list[str]] = {}
    held = tensors(folder, allow_pickle=True)
    codes = _packed_in_4_bits(held)
    for name, info in held.items():
        if name in codes:
            continue
        can_be_bad = info.nbytes and info.dtype.startswith(("F8", "F16", "BF16", "F32", "F64", "C"))
        if can_be_bad and (names is None or name in names):
            files.setdefault(info.file, []).append(name)
    bad = []
    for file, group in files.items():
        with safe_open(str(file), framework="pt") as handle:
            bad += [found for name in group if (found := _not_finite(name, handle))]
    if bad:
        hint = "training diverged or the file is damaged: take another checkpoint"
        message = f"{_counted(bad)} with values that are not finite: {some(bad)}"
        raise bad_file(folder, message, hint, "not-finite")


def _packed_in_4_bits(names: Iterable[str]) -> set[str]:
    """Return the weights that bitsandbytes packed in 4 bits, in whatever format it stores codes."""
    return {name.partition(_PACKED_HERE)[0] for name in names if _PACKED_HERE in name}


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


def other_parts(info: Mapping[str, Any]) -> list[str]:
    """Return the tensors of parts that a text model has no place for: those that see or hear.

    None where anything is missing: then config.json is more likely that of another model.
    """
    surplus = [] if info["missing_keys"] else info["unexpected_keys"]
    return sorted(name for name in surplus if _OTHER_PART.match(name))


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
    `info` anymore, and `other_parts` may be left out; the two `expected_…` are names or patterns
    (`*.bias`) of what else may differ. Raises CheckpointError with all differences.
    """
    missing = _unmatched(info["missing_keys"], expected_missing)
    unlisted = sorted(_unlisted(folder).intersection(missing)) if missing else []
    missing = [name for name in missing if name not in unlisted]
    left = {*_RELICS, *expected_unexpected, *other_parts(info)}
    unexpected = _unmatched(info["unexpected_keys"], left)
    renamed = [name for name in missing if any(each.endswith(f".{name}") for each in unexpected)]
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
            f"they may be there under other names, as part of a larger model ({unexpected[0]}, …): "
            "take its config.json, or rename them"
            if renamed
            else "config.json has more layers than the weights, or weights are missing or renamed",
        ),
        (
            unlisted,
            f"in the files, but not in {_INDEX}, by which they are found",
            "the index is incomplete: fetch it again, or save the checkpoint anew",
        ),
        (
            [] if renamed else unexpected,
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
            message=f"{_counted(names)} {what}: {some(names)}",
            hint=hint,
            where=str(folder),
        )
        for names, what, hint in findings
        if names
    ]
    if problems:
        raise CheckpointError(problems)


def verify_dtypes(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    model: PreTrainedModel,
    left_out: Collection[str] = (),
) -> None:
    """Raise CheckpointError for weights that are not plain floating point numbers.

    For checkpoints that do not say that they are quantized; those of `left_out` are no matter.
    transformers takes what there is: codes without their scales as weights, of complex numbers the
    real part.
    """
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]
    odd = [
        f"{name} is {info.dtype}"
        for name, info in tensors.items()
        if info.dtype not in FLOATS
        and name not in left_out
        and not buffers & {name, prefix + name, name.removeprefix(prefix)}
        and not any(each.search(name) for each in ignored)
    ]
    if odd := _unmatched(odd, [f"{pattern} is *" for pattern in _RELICS]):
        message = (
            f"{_counted(odd)} of a kind that cannot be weights: {some(odd)}; needed: "
            f"{', '.join(FLOATS)}, for config.json has no quantization_config"
        )
        hint = "if they are packed, config.json lacks its quantization_config: fetch both again"
        raise bad_file(folder, message, hint, "dtype")


def _linear_mismatches(
    tensors: Mapping[str, TensorInfo], model: PreTrainedModel, reshaped: list[re.Pattern[str]]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    packed = _packed_in_4_bits(tensors)
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight not in tensors or weight in packed:
            continue
        if any(each.search(weight) for each in reshaped):
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

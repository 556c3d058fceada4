"""What a folder can be that is no checkpoint of transformers, and what to type instead.

By the names in it; where that says more, by a small JSON file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a folder can be."""

    signs: tuple[str, ...]
    """Patterns of names, of subfolders with a slash behind: for each there is one."""
    what: str
    hint: str = ""
    """What to type instead; {file} is the first name that the last sign matches."""
    asks: Callable[[Path], tuple[str, str]] | None = None
    """Reads more: what to say behind `what`, and the hint."""
    without: tuple[str, ...] = ()
    """Patterns of names that are not there."""
    weights: bool = False
    """Its weights are of no use here, but its config.json may be there, and right."""
    anyway: bool = False
    """It holds whatever else is there."""

    def told(self, folder: Path, found: str) -> tuple[str, str]:
        """Return what to say, and the hint."""
        more, hint = ("", self.hint) if self.asks is None else self.asks(folder)
        return self.what.replace("{file}", found) + more, hint.replace("{file}", found)


_HUB = "take the model in the format of transformers (config.json and safetensors), from the hub"
TEXT = "take a model that continues text: model.path=FOLDER_OR_HUB_ID"
ORIGINAL = "take the original checkpoint: model.path=FOLDER_OR_HUB_ID"
_WHOLE = ", then put config.json and tokenizer into that folder, and give it as model.path"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")

DATASETS = ("dataset_infos.json", "dataset_dict.json", "*.arrow", "*.parquet", "*.jsonl")

EXPORTS = {
    ("genai_config.json",): "an export to ONNX, for onnxruntime-genai",
    ("*.onnx",): "an export to ONNX",
    ("onnx/",): "an export to ONNX",
    ("*.xml", "*.bin"): "an export to OpenVINO",
    ("weights.npz",): "a model of MLX, for the GPUs of Apple",
    ("mlc-chat-config.json",): "a model compiled for MLC",
    ("*.engine",): "an engine of TensorRT",
    ("rank0.safetensors",): "a checkpoint of TensorRT-LLM",
    ("*.nemo",): "a checkpoint of NeMo",
    ("*.mlpackage/",): "a model of Core ML",
    ("*.tflite",): "a model of LiteRT (TensorFlow Lite)",
    ("*.pte",): "a model of ExecuTorch",
    ("model.bin", "*vocabulary*"): "a model of CTranslate2",
    ("model-rank-*-part-*.safetensors",): "a model in the pieces of vLLM",
    ("latest_checkpointed_iteration.txt",): "a checkpoint of Megatron",
    ("tf_model*.h5",): "a model with weights of TensorFlow",
    ("saved_model.pb",): "a model of TensorFlow",
    ("*.ckpt.index",): "a checkpoint of TensorFlow",
    ("*.keras",): "a model of Keras",
    ("model.weights.h5",): "a model of Keras",
    ("flax_model*.msgpack",): "a model with weights of Flax",
    ("rust_model.ot",): "a model with weights of rust-bert",
    ("ggml*.bin",): "a model in GGML, a former format of llama.cpp",
    ("open_clip_config.json",): "a model of OpenCLIP, which sees images",
}
"""Signs → what other programs run."""


def typed(folder: Path) -> str:
    """Return how a folder is typed: in the hub's cache, by the name that the hub has for it."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return str(folder)


def given(folder: Path | str) -> str:
    """Return the override that gives a folder, quoted where the command line needs that."""
    plain = re.fullmatch(r"[\w./~@+-]+", str(folder))
    return f"model.path={folder}" if plain else f"\"model.path='{folder}'\""


def _json(file: Path) -> dict[str, Any]:
    """Return a small JSON file; empty where it is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _adapter(folder: Path) -> tuple[str, str]:
    stated = _json(folder / "adapter_config.json")
    base, kind = stated.get("base_model_name_or_path"), str(stated.get("peft_type") or "LORA")
    of = f" ({kind}) of {base}" if base else f" ({kind}), which does not say of which model"
    if kind not in ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA"):
        return of, f"{given(base or 'BASE')}: this kind cannot be merged into the weights"
    if (folder / "config.json").is_file():
        of += (
            ", beside a whole model: transformers adds it or does not, by whether peft is installed"
        )
        away = f"move adapter_config.json and adapter_model.* out of {typed(folder)} if it is "
        return of, away + "merged already, or is not to be used"
    name, base = typed(folder), str(base or "BASE")
    words = name if (folder / "tokenizer_config.json").is_file() else base
    merged = f"{Path(os.path.abspath(name)).name}-merged"
    return of, (
        f"merge it: pip install peft, then python -c "
        f'"from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer '
        f"as T; M.from_pretrained({name!r}).merge_and_unload().save_pretrained({merged!r}); "
        f'T.from_pretrained({words!r}).save_pretrained({merged!r})", and give that '
        f"folder as model.path; without the adapter: {given(base)}"
    )


def gguf_files(folder: Path) -> list[str]:
    """Return the names of a folder's GGUF files that may be models; of a split one the first."""
    other = re.compile(r"mmproj|imatrix|.*-(?!00001)\d{5}-of-\d{5}\.gguf\Z")
    return sorted(each.name for each in folder.glob("*.gguf") if not other.match(each.name))


def gguf_hint(folder: Path, file: str) -> str:
    """Return how a GGUF file is run."""
    return f"{given(typed(folder))} load=gguf load.file={file}"


def _gguf(folder: Path) -> tuple[str, str]:
    return "", gguf_hint(folder, next(iter(gguf_files(folder)), "{file}"))


def _snapshots(folder: Path) -> tuple[str, str]:
    kind, _, _ = folder.name.partition("--")
    return ("", _cached(folder)) if kind == "models" else (f", of {kind}", TEXT)


def _cached(folder: Path) -> str:
    """Return how a model in a folder of a hub's cache is given: by name in the one in use."""
    from huggingface_hub import constants

    main = folder / "refs" / "main"
    commit = main.read_text("utf-8").strip() if main.is_file() else ""
    there = sorted(each.name for each in (folder / "snapshots").glob("*") if each.is_dir())
    commit = commit if commit in there else next(iter(there), "")
    inside = given(folder / "snapshots" / commit) if commit else ""
    if folder.parent.resolve() != Path(constants.HF_HUB_CACHE).resolve():
        return inside or TEXT
    name = given(folder.name.removeprefix("models--").replace("--", "/", 1))
    return f"{name}, or {inside}" if inside else name


def _cache(folder: Path) -> tuple[str, str]:
    models = sorted(folder.glob("models--*"))
    return f", with {len(models)} models", ", or ".join(_cached(each) for each in models[:5])


def _checkpoints(folder: Path) -> tuple[str, str]:
    steps = {
        int(found[1]): each
        for each in folder.iterdir()
        if each.is_dir() and (found := re.fullmatch(r"checkpoint-(\d+)", each.name))
    }
    last = steps[max(steps)]
    if (last / "adapter_config.json").is_file():
        what, hint = _adapter(last)
        return f": checkpoints of an adapter{what}", hint
    best = Path(str(_json(last / "trainer_state.json").get("best_model_checkpoint") or "")).name
    judged = f" (the best in its own judgement: {best})" if best else ""
    listed = ", ".join(steps[step].name for step in sorted(steps))
    return f": {listed}", f"the last: {given(last)}{judged}"


KINDS = (
    Kind(("adapter_config.json",), "an adapter of peft", asks=_adapter, anyway=True),
    Kind(("pytorch_lora_weights.safetensors",), "an adapter of diffusers", TEXT),
    Kind(
        ("modules.json",),
        "a model of sentence-transformers: it makes embeddings of texts, and continues none",
        TEXT,
        anyway=True,
    ),
    Kind(("model_index.json",), "a pipeline of diffusers, which makes images", TEXT),
    Kind(("snapshots/", "blobs/"), "a folder of the hub's cache", asks=_snapshots),
    Kind(("models--*/",), "the hub's cache", asks=_cache),
    Kind(
        ("manifests/", "blobs/"),
        "the store of Ollama, whose blobs are GGUF files",
        "copy the model's blob to FOLDER/model.gguf, beside config.json and tokenizer of the "
        "original checkpoint: model.path=FOLDER load=gguf load.file=model.gguf",
    ),
    Kind(
        ("zero_to_fp32.py",),
        "a checkpoint of DeepSpeed, whose weights are in pieces",
        "in it: python zero_to_fp32.py . whole --safe_serialization" + _WHOLE,
        weights=True,
    ),
    Kind(
        ("pytorch_model_fsdp_*/",),
        "a checkpoint of FSDP, whose weights are in pieces",
        "in it: accelerate merge-weights {file} whole" + _WHOLE,
        weights=True,
    ),
    Kind(
        ("*.distcp",),
        "the pieces of a checkpoint of FSDP",
        "accelerate merge-weights FOLDER whole" + _WHOLE,
        weights=True,
    ),
    Kind(("checkpoint-[0-9]*/",), "what a training run saved", asks=_checkpoints),
    Kind(
        ("params.json", "consolidated*"),
        "a checkpoint in the format of its makers (Llama, Mistral), which transformers does not "
        "load",
        _HUB,
    ),
    *(Kind((sign,), "a dataset", TEXT + "; text goes in by -p @FILE") for sign in DATASETS),
    Kind(("*.gguf",), "a folder of GGUF files, of llama.cpp", asks=_gguf, weights=True),
    *(Kind(signs, what, _HUB, weights=True) for signs, what in EXPORTS.items()),
    Kind(
        ("measurement.json",),
        "what ExLlamaV2 measures before it packs a model",
        ORIGINAL,
        without=_WEIGHTS,
    ),
    Kind(
        ("quanto_qmap.json",),
        "a model packed by optimum-quanto itself, which transformers does not load",
        ORIGINAL + " quantize=quanto",
        anyway=True,
    ),
    Kind(
        ("tokenizer*.json",),
        "a tokenizer without its model",
        "put config.json and the weights of its model beside it",
        without=_WEIGHTS,
    ),
    Kind(
        ("optimizer.pt",),
        "the state of a training run without its model",
        "put the model beside it, as model.save_pretrained(FOLDER) does",
        without=("*.safetensors", "pytorch_model*"),
        weights=True,
    ),
)
"""The first that fits tells: what is found in folders of other kinds, too, comes late."""

UNUSUAL = (
    Kind(
        ("model-*-of-*.safetensors",),
        "a folder with shards and without their index",
        "fetch model.safetensors.index.json too",
    ),
    Kind(
        ("*.safetensors",),
        "a folder with weights under another name: {file}",
        "if these are the model's weights, name the file model.safetensors",
    ),
    Kind(
        ("*.pt*",),
        "a folder with pickled weights under a name that transformers does not look for: {file}",
        _HUB,
        without=("pytorch_model*.bin",),
    ),
)
"""Weights beside a config.json that would not be found."""

"""Folders that are something else than a checkpoint are named for what they are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine import recipe, verdict
from engine.errors import CheckpointError
from engine.loading.checkpoint import fetch_weights, locate, read_config, verify_files
from engine.loading.folder_kinds import KINDS, UNUSUAL, Kind
from engine.loading.model_folder import refuse_listed
from tests.conftest import Build
from tests.hub import Hub
from tests.models import tiny_config
from tests.refusal import refusal

Model = Callable[[str], Path]

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}
CONFIG = json.loads(tiny_config("llama").to_json_string())

FOLDERS: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "lora": (
        {"adapter_config.json": LORA, "adapter_model.safetensors": ""},
        r"adapter of peft \(LORA\) of org/base",
        r"M\.from_pretrained\('.*lora'\)\.merge_and_unload\(\)\.save_pretrained\('lora-merged'\).*"
        r"T\.from_pretrained\('org/base'\).*that folder as model\.path.*model\.path=org/base",
    ),
    "lora with words": (
        {"adapter_config.json": LORA, "tokenizer_config.json": {}},
        "adapter of peft",
        r"T\.from_pretrained\('.*lora with words'\)",
    ),
    "prompt tuning": (
        {"adapter_config.json": {"peft_type": "PROMPT_TUNING"}},
        "which does not say of which model",
        "cannot be merged",
    ),
    "lora beside a model": (
        {"adapter_config.json": LORA, "config.json": CONFIG, "model.safetensors": ""},
        "beside a whole model",
        r"move adapter_config\.json",
    ),
    "diffusers lora": ({"pytorch_lora_weights.safetensors": ""}, "adapter of diffusers", "text"),
    "sentence-transformers": (
        {"modules.json": [], "config.json": {"model_type": "qwen3"}, "model.safetensors": ""},
        "makes embeddings",
        "a model that continues text",
    ),
    "diffusers": ({"model_index.json": {}, "unet/config.json": {}}, "diffusers", "continues text"),
    "a part of diffusers": (
        {"config.json": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.3"}},
        r"a part of a pipeline of diffusers \(UNet2DConditionModel\)",
        "continues text",
    ),
    "models--org--name": (
        {"snapshots/abc/config.json": CONFIG, "blobs/1": "", "refs/main": "abc"},
        "a folder of the hub's cache",
        r"model\.path=.*/models--org--name/snapshots/abc",
    ),
    "datasets--org--name": ({"snapshots/abc/x": "", "blobs/1": ""}, "of datasets", "continues"),
    "hub": (
        {"models--org--one/snapshots/x/a": "", "models--org--two/snapshots/x/a": ""},
        "the hub's cache, with 2 models",
        r"model\.path=.*one/snapshots/x, or model\.path=.*two/snapshots/x",
    ),
    "ollama": ({"manifests/registry/x": "", "blobs/sha256-1": ""}, "Ollama", "load=gguf"),
    "deepspeed": (
        {"config.json": CONFIG, "zero_to_fp32.py": "", "global_step9/x_optim_states.pt": ""},
        "a checkpoint of DeepSpeed",
        r"python zero_to_fp32\.py \. whole --safe_serialization",
    ),
    "fsdp": (
        {"config.json": CONFIG, "pytorch_model_fsdp_0/.metadata": "", "optimizer.pt": ""},
        "a checkpoint of FSDP",
        "accelerate merge-weights pytorch_model_fsdp_0/ whole",
    ),
    "fsdp pieces": ({"__0_0.distcp": "", ".metadata": ""}, "pieces of .* FSDP", "merge-weights"),
    "training": (
        {
            "checkpoint-500/config.json": CONFIG,
            "checkpoint-1000/config.json": CONFIG,
            "checkpoint-1000/trainer_state.json": {"best_model_checkpoint": "out/checkpoint-500"},
            "runs/x": "",
        },
        "a training run saved: checkpoint-500, checkpoint-1000",
        r"model\.path=.*/checkpoint-1000 \(the best in its own judgement: checkpoint-500\)",
    ),
    "training of a lora": (
        {"checkpoint-9/adapter_config.json": LORA},
        r"checkpoints of an adapter \(LORA\) of org/base",
        r"from_pretrained\('.*checkpoint-9'\)\.merge_and_unload",
    ),
    "llama original": (
        {"params.json": {}, "consolidated.00.pth": "", "tokenizer.model": ""},
        "the format of its makers",
        "in the format of transformers",
    ),
    "dataset infos": ({"dataset_infos.json": {}}, "a dataset", "-p @FILE"),
    "dataset dict": ({"dataset_dict.json": {}, "train/x.arrow": ""}, "a dataset", "-p @FILE"),
    "arrow": ({"data-0.arrow": "", "state.json": {}}, "a dataset", "-p @FILE"),
    "parquet": ({"README.md": "", "data/train-0.parquet": ""}, "a dataset", "-p @FILE"),
    "lines": ({"train.jsonl": ""}, "a dataset", "-p @FILE"),
    "gguf": (
        {"m.Q4_K_M.gguf": ""},
        "GGUF files",
        r"model\.path=\S+ load=gguf load\.file=m\.Q4_K",
    ),
    "gguf and config": ({"m.gguf": "", "config.json": CONFIG}, "GGUF files", "load.file=m.gguf"),
    "onnx genai": ({"genai_config.json": {}, "model.onnx": ""}, "onnxruntime-genai", "safetensors"),
    "onnx": ({"config.json": CONFIG, "model_q4.onnx": ""}, "an export to ONNX", "safetensors"),
    "onnx inside": ({"config.json": CONFIG, "onnx/model.onnx": ""}, "to ONNX", "safetensors"),
    "openvino": (
        {"config.json": CONFIG, "openvino_model.xml": "", "openvino_model.bin": ""},
        "OpenVINO",
        "safetensors",
    ),
    "mlx": ({"weights.npz": "", "config.json": CONFIG}, "MLX", "safetensors"),
    "mlx packed": (
        {"config.json": {**CONFIG, "quantization": {"group_size": 64, "bits": 4}}},
        "packed by MLX, for the GPUs of Apple, in 4 bits",
        "quantize=nf4",
    ),
    "mlc": ({"mlc-chat-config.json": {}, "params_shard_0.bin": ""}, "MLC", "safetensors"),
    "tensorrt": ({"config.json": {"x": 1}, "rank0.engine": ""}, "TensorRT", "safetensors"),
    "tensorrt-llm": (
        {"config.json": {"architecture": "LlamaForCausalLM"}, "rank0.safetensors": ""},
        "TensorRT-LLM",
        "safetensors",
    ),
    "nemo": ({"model.nemo": ""}, "NeMo", "safetensors"),
    "core ml": ({"m.mlpackage/x": ""}, "Core ML", "safetensors"),
    "lite": ({"m.tflite": ""}, "LiteRT", "safetensors"),
    "executorch": ({"m.pte": ""}, "ExecuTorch", "safetensors"),
    "ctranslate2": (
        {"model.bin": "", "config.json": {"bos_token": "<s>"}, "vocabulary.json": []},
        "CTranslate2",
        "safetensors",
    ),
    "vllm": ({"config.json": CONFIG, "model-rank-0-part-0.safetensors": ""}, "vLLM", "safetens"),
    "megatron": ({"latest_checkpointed_iteration.txt": "9"}, "Megatron", "safetensors"),
    "tensorflow": ({"config.json": CONFIG, "tf_model.h5": ""}, "weights of TensorFlow", "safeten"),
    "saved model": ({"saved_model.pb": "", "variables/x": ""}, "model of TensorFlow", "safeten"),
    "tf checkpoint": ({"model.ckpt.index": ""}, "checkpoint of TensorFlow", "safetensors"),
    "keras file": ({"m.keras": ""}, "Keras", "safetensors"),
    "keras": ({"model.weights.h5": "", "config.json": {}}, "Keras", "safetensors"),
    "flax": ({"config.json": CONFIG, "flax_model.msgpack": ""}, "weights of Flax", "safetensors"),
    "rust": ({"config.json": CONFIG, "rust_model.ot": ""}, "rust-bert", "safetensors"),
    "ggml": ({"ggml-model-q4_0.bin": ""}, "GGML", "safetensors"),
    "open_clip": ({"open_clip_config.json": {}, "open_clip_model.safetensors": ""}, "OpenCLIP", ""),
    "timm": (
        {
            "config.json": {"architecture": "resnet50", "pretrained_cfg": {}},
            "model.safetensors": "",
        },
        r"a model of timm \(resnet50\)",
        "continues text",
    ),
    "exllama": ({"measurement.json": {}}, "ExLlamaV2", "the original checkpoint"),
    "quanto": (
        {"config.json": CONFIG, "quanto_qmap.json": {}, "model.safetensors": ""},
        "packed by optimum-quanto itself",
        "quantize=quanto",
    ),
    "tokenizer": (
        {"tokenizer.json": {}, "tokenizer_config.json": {}},
        "a tokenizer without",
        "put",
    ),
    "trained": (
        {"config.json": CONFIG, "optimizer.pt": "", "scheduler.pt": "", "rng_state.pth": ""},
        "the state of a training run without its model",
        "save_pretrained",
    ),
    "no index": (
        {"config.json": CONFIG, "model-00001-of-00002.safetensors": ""},
        "shards and without their index",
        r"model\.safetensors\.index\.json",
    ),
    "variant": (
        {"config.json": CONFIG, "model.fp16.safetensors": ""},
        r"under another name: model\.fp16\.safetensors",
        "name the file model.safetensors",
    ),
    "pickle of another name": (
        {"config.json": CONFIG, "consolidated.00.pth": ""},
        r"pickled weights under a name .*: consolidated\.00\.pth",
        "safetensors",
    ),
    "some models": (
        {"one/config.json": CONFIG, "two/config.json": CONFIG, "three/x": ""},
        "the models are in these: one, two",
        r"\"model\.path='.*/some models/one'\"",
    ),
}
"""Name of a folder: its files, what is said, and what to type."""


def made(where: Path, name: str) -> Path:
    folder = where / name
    folder.mkdir()
    for path, content in FOLDERS[name][0].items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def said(folder: Path) -> str:
    def read(folder: Path) -> None:
        read_config(folder)
        verify_files(folder)

    return refusal(read, folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    _, what, hint = FOLDERS[name]
    message, typed = said(made(tmp_path, name)).split("\n")
    assert re.search(what, message), message
    assert re.search(hint, typed), typed


def test_every_kind_of_the_table_was_tried(tmp_path: Path) -> None:
    told = "\n".join(said(made(tmp_path, name)) for name in FOLDERS)
    never = [kind.signs for kind in (*KINDS, *UNUSUAL) if kind.what.partition("{")[0] not in told]
    assert never == []


def test_a_broken_file_is_no_way_out(tmp_path: Path) -> None:
    words = [f"model.path={made(tmp_path, 'gguf')}"]
    (problem,) = verdict.check(recipe.compose("base", words)).problems
    assert "GGUF files" in problem.message
    assert problem.hint.startswith("what would run it is refused, too; take another model: ")


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"gguf", "gguf and config", "hub"}))
def test_check_says_so_too(tmp_path: Path, name: str) -> None:
    """And leaves in the hint what it has tried."""
    _, what, hint = FOLDERS[name]
    folder = made(tmp_path, name)
    (problem,) = verdict.check(recipe.compose("base", [f"model.path={folder}"])).problems
    assert re.search(what, problem.message), problem.message
    assert re.search(hint, problem.hint), problem.hint


def test_the_cache_in_use_gives_models_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = made(tmp_path, "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    assert "model.path=org/one, or model.path=/" in said(folder)


def test_drafts_too(tmp_path: Path, model: Model) -> None:
    for name in ("lora", "training", "tensorflow"):
        folder = made(tmp_path, name)
        if name == "training":
            shutil.copytree(model("llama"), folder / "checkpoint-1000", dirs_exist_ok=True)
        words = [f"model.path={model('llama')}", "decode=assisted", f"decode.draft={folder}"]
        (problem,) = verdict.check(recipe.compose("base", words)).problems
        assert problem.message.startswith(f"decode.draft={folder}: {folder} is ")
        assert "model.path=" not in problem.hint
        assert "decode.draft=" in problem.hint


def test_a_sound_checkpoint_is_none_of_these(model: Model, tmp_path: Path, build: Build) -> None:
    """What training, other programs and the hub leave beside a model does no harm."""
    folder = Path(shutil.copytree(model("llama"), tmp_path / "checkpoint-500"))
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "x.gguf"):
        (folder / name).write_bytes(b"x")
    for name in ("tf_model.h5", "pytorch_model.bin", "rust_model.ot", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "params.json").write_text("{}")
    for inside in ("onnx", "checkpoint-9", "blobs", "snapshots", "data"):
        (folder / inside).mkdir()
    (folder / "data" / "train.jsonl").write_text("{}")
    session = build(f"model.path={folder}")
    assert session.generate("x").token_ids
    evidence = session.receipts[0].evidence
    assert evidence["safetensors files left out"] == "consolidated.safetensors"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("m.gguf", r"model\.path=.* load=gguf load\.file=m\.gguf"),
        ("model.safetensors", "its folder: model.path="),
        ("pytorch_model.bin", "its folder: model.path="),
    ],
)
def test_files(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    told = refusal(locate, str(tmp_path / name), None, download=False)
    assert ("load=gguf" if name == "m.gguf" else "a folder with config.json in it") in told
    (tmp_path / "config.json").write_text("{}")
    assert re.search(hint, refusal(locate, str(tmp_path / name), None, download=False))


def test_small_files_that_are_pointers(model: Model, tmp_path: Path, build: Build) -> None:
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a git-lfs pointer") as caught:
        build(f"model.path={folder}")
    assert "git lfs pull" in caught.value.problems[0].hint
    (folder / "model.safetensors").write_text(pointer)
    found = verdict.check(recipe.compose("base", [f"model.path={folder}"]))
    assert "git lfs pull" in found.problems[0].hint


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": LORA, "adapter_model.safetensors": ""}, "of org/base"),
        ({"m.gguf": "", "README.md": ""}, "GGUF files"),
        ({"onnx/model.onnx": ""}, "an export to ONNX"),
        ({"unet/config.json": {}, "model_index.json": {}}, "a pipeline of diffusers"),
        ({"config.json": CONFIG, "tf_model.h5": ""}, "weights of TensorFlow"),
        ({"config.json": CONFIG, "m.gguf": ""}, "load=gguf load.file=m.gguf"),
        ({"config.json": CONFIG, "tf_model.h5": "", "pytorch_model.bin": ""}, "as pickle"),
    ],
)
def test_models_of_the_hub(hub: Hub, files: Mapping[str, Any], what: str) -> None:
    hub.files = {
        name: (content if isinstance(content, str) else json.dumps(content)).encode()
        for name, content in files.items()
    }

    def fetch() -> None:
        folder = locate("org/model", None, download=True) or Path()
        refuse_listed("org/model", None, folder)
        read_config(folder)
        fetch_weights("org/model", None)

    message = refusal(fetch)
    assert what in message
    assert "org/model is" in message or "pickle" in message


def test_kinds_have_something_to_type() -> None:
    kinds: list[Kind] = [*KINDS, *UNUSUAL]
    assert all(kind.hint or kind.asks for kind in kinds)

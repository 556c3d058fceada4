"""Models that see images, run for text alone: as plain transformers runs their text, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from engine.errors import CheckpointError
from tests.conftest import Build
from tests.models import CONTEXT, VOCABULARY, tiny_tokenizer
from tests.plugins.helpers import receipt

IDS = [5, 70, 9, 200, 33]
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 16},
        "vision_config": EYES,
        "mm_tokens_per_image": 4,
        "image_token_index": 319,
    },
    "llama4": {
        "text_config": {
            **TEXT, "num_local_experts": 2, "intermediate_size_mlp": 128,
            "attention_chunk_size": 64,
        },
        "vision_config": {
            **EYES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            "intermediate_size": 128,
        },
        "image_token_index": 319,
    },
    "mllama": {
        "text_config": {
            **TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14,
            "vision_output_dim": 64, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
        },
        "image_token_index": 319,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**EYES, "model_type": "clip_vision_model"},
        "image_token_index": 319,
    },
}  # fmt: skip

Folder = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return the folder of a whole model, and its logits for text, by transformers alone."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def folder(kind: str) -> tuple[Path, torch.Tensor]:
        if kind not in made:
            where = tmp_path_factory.mktemp(kind)
            auto: Any = AutoModelForImageTextToText
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                model = auto.from_config(AutoConfig.for_model(kind, **CONFIGS[kind])).eval()
            model.save_pretrained(where)
            tiny_tokenizer().save_pretrained(where)
            model = auto.from_pretrained(where, attn_implementation="eager").eval()
            with torch.no_grad():
                made[kind] = where, model(torch.tensor([IDS])).logits
        return made[kind]

    return folder


def _logits(session: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = session.model(torch.tensor([IDS])).logits
    return logits


@pytest.mark.parametrize("words", [[], ["quantize=int8"], ["heads=grouped"]])
@pytest.mark.parametrize("kind", ["gemma3", "llama4", "mllama"])
def test_whole_models(build: Build, seeing: Folder, kind: str, words: list[str]) -> None:
    folder, logits = seeing(kind)
    session = build(f"model.path={folder}", "attention=eager", *words)
    if not words:
        assert torch.allclose(_logits(session), logits, atol=1e-5)
    shown = receipt(session, "load")
    has_eyes = any("vision" in name for name, _ in session.model.named_parameters())
    assert ("tensors of parts that see or hear, left out" in shown.evidence) != has_eyes
    assert shown.claim.startswith("all of the" if has_eyes else "all that the text model has")


def test_what_only_sees_is_refused(build: Build, seeing: Folder) -> None:
    with pytest.raises(CheckpointError, match="no model of llava that continues text"):
        build(f"model.path={seeing('llava')[0]}")


def _extracted(source: Path, folder: Path, names: Callable[[str], Iterator[str]]) -> Path:
    """Write a folder with the config of the text alone, and tensors under other names."""
    config = json.loads((source / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(source / "model.safetensors")
    kept = {new: tensor.clone() for name, tensor in held.items() for new in names(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _plain(name: str) -> Iterator[str]:
    yield name.removeprefix("language_model.")


def _without_eyes(name: str) -> Iterator[str]:
    if name.startswith("language_model."):
        yield name.removeprefix("language_model.")


def _as_they_were(name: str) -> Iterator[str]:
    yield name


def _inside(name: str) -> Iterator[str]:
    yield name.replace("language_model.model.", "model.language_model.")


def _one_lost(name: str) -> Iterator[str]:
    if "layers.1.mlp.up_proj" not in name:
        yield from _plain(name)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (_plain, ""),
        (_without_eyes, ""),
        (_as_they_were, r"21 tensors missing[\s\S]*other names[\s\S]*language_model\.lm_head"),
        (_inside, r"21 tensors missing[\s\S]*other names"),
        (_one_lost, r"1 tensor missing .*: model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_the_text_part_of_one(
    build: Build, seeing: Folder, tmp_path: Path, names: Callable[[str], Iterator[str]], says: str
) -> None:
    source, logits = seeing("llava")
    folder = _extracted(source, tmp_path, names)
    words = (f"model.path={folder}", "attention=eager")
    if says:
        with pytest.raises(CheckpointError, match=says):
            build(*words)
        return
    assert torch.allclose(_logits(build(*words)), logits, atol=1e-5)


def test_other_surplus_is_refused_beside_that(build: Build, seeing: Folder, tmp_path: Path) -> None:
    def more(name: str) -> Iterator[str]:
        yield from _plain(name)
        if name.endswith("layers.1.mlp.up_proj.weight"):
            yield "model.layers.1.mlp.vision_proj.weight"

    folder = _extracted(seeing("llava")[0], tmp_path, more)
    with pytest.raises(CheckpointError, match=r"without a place .*vision_proj"):
        build(f"model.path={folder}")

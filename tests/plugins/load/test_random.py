"""load=random makes weights from a seed, and composes with what changes weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError
from engine.plugins.load.random import Random
from tests.conftest import Build
from tests.models import FAMILIES
from tests.plugins.helpers import hints, logits, receipt, relative, shape_of, verdict

DIGEST = "SHA-256 of 1024 values per tensor"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_are_needed(
    build: Build, model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    for file in model(family).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    session = build(f"model.path={tmp_path}", "load=random", family=family)
    assert session.generate("def add").token_ids


def test_a_seed_is_a_model(build: Build) -> None:
    def digest(*overrides: str) -> str:
        return str(receipt(build("load=random", *overrides), "load").evidence[DIGEST])

    first = digest()
    torch.manual_seed(99)
    assert digest() == first
    assert digest("seed=1") == digest("load.seed=1") != first
    assert digest("seed=1", "load.seed=0") == first
    assert digest("model.dtype=bfloat16") != first


def test_the_callers_random_state_is_left_alone(build: Build) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    build("load=random")
    assert torch.rand(1).equal(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_can_be_quantized(build: Build, bits: int) -> None:
    session = build("load=random", "quantize=bitsandbytes", f"quantize.bits={bits}")
    exact = build("load=random")
    assert receipt(session, "quantize").evidence["layers packed"] == 14
    assert relative(logits(session.model), logits(exact.model)) < {8: 0.1, 4: 0.8}[bits]


def test_tied_weights_stay_tied_when_quantized(build: Build) -> None:
    session = build("load=random", "quantize=bitsandbytes", family="gemma3")
    assert session.model.lm_head.weight is session.model.model.embed_tokens.weight


def test_it_can_have_fewer_heads(build: Build) -> None:
    session = build("load=random", "heads=grouped")
    found = receipt(session, "heads")
    assert found.evidence["rows of each"] == "16"
    assert "largest difference from the checkpoint's mean" not in found.evidence


def test_a_missing_config_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build(f"model.path={tmp_path}", "load=random")


def test_constant_weights_are_no_proof(build: Build) -> None:
    session = build("load=random")
    embedding: Any = session.model.get_input_embeddings()
    assert verdict(Random(), session)
    assert not verdict(Random(), session, device=torch.device("meta"))
    torch.nn.init.ones_(embedding.weight)
    assert not verdict(Random(), session)


def test_weights_that_changed_after_they_were_made_are_no_proof(build: Build) -> None:
    session = build("load=random")
    torch.nn.init.zeros_(session.model.model.norm.weight)
    assert not verdict(Random(), session)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_biases_that_packed_layers_cast_are_no_change(build: Build, family: str) -> None:
    assert build("load=random", "quantize=nf4", "model.dtype=bfloat16", family=family).receipts
    assert build("quantize=nf4", "model.dtype=bfloat16", family=family).receipts


def test_a_packed_checkpoint_cannot_be_made_up(model: Callable[[str], Path]) -> None:
    shape = replace(shape_of(model("llama")), quantization="gptq")
    assert hints(Random(), shape) == ["load=transformers, or the original checkpoint as model.path"]
    assert hints(Random(), shape_of(model("llama"))) == hints(Random()) == []

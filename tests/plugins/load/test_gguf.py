"""load=gguf reads what llama.cpp writes: the same tokens as the weights that went into the file."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import recipe, verdict
from engine.errors import CheckpointError
from engine.plugins.load.gguf import Gguf
from tests.conftest import Build
from tests.gguf_files import Change, write_gguf
from tests.models import tiny_model
from tests.plugins.helpers import logits, plain, priced, receipt, relative
from tests.plugins.helpers import verdict as holds

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return the model's folder as one with a GGUF file has it: without safetensors."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def pack(folder: Path, kind: str = "F32", change: Change = lambda tensors: None) -> list[str]:
    """Put a GGUF file in the place of the weights, and return the recipe that loads it."""
    file = write_gguf(folder, kind, change)
    (folder / "model.safetensors").unlink()
    return [f"model.path={folder}", "load=gguf", f"load.file={file.name}", "attention=eager"]


@pytest.mark.parametrize(("kind", "error"), [("F32", 0.0), ("F16", 2e-3), ("Q8_0", 5e-2)])
def test_a_file_gives_the_weights_that_went_in(
    build: Build, original: Path, folder: Path, kind: str, error: float
) -> None:
    reference = plain(original)
    session = build(*pack(folder, kind))
    assert relative(logits(session.model), logits(reference)) <= error
    evidence = receipt(session, "load").evidence
    assert evidence[f"tensors in {kind}"] == (21 if kind == "F32" else 16)
    assert evidence["bytes"] == 4 * reference.num_parameters() + 4 * 2 * 8
    if kind == "F32":
        for name, tensor in reference.state_dict().items():
            assert session.model.state_dict()[name].equal(tensor)
        exact = build(f"model.path={original}", "attention=eager")
        assert session.generate("def add").token_ids == exact.generate("def add").token_ids


def test_unpacked_blocks_are_what_gguf_unpacks(build: Build, folder: Path) -> None:
    session = build(*pack(folder, "Q8_0"))
    import gguf

    reader = gguf.GGUFReader(folder / "Q8_0.gguf")
    (stored,) = [each for each in reader.tensors if each.name == "blk.1.ffn_up.weight"]
    expected = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert session.model.model.layers[1].mlp.up_proj.weight.equal(expected)


def test_it_goes_with_fewer_heads_and_other_positions(
    build: Build, original: Path, folder: Path
) -> None:
    words = pack(folder)
    for other in (["heads=grouped"], ["position_encoding=yarn"], ["cache=static"]):
        expected = build(f"model.path={original}", "attention=eager", *other)
        assert logits(build(*words, *other).model).equal(logits(expected.model)), other


def test_faults_are_refused(build: Build, original: Path, folder: Path, tmp_path: Path) -> None:
    def nan(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_up.weight"] = np.full_like(tensors["blk.0.ffn_up.weight"], np.nan)

    faults: dict[str, Change] = {
        r"1 tensor missing.*up_proj": lambda tensors: tensors.pop("blk.1.ffn_up.weight"),
        r"no place in LlamaForCausalLM for blk\.7\.more": lambda tensors: tensors.update(
            {"blk.7.more.weight": np.ones((32, 32), np.float32)}
        ),
        r"not finite: model\.layers\.0\.mlp\.up_proj": nan,
    }
    for number, (message, change) in enumerate(faults.items()):
        copy = Path(shutil.copytree(original, tmp_path / str(number)))
        with pytest.raises(CheckpointError, match=message):
            build(*pack(copy, change=change))
    words = pack(folder)
    file = folder / "F32.gguf"
    whole = file.read_bytes()
    for damaged in (whole[:1000], b"<html>", whole[:-5000]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"F32\.gguf is no whole GGUF file"):
            build(*words)


def test_a_config_of_another_model_is_refused(build: Build, folder: Path) -> None:
    words = pack(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match="num_key_value_heads is 2 in the file and 4 in con"):
        build(*words)


def test_checksums_cover_the_file(build: Build, folder: Path) -> None:
    words = pack(folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  F32.gguf\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS says 0000"):
        build(*words)


def test_check_refuses_what_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = pack(folder)

    def codes(*more: str) -> dict[str, str]:
        found = verdict.check(recipe.compose("base", [*words, *more]))
        return {problem.code: f"{problem.message} {problem.hint}" for problem in found.problems}

    assert codes() == {}
    assert "load.file=F32.gguf" in codes("load.file=other.gguf")["value"]
    assert "names no .gguf file" in codes("load.file=../F32.gguf")["value"]
    assert "names no .gguf file" in codes("load.file=''")["value"]
    assert "quantize=none" in codes("quantize=nf4")["gguf-packed"]
    weights = priced(verdict.check(recipe.compose("base", words)))["weights"]
    assert weights == 4 * sum(p.numel() for p in _model(folder).parameters())

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert "pip install 'gguf" in codes()["library"]


def _model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    return auto.from_config(AutoConfig.from_pretrained(folder))


def test_weights_that_changed_are_no_proof(build: Build, folder: Path) -> None:
    words = pack(folder)
    session = build(*words)
    plugin = Gguf(file="F32.gguf")
    assert holds(plugin, session)
    assert not holds(plugin, session, device=torch.device("meta"))
    torch.nn.init.zeros_(session.model.model.norm.weight)
    assert not holds(plugin, session)

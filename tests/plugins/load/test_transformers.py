"""load=transformers takes all of a checkpoint, or says what is wrong with it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from engine.errors import CheckpointError
from engine.plugins.load.transformers import Transformers
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.helpers import logits, plain, receipt, verdict

WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(model: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of the tiny llama, to be damaged."""
    return Path(shutil.copytree(model("llama"), tmp_path / "copied"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_weights_are_those_of_plain_transformers(build: Build) -> None:
    session = build("attention=eager")
    reference = plain(Path(session.recipe.model.path))
    for name, tensor in reference.state_dict().items():
        assert session.model.state_dict()[name].equal(tensor)
    assert logits(session.model).equal(logits(reference))
    evidence = receipt(session, "load").evidence
    assert evidence["class"] == "LlamaForCausalLM"
    assert evidence["tensors in the files"] == len(reference.state_dict())
    assert evidence["parameters"] == reference.num_parameters()
    assert (evidence["dtype"], evidence["device"]) == ("float32", str(session.device))


def test_dtype_is_what_the_recipe_says(build: Build) -> None:
    session = build("model.dtype=bfloat16")
    assert session.model.dtype is torch.bfloat16
    assert session.model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert receipt(session, "load").evidence["dtype"] == "bfloat16"


def test_checksums_are_counted(build: Build, copied: Path) -> None:
    import hashlib

    digest = hashlib.sha256((copied / WEIGHTS).read_bytes()).hexdigest()
    (copied / "SHA256SUMS").write_text(f"{digest}  {WEIGHTS}\n")
    session = build(f"model.path={copied}")
    assert receipt(session, "load").evidence["files verified by checksum"] == 1
    rewrite(copied, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        build(f"model.path={copied}")


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan


def test_faults_are_refused(build: Build, copied: Path) -> None:
    path = f"model.path={copied}"
    name = "model.layers.1.mlp.up_proj.weight"
    faults: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        r"1 tensor\b.*missing": lambda tensors: tensors.pop(name),
        r"1 tensor\b.* place": lambda tensors: tensors.update(more=torch.ones(2)),
        r"shape \[2, 2\]": lambda tensors: tensors.update({name: torch.ones(2, 2)}),
        r"not finite": nan,
    }
    whole = (copied / WEIGHTS).read_bytes()
    for message, change in faults.items():
        rewrite(copied, change)
        with pytest.raises(CheckpointError, match=message):
            build(path)
        (copied / WEIGHTS).write_bytes(whole)
    assert build(path).receipts


def test_scanning_can_be_left_out(build: Build, copied: Path) -> None:
    from engine.errors import RuntimeFailure

    rewrite(copied, nan)
    with pytest.raises(RuntimeFailure, match="NaN"):  # the probe still sees what comes of it
        build(f"model.path={copied}", "load.scan=false")


def test_pickles_need_consent(build: Build, copied: Path) -> None:
    torch.save(load_file(copied / WEIGHTS), copied / "pytorch_model.bin")
    (copied / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        build(f"model.path={copied}")
    session = build(f"model.path={copied}", "load.allow_pickle=true")
    assert logits(session.model).equal(logits(build().model))


def test_a_missing_tokenizer_is_refused(build: Build, copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    for load in ("transformers", "random"):
        with pytest.raises(CheckpointError, match="no tokenizer") as caught:
            build(f"model.path={copied}", f"load={load}")
        assert "tokenizer.json" in caught.value.problems[0].hint


def test_a_tokenizer_of_another_model_is_refused(build: Build, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:64].clone()

    rewrite(copied, cut)
    for load in ("transformers", "random"):
        with pytest.raises(CheckpointError, match="64 rows"):
            build(f"model.path={copied}", f"load={load}")


def test_a_model_without_a_language_head_is_refused(build: Build, copied: Path) -> None:
    sizes = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 64}
    (copied / "config.json").write_text(
        json.dumps({"model_type": "t5", "vocab_size": 320, **sizes})
    )
    for load in ("transformers", "random"):
        with pytest.raises(CheckpointError, match="t5") as caught:
            build(f"model.path={copied}", f"load={load}")
        assert "take another model" in caught.value.problems[0].hint


def test_the_terminal_stays_quiet(
    build: Build, model: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model("llama")
    capfd.readouterr()
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().generate("def add")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_weights_that_changed_after_loading_are_no_proof(build: Build, family: str) -> None:
    session = build(family=family)
    held = receipt(session, "load").evidence["tensors held against the files"]
    assert held == len(list(session.model.parameters()))
    name, parameter = next(iter(session.model.named_parameters()))
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
    assert not verdict(Transformers(), session)
    with torch.no_grad():
        parameter.copy_(before)
    assert verdict(Transformers(), session), name
    parameter.data = parameter.data.half()
    assert not verdict(Transformers(), session)


def test_a_tensor_that_the_index_lacks_is_told_so(build: Build, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, max_shard_size="81KB")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError) as caught:
        build(f"model.path={folder}")
    assert f"1 tensor in the files, but not in {index.name}" in str(caught.value)
    assert "lm_head.weight" in str(caught.value)


def test_what_is_elsewhere_or_trains_is_no_proof(build: Build) -> None:
    session = build()
    assert verdict(Transformers(), session)
    assert not verdict(Transformers(), session, device=torch.device("meta"))
    empty = SimpleNamespace(files={}, checksums=0, held=0, sampled={}, others=0, left_out=[])
    assert not verdict(Transformers(), session, built={"load": empty})
    session.model.train()
    assert not verdict(Transformers(), session)

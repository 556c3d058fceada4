"""load=gguf reads what llama.cpp writes: the same tokens as the weights that went into the file."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import recipe, verdict
from engine.errors import CheckpointError
from engine.loading import checkpoint, model_folder
from engine.plugins.load.gguf import Gguf
from tests.conftest import Build
from tests.gguf_files import CASES, Change, Sample, sample, write_gguf
from tests.models import tiny_model, tiny_tokenizer
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

    def inf(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.ffn_up.weight"][0, 0] = np.inf

    faults: dict[str, Change] = {
        r"not finite: model\.layers\.1\.mlp\.up_proj": inf,
        r"missing from the file: blk\.1\.ffn_up\.weight": lambda tensors: tensors.pop(
            "blk.1.ffn_up.weight"
        ),
        r"without a place in the model: blk\.7\.more\.weight": lambda tensors: tensors.update(
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


def continued(sample: Sample, prompt: str, new: int) -> list[int]:
    """Return what plain transformers continues a prompt with, eager, in float32."""
    ids = torch.tensor([tiny_tokenizer()(prompt).input_ids])
    sample.model.set_attn_implementation("eager")
    out = sample.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


SOME = ["phi3-longrope", "mistral"]
REST = [name for name in CASES if name not in (*SOME, "mamba")]  # whose caches are another matter
EVERY = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


@pytest.mark.parametrize("name", EVERY)
def test_a_file_alone_is_checked_planned_and_run(
    build: Build, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """Neither config.json nor tokenizer beside it: the tokens are those of the original."""
    one = sample(name, tmp_path_factory.mktemp(name))
    one.write(tmp_path)
    words = [f"model.path={tmp_path}", "load=gguf", "load.file=x.gguf", "attention=eager"]
    prompt = "def add(a, b): return a" * (4 if "longrope" in name else 1)
    found = verdict.check(recipe.compose("base", words))
    assert found.problems == []
    assert found.shape is not None
    assert found.shape.parameters in (None, one.model.num_parameters())
    session = build(*words, "decode.max_new_tokens=8")
    assert session.generate(prompt).token_ids == continued(one, prompt, 8)
    assert receipt(session, "load").evidence["weights held against the file"]


@pytest.mark.parametrize("quantize", ["nf4", "int8", "quanto-int8", "torchao-int8"])
def test_unpacked_weights_can_be_packed_anew(
    build: Build, original: Path, folder: Path, quantize: str
) -> None:
    pytest.importorskip({"q": "optimum.quanto", "t": "torchao"}.get(quantize[0], "bitsandbytes"))
    expected = build(f"model.path={original}", "attention=eager", f"quantize={quantize}")
    session = build(*pack(folder), f"quantize={quantize}")
    assert logits(session.model).equal(logits(expected.model))
    assert "then packed" in receipt(session, "load").claim


def test_a_file_that_was_split_is_loaded_from_its_first_part(
    build: Build, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = sample("qwen2", tmp_path_factory.mktemp("qwen2"))
    one.write(tmp_path, per_part=10)
    first, second, _ = sorted(each.name for each in tmp_path.iterdir())
    words = [f"model.path={tmp_path}", "load=gguf", "attention=eager"]
    shutil.copytree(tmp_path, tmp_path / "F32")  # as hub models of many kinds have them
    below = build(*words, f"load.file=F32/{first}", "decode.max_new_tokens=8")
    session = build(*words, f"load.file={first}", "decode.max_new_tokens=8")
    assert logits(below.model).equal(logits(session.model))
    assert session.generate("def add").token_ids == continued(one, "def add", 8)
    (problem,) = verdict.check(recipe.compose("base", [*words, f"load.file={second}"])).problems
    assert problem.hint.startswith(f"name the first: load.file={first}")


def test_a_hub_model_of_nothing_but_gguf_files_is_found_in_the_cache(
    build: Build,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--org--tiny-GGUF"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    sample("qwen2", tmp_path_factory.mktemp("qwen2")).write(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ["model.path=org/tiny-GGUF", "load=gguf", "load.file=x.gguf"]
    found = verdict.check(recipe.compose("base", words))
    assert found.problems == []
    assert found.shape is not None
    assert build(*words).shape.model_type == "qwen2"
    with pytest.raises(CheckpointError, match=r"org/tiny-GGUF has no y\.gguf"):
        build(*words, "load.file=y.gguf")
    with pytest.raises(CheckpointError, match=r"load=gguf load\.file=x\.gguf"):
        build(words[0], "load=transformers")

    def fetched(*_: Any, **__: Any) -> Path:
        shutil.copyfile(snapshot / "x.gguf", snapshot / "y.gguf")
        return snapshot

    monkeypatch.setattr(model_folder, "fetch", fetched)
    assert build(*words, "load.file=y.gguf").shape.model_type == "qwen2"


def test_what_to_type_for_a_file_of_llama_cpp(folder: Path) -> None:
    """Each hint works, as it is."""
    file = write_gguf(folder, "F32")
    (folder / "model.safetensors").unlink()

    def hint(*words: str) -> str:
        (problem,) = verdict.check(recipe.compose("base", list(words))).problems
        return problem.hint

    typed = hint(f"model.path={file}").split()
    assert typed == [f"model.path={folder}", "load=gguf", "load.file=F32.gguf"]
    assert verdict.check(recipe.compose("base", typed)).problems == []
    with pytest.raises(CheckpointError, match=r"load=gguf load\.file=F32"):
        checkpoint.tensors(folder)
    (folder / "config.json").unlink()
    typed = hint(f"model.path={folder}").split()
    assert typed == [f"model.path={folder}", "load=gguf", "load.file=F32.gguf"]
    assert verdict.check(recipe.compose("base", typed)).problems == []


def test_a_broken_file_is_told_once(folder: Path) -> None:
    words = pack(folder)
    (folder / "config.json").unlink()
    (folder / "F32.gguf").write_bytes(b"GGUF")
    (problem,) = verdict.check(recipe.compose("base", words)).problems
    assert "is no whole GGUF file" in problem.message


def test_notes_reach_the_user(build: Build, folder: Path) -> None:
    words = pack(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    (folder / "generation_config.json").unlink()
    (note,) = verdict.check(recipe.compose("base", words)).notes
    assert "padding_token_id=0 of the file is not used" in note
    assert note in build(*words).notes


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
    loaded = session.built["load"]
    for lie in (replace(loaded, held=0), replace(loaded, differing=["model.norm.weight"])):
        assert not holds(plugin, session, built={**session.built, "load": lie})
    torch.nn.init.zeros_(session.model.model.norm.weight)
    assert not holds(plugin, session)

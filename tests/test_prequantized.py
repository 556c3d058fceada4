"""Checkpoints that come packed load, or check says what is missing; nothing is found out late."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from engine import recipe, verdict
from engine.errors import CheckpointError
from engine.loading import prequantized
from engine.loading.converting import convert
from engine.target import Target
from tests.conftest import Build
from tests.plugins.helpers import receipt, shape_of

Model = Callable[[str], Path]
CPU = Target(name="cpu", kind="cpu")
OLD_GPU = Target(name="t4", kind="cuda", capability="7.5")
NEW_GPU = Target(name="h100", kind="cuda", capability="9.0")


def stated(model: Model, tmp_path: Path, **quantization: object) -> list[str]:
    """Return the recipe for a checkpoint whose config.json says that it is packed."""
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (folder / "model.safetensors").unlink()  # whose plain numbers would contradict it
    return [f"model.path={folder}"]


def said(model: Model, method: str, target: Target) -> str:
    shape = replace(shape_of(model("llama")), quantization=method)
    return "\n".join(map(str, prequantized.problems(shape, target)))


def test_the_methods_are_those_of_transformers() -> None:
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, *AUTO_QUANTIZER_MAPPING, "bitsandbytes"}
    assert set(prequantized.METHODS) == known


def test_each_source_is_a_file_of_transformers() -> None:
    import transformers

    folder = Path(transformers.__file__).parent / "quantizers"
    for method in prequantized.METHODS:
        file = folder / f"quantizer_{prequantized._module(method)}.py"
        assert file.is_file(), method
        ast.parse(file.read_text())


@pytest.mark.parametrize(
    ("method", "target", "says"),
    [
        ("gptq", CPU, "gptqmodel>=1.4.3, which is not installed"),
        ("awq", CPU, "pip install 'gptqmodel'"),
        ("fp8", CPU, "compute capability 8.9 or more; cpu is none"),
        ("fp8", OLD_GPU, "compute capability 8.9 or more; t4 has 7.5"),
        ("fp8", NEW_GPU, "needs kernels>=0.18.2,<0.19, which is not installed"),
        ("mxfp4", OLD_GPU, "pip install 'kernels>=0.18.2,<0.19'"),
        ("fbgemm_fp8", OLD_GPU, "compute capability 9.0"),
        ("nvfp4", NEW_GPU, "no checkpoint that is packed already"),
        ("hqq", NEW_GPU, "not available yet"),
        ("gguf", CPU, "load=gguf"),
        ("quanto", CPU, "saves nothing"),
    ],
)
def test_what_is_missing_is_named(model: Model, method: str, target: Target, says: str) -> None:
    found = said(model, method, target)
    assert says in found
    assert "the original checkpoint as model.path" in found
    assert "source: transformers quantizers/quantizer_" in found


def test_nothing_is_said_of_what_can_be_read(model: Model) -> None:
    assert said(model, "bitsandbytes", CPU) == ""
    assert said(model, "torchao", CPU) == ""
    shape = shape_of(model("llama"))
    assert list(prequantized.problems(shape, CPU)) == []


def test_an_unknown_method_is_refused_unless_a_plugin_reads_it(model: Model) -> None:
    shape = replace(shape_of(model("llama")), quantization="acme")
    with pytest.raises(CheckpointError, match="quant_method=acme"):
        list(prequantized.problems(shape, CPU))
    assert list(prequantized.problems(shape, CPU, {"quantize.reads.acme"})) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "hqq"])
def test_check_refuses_from_config_alone(model: Model, tmp_path: Path, method: str) -> None:
    if all(prequantized.installed(each) for each in prequantized.METHODS[method].packages):
        assert prequantized.METHODS[method].never, "installed here: nothing to refuse"
    words = stated(model, tmp_path, quant_method=method, bits=4)
    found = verdict.check(recipe.compose("base", [*words, "target=cpu"]))
    assert [problem.code for problem in found.problems] == ["packing-unreadable"]


def test_an_old_config_without_a_method_is_bitsandbytes(model: Model, tmp_path: Path) -> None:
    words = stated(model, tmp_path, load_in_8bit=True)
    found = verdict.check(recipe.compose("base", [*words, "quantize=nf4"]))
    assert "checkpoint-quantized" in {problem.code for problem in found.problems}


def test_packed_in_8_bits_rounds_by_the_pass_and_takes_no_drafts(
    model: Model, tmp_path: Path
) -> None:
    drafts = ["decode=prompt-lookup", "target=cpu"]
    for threshold, expected in ((6.0, {"speculation-by-pass"}), (0.0, set())):
        packed = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        words = stated(model, tmp_path / str(threshold), **packed, llm_int8_threshold=threshold)
        found = verdict.check(recipe.compose("base", [*words, *drafts]))
        assert {problem.code for problem in found.problems} == expected


@pytest.mark.parametrize("choice", ["nf4", "int8", "torchao"])
def test_packed_checkpoints_load_and_stay_packed(
    build: Build, model: Model, tmp_path: Path, choice: str
) -> None:
    words = [f"model.path={model('llama')}", "model.dtype=float32", f"quantize={choice}"]
    convert(recipe.compose("base", words), tmp_path / "packed")
    session = build(f"model.path={tmp_path / 'packed'}")
    assert session.generate("def add").token_ids == build(words[2]).generate("def add").token_ids
    assert receipt(session, "quantize").claim == "the weights are in the checkpoint's own format"
    evidence = receipt(session, "load").evidence
    assert int(evidence["tensors sampled"]) >= (16 if choice != "torchao" else 2)
    assert evidence["tensors held against the files"] == 7  # embedding, head and norms


def test_packed_weights_that_changed_are_no_proof(build: Build) -> None:
    from engine.plugins.load.transformers import Transformers
    from tests.plugins.helpers import verdict as holds

    for bits in (4, 8):
        session = build("quantize=bitsandbytes", f"quantize.bits={bits}")
        assert holds(Transformers(), session)
        packed = session.model.model.layers[0].mlp.up_proj.weight
        packed.data = torch.zeros_like(packed.data)
        assert not holds(Transformers(), session)

"""Checkpoints that come packed load, or check says what is missing; nothing is found out late."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from engine import recipe, verdict
from engine.errors import CheckpointError
from engine.loading import prequantized
from engine.loading.converting import convert
from engine.target import Target
from tests.conftest import Build
from tests.models import tiny_tokenizer
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


def packed(model: Model, folder: Path, config: object, family: str = "llama") -> Path:
    """Save a packed model as transformers does."""
    auto: Any = AutoModelForCausalLM
    made = auto.from_pretrained(model(family), quantization_config=config)
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def in_4_bits(**options: Any) -> object:
    make: Any = BitsAndBytesConfig
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def in_8_bits(**options: Any) -> object:
    make: Any = BitsAndBytesConfig
    return make(load_in_8bit=True, **options)


def configured(folder: Path, **quantization: object) -> None:
    """Change what config.json says of the packing; None removes all of it."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    if not quantization:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, attn_implementation="eager").eval()
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        logits: torch.Tensor = loaded(torch.tensor([ids])).logits
    return logits


def in_torchao(config: object) -> object:
    make: Any = TorchAoConfig
    return make(config)


SAVED: dict[str, Callable[[], object]] = {
    "int8": lambda: in_8_bits(),
    "int8, some left": lambda: in_8_bits(llm_int8_skip_modules=["model.layers.1", "lm_head"]),
    "nf4, doubly": lambda: in_4_bits(bnb_4bit_use_double_quant=True),
    "nf4, some left": lambda: in_4_bits(llm_int8_skip_modules=["q_proj", "lm_head"]),
    "nf4, kept as bfloat16": lambda: in_4_bits(bnb_4bit_quant_storage=torch.bfloat16),
    "nf4, kept as float32": lambda: in_4_bits(bnb_4bit_quant_storage=torch.float32),
    "float8": lambda: in_torchao(Float8WeightOnlyConfig()),
    "int8 by int8": lambda: in_torchao(Int8DynamicActivationInt8WeightConfig()),
}


@pytest.mark.parametrize("how", SAVED)
def test_what_transformers_saved_gives_its_logits(
    build: Build, model: Model, tmp_path: Path, how: str
) -> None:
    folder = packed(model, tmp_path / "packed", SAVED[how]())
    session = build(f"model.path={folder}", "attention=eager")
    ids = [5, 70, 9, 200]
    with torch.no_grad():
        found = session.model(torch.tensor([ids])).logits
    assert torch.equal(found, plain_logits(folder, ids))


@pytest.mark.parametrize(("how", "family"), [("nf4, doubly", "llama"), ("int8", "mixtral")])
def test_what_came_packed_can_be_converted(
    build: Build, model: Model, tmp_path: Path, how: str, family: str
) -> None:
    folder = packed(model, tmp_path / "packed", SAVED[how](), family)
    words = ["model.dtype=float32", "position_encoding=yarn", "position_encoding.factor=2"]
    convert(recipe.compose("base", [f"model.path={folder}", *words]), tmp_path / "longer")
    longer = build(f"model.path={tmp_path / 'longer'}", family=family)
    there = build(f"model.path={folder}", *words[1:], family=family)
    assert longer.generate("def add").token_ids == there.generate("def add").token_ids


def test_8_bit_floats_keep_their_number_format(model: Model, tmp_path: Path) -> None:
    words = [f"model.path={packed(model, tmp_path / 'packed', SAVED['float8']())}"]
    for dtype, codes in (("auto", []), ("float32", []), ("bfloat16", ["packing-dtype"])):
        found = verdict.check(recipe.compose("base", [*words, f"model.dtype={dtype}"]))
        assert [problem.code for problem in found.problems] == codes


def test_heads_of_packed_weights_are_refused_for_that_alone(model: Model, tmp_path: Path) -> None:
    words = [f"model.path={packed(model, tmp_path / 'packed', SAVED['float8']())}"]
    found = verdict.check(recipe.compose("base", [*words, "heads=grouped"]))
    (problem,) = found.problems
    assert "packed (torchao)" in problem.message


def test_a_packed_draft_is_refused(model: Model, tmp_path: Path) -> None:
    folder = packed(model, tmp_path / "packed", SAVED["int8"]())
    words = [f"model.path={model('llama')}", "decode=assisted", f"decode.draft={folder}"]
    found = verdict.check(recipe.compose("base", words))
    assert [problem.code for problem in found.problems] == ["draft-packed"]


@pytest.mark.parametrize(
    ("how", "changes", "says"),
    [
        ("int8", {}, r"packed by bitsandbytes, as their names tell \(.*SCB\).*nothing of it"),
        ("nf4, doubly", {}, "packed by bitsandbytes.*says nothing of it"),
        ("float8", {}, "packed by torchao.*says nothing of it"),
        ("int8", {"load_in_8bit": False, "load_in_4bit": True}, "load_in_8bit=false"),
        ("nf4, doubly", {"load_in_8bit": True, "load_in_4bit": False}, "load_in_4bit=false"),
        ("float8", {"quant_method": "bitsandbytes"}, "torchao.*quant_method=bitsandbytes"),
        ("int8", {"quant_method": "torchao"}, "bitsandbytes.*quant_method=torchao"),
    ],
)
def test_check_refuses_names_that_contradict(
    model: Model, tmp_path: Path, how: str, changes: dict[str, object], says: str
) -> None:
    folder = packed(model, tmp_path / "packed", SAVED[how]())
    configured(folder, **changes)
    found = verdict.check(recipe.compose("base", [f"model.path={folder}"]))
    assert re.search(says, found.problems[0].message)


@pytest.mark.parametrize("how", [in_4_bits, in_8_bits])
def test_other_layers_packed_than_named(
    build: Build, model: Model, tmp_path: Path, how: Callable[..., object]
) -> None:
    left = ["model.layers.1", "lm_head"]
    some = packed(model, tmp_path / "some", how(llm_int8_skip_modules=left))
    configured(some, llm_int8_skip_modules=None)
    with pytest.raises(CheckpointError, match=r"packed 7 layers .* it would be 14"):
        build(f"model.path={some}")
    every = packed(model, tmp_path / "every", how())
    configured(every, llm_int8_skip_modules=left)
    with pytest.raises(CheckpointError, match=r"packed 14 layers .* it would be 7"):
        build(f"model.path={every}")
    one = packed(
        model, tmp_path / "one", how(llm_int8_skip_modules=["layers.0.mlp.down_proj", "lm_head"])
    )
    for other in ("layers.1.mlp.down_proj", "layers.0.self_attn.q_proj"):
        configured(one, llm_int8_skip_modules=[other, "lm_head"])
        with pytest.raises(CheckpointError, match=r"packed 13 layers .* it would be 13.*0\.mlp"):
            build(f"model.path={one}")


def test_plain_weights_that_config_says_are_packed(model: Model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for stated in ({"quant_method": method} for method in prequantized.ONLY_CODES):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
        found = verdict.check(recipe.compose("base", [f"model.path={folder}"]))
        assert "all of them are plain numbers" in found.problems[0].message
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    found = verdict.check(recipe.compose("base", [f"model.path={folder}"]))
    assert "quantization_config is empty" in found.problems[0].message


@pytest.mark.parametrize(("method", "whose"), sorted(prequantized.FOREIGN.items()))
def test_packings_of_other_programs_are_named(
    model: Model, tmp_path: Path, method: str, whose: str
) -> None:
    found = verdict.check(
        recipe.compose("base", stated(model, tmp_path, quant_method=method, bits=4))
    )
    assert whose in found.problems[0].message

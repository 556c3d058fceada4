"""quantize=bitsandbytes packs what it says, and packed weights stay what they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from engine.errors import RecipeError
from engine.plugins.quantize.bitsandbytes import BitsAndBytes, ComputeDtype, QuantType
from engine.quantizing import packing
from engine.session import Session
from tests.conftest import Build
from tests.plugins.helpers import (
    hints,
    logits,
    plain,
    receipt,
    refusals,
    relative,
    shape_of,
    verdict,
)

NF4: tuple[str, ...] = ("quantize=bitsandbytes",)
INT8 = (*NF4, "quantize.bits=8")
FP4 = (*NF4, "quantize.quant_type=fp4")
DOUBLE = (*NF4, "quantize.double_quant=true")
# Of logits, on tiny random models: far above what a trained model of real width shows.
WORST = {INT8: 0.1, NF4: 0.6, FP4: 0.8, DOUBLE: 0.6}
CHOICES = pytest.mark.parametrize("choice", WORST, ids=["int8", "nf4", "fp4", "double"])


def dequantized(session: Session) -> Any:
    """Return plain transformers with the values that the packed weights stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    model = plain(Path(session.recipe.model.path))
    with torch.no_grad():
        for name, packed in session.model.named_modules():
            if type(packed).__name__ in ("Linear4bit", "Linear8bitLt"):
                weight = dequantize_bnb_weight(packed.weight, getattr(packed, "state", None))
                own = model.get_submodule(name)
                # GPT-2 keeps its matrices the other way around.
                own.weight.copy_(weight.T if type(own).__name__ == "Conv1D" else weight)
    return model


@CHOICES
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_is_that_of_the_values(
    build: Build, family: str, choice: tuple[str, ...]
) -> None:
    session = build(*choice, "attention=eager", family=family)
    found = logits(session.model)
    original = logits(plain(Path(session.recipe.model.path)))
    assert 0.001 < relative(found, original) < WORST[choice]
    # What remains is the arithmetic: bfloat16 in 4 bits, int8 activations in 8.
    assert relative(found, logits(dequantized(session))) < (0.1 if choice == INT8 else 0.06)


def test_float32_arithmetic_is_exact(build: Build) -> None:
    session = build(*NF4, "quantize.compute_dtype=float32", "attention=eager")
    assert relative(logits(session.model), logits(dequantized(session))) < 1e-5


def test_arithmetic_is_never_float32_by_accident(build: Build) -> None:
    found = {
        (dtype, asked): build(*NF4, f"model.dtype={dtype}", f"quantize.compute_dtype={asked}")
        .model.model.layers[0]
        .mlp.up_proj.compute_dtype
        for dtype, asked in (
            ("float32", "auto"),
            ("bfloat16", "auto"),
            ("float32", "float16"),
            ("float32", "float32"),
        )
    }
    assert list(found.values()) == [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]


@CHOICES
def test_running_changes_nothing_that_is_saved(
    build: Build, tmp_path: Path, choice: tuple[str, ...]
) -> None:
    session = build(*choice, "attention=eager")
    model: Any = session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model)
    session.generate("def add")
    assert logits(model).equal(first)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
    model.save_pretrained(tmp_path)
    assert logits(model).equal(first)
    session.tokenizer.save_pretrained(tmp_path)
    again = build(f"model.path={tmp_path}", "quantize=none", "attention=eager")
    assert logits(again.model).equal(first)


@CHOICES
def test_the_receipt_reads_the_model(build: Build, choice: tuple[str, ...]) -> None:
    evidence = receipt(build(*choice), "quantize").evidence
    assert (evidence["layers packed"], evidence["linear layers"]) == (14, 15)
    assert evidence["classes"] == ("Linear8bitLt" if choice == INT8 else "Linear4bit")
    assert int(evidence["bytes after"]) < int(evidence["bytes before"]) / 3
    assert "bitsandbytes::" in str(evidence["operators"])
    if choice != INT8:
        assert evidence["values"] == ("fp4" if choice == FP4 else "nf4")
        assert evidence["scales quantized"] == (choice == DOUBLE)


def test_layers_can_be_skipped(build: Build) -> None:
    session = build(*NF4, "quantize.skip_modules=[down_proj,model.layers.1]")
    packed = [n for n, m in session.model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(packed) == 6
    assert not [name for name in packed if "down_proj" in name or "layers.1" in name]
    assert type(session.model.lm_head) is torch.nn.Linear  # still left alone by default


def test_a_skip_that_matches_nothing_is_refused(build: Build) -> None:
    with pytest.raises(RecipeError, match="matches fc1") as caught:
        build(*NF4, "quantize.skip_modules=[down_proj,fc1]")
    assert "up_proj" in caught.value.problems[0].hint


@pytest.mark.parametrize("choice", [NF4, INT8])
def test_layers_of_a_models_own_kind_are_refused(build: Build, choice: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="FalconLinear"):
        build(*choice, family="falcon-rotary")


def test_options_that_cannot_be_are_refused(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(model("llama"))
    assert hints(BitsAndBytes(), shape) == hints(BitsAndBytes(bits=8)) == []
    assert hints(BitsAndBytes(bits=3)) == ["quantize.bits=4"]
    for useless in (
        BitsAndBytes(bits=8, quant_type=QuantType.fp4),
        BitsAndBytes(bits=8, double_quant=True),
        BitsAndBytes(bits=8, compute_dtype=ComputeDtype.float16),
    ):
        (problem,) = refusals(useless)
        assert problem.hint == "quantize.bits=4"
        assert "does nothing in 8 bits" in problem.message
    assert hints(BitsAndBytes(), replace(shape, quantization="awq")) == ["quantize=none"]
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    assert hints(BitsAndBytes()) == ['pip install "recipe-engine[bitsandbytes]"']


def test_it_is_quiet(build: Build, capfd: pytest.CaptureFixture[str]) -> None:
    build(*INT8).generate("def add")
    assert "MatMul8bitLt" not in capfd.readouterr().err
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


def test_what_is_not_packed_or_not_used_is_no_proof(build: Build) -> None:
    session = build(*NF4)
    assert verdict(BitsAndBytes(), session)
    assert not verdict(BitsAndBytes(), build())
    assert not verdict(BitsAndBytes(bits=8), session)
    assert not verdict(BitsAndBytes(quant_type=QuantType.fp4), session)
    assert not verdict(BitsAndBytes(double_quant=True), session)
    assert not verdict(BitsAndBytes(), build(*INT8))


def test_latents_in_8_bits_are_refused_and_how_it_goes(
    build: Build, model: Callable[[str], Path]
) -> None:
    shape = shape_of(model("deepseek_v3"))
    assert hints(BitsAndBytes(), shape) == []
    (problem,) = refusals(BitsAndBytes(bits=8), shape)
    assert problem.code == "int8-latent-kv"
    session = build(*INT8, "quantize.skip_modules=[kv_b_proj]", family="deepseek_v3")
    assert receipt(session, "quantize").evidence["layers packed"] == 14


def test_repacking_is_still_to_be_forbidden(model: Callable[[str], Path]) -> None:
    """When this fails, bitsandbytes no longer asks for it by default on any CPU."""
    config: Any = BitsAndBytesConfig
    packed = plain(model("llama"), quantization_config=config(load_in_4bit=True), device_map="cpu")
    assert hasattr(packed.model.layers[0].mlp.up_proj, "support_avx512bf16_for_cpu")

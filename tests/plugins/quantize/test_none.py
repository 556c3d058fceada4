"""quantize=none changes nothing, and is as large as the plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.contexts import QuantizeContext
from engine.plugins.quantize.none import Unquantized
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.helpers import receipt, shape_of, terms, verdict


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_it_is_as_large_as_estimated(build: Build, family: str) -> None:
    session = build(family=family)
    evidence = receipt(session, "quantize").evidence
    shape = shape_of(Path(session.recipe.model.path))
    assert evidence["bytes in float32"] == terms(Unquantized(), shape, 1)[0].bytes
    assert terms(Unquantized(), shape, 1, dtype="auto") == terms(Unquantized(), shape, 1)
    half = terms(Unquantized(), shape, 1, dtype="bfloat16")[0].bytes
    assert evidence["bytes in float32"] == 2 * half


def test_it_gives_no_config() -> None:
    context = QuantizeContext(
        config=tiny_config("llama"), dtype=torch.float32, device=torch.device("cpu")
    )
    assert Unquantized().quantize(context).config is None


def test_the_config_alone_tells(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("gpt2"))
    assert terms(Unquantized(), replace(shape, tensors={}), 1) == terms(Unquantized(), shape, 1)
    unknown = {**shape.config, "model_type": "never_heard"}
    assert terms(Unquantized(), replace(shape, tensors={}, config=unknown), 1) == []


def test_packed_weights_contradict_it(build: Build) -> None:
    assert verdict(Unquantized(), build())
    assert not verdict(Unquantized(), build("quantize=bitsandbytes"))


def test_a_checkpoint_that_comes_quantized_stays_so(build: Build, tmp_path: Path) -> None:
    packed = build("quantize=bitsandbytes", "quantize.bits=8")
    packed.model.save_pretrained(tmp_path)
    packed.tokenizer.save_pretrained(tmp_path)
    session = build(f"model.path={tmp_path}", "quantize=none")
    assert session.generate("def add").token_ids == packed.generate("def add").token_ids
    assert "own format" in receipt(session, "quantize").claim

"""attention=flash is refused wherever its kernels cannot run, in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine import compose
from engine.contexts import Attention, AttentionContext
from engine.errors import RecipeError
from engine.plugins.attention.flash import Flash, Version
from engine.verdict import check
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.helpers import logits, plain, probe, relative, verdict


def codes(model: Path, *words: str) -> list[str]:
    """Return what check finds for an A100, or for another target."""
    common = [f"model.path={model}", "attention=flash", "model.dtype=bfloat16", "target=a100-40gb"]
    return [problem.code for problem in check(compose("base", [*common, *words])).problems]


def test_a_cpu_is_refused_in_one_sentence(build: Build) -> None:
    with pytest.raises(RecipeError, match="written for NVIDIA GPUs") as caught:
        build("attention=flash", "model.dtype=bfloat16", "target=cpu")
    (problem,) = caught.value.problems
    assert (problem.code, problem.slot) == ("flash-cuda", "attention")
    assert "attention=sdpa" in problem.hint


def test_what_the_kernels_cannot_is_refused(model: Callable[[str], Path]) -> None:
    llama = model("llama")
    assert codes(llama) == []
    assert codes(llama, "model.dtype=float32") == ["flash-dtype"]
    assert codes(llama, "model.dtype=auto") == ["flash-dtype"]  # the checkpoint's is float32
    assert codes(llama, "attention.version=v4") == ["flash-capability"]
    assert codes(llama, "attention.version=v4", "target=h100") == []
    assert codes(llama, "target=t4", "model.dtype=float16") == ["flash-capability"]
    assert codes(model("bloom")) == ["flash-model"]
    assert codes(model("gpt_oss")) == ["flash-sinks"]
    assert codes(model("gpt_oss"), "attention.version=v4", "target=h100") == []


def test_wide_heads_are_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    from tests.models import tiny_model

    wide = tiny_model("llama", tmp_path, head_dim=264)
    assert codes(wide) == ["flash-head-dim"]


def test_it_names_the_version() -> None:
    context = AttentionContext(config=tiny_config("llama"))
    for version in Version:
        name = f"flash_attention_{version.value}"
        assert Flash(version).attention(context) == Attention(implementation=name)


def test_another_kernel_contradicts_it(build: Build) -> None:
    session = build("attention=sdpa")
    assert not verdict(Flash(), session)
    session.model.config._attn_implementation_internal = "flash_attention_2"
    assert verdict(Flash(), session, probe=probe({"flash_attn::_flash_attn_forward": 4}))
    assert not verdict(Flash(), session, probe=probe({"aten::_safe_softmax": 4}))
    assert not verdict(Flash(), session, probe=probe({"aten::_scaled_dot_product_x": 4}))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_logits_are_close_to_those_of_eager(build: Build, family: str) -> None:
    pytest.importorskip("flash_attn")
    session = build("attention=flash", "model.dtype=bfloat16", family=family)
    reference = logits(plain(Path(session.recipe.model.path)))
    assert relative(logits(session.model).float().cpu(), reference) < 0.05  # bfloat16
    assert session.generate(["def add(a, b):", "x"])


def test_shape_is_read_as_is(model: Callable[[str], Path]) -> None:
    from tests.plugins.helpers import refusals, shape_of

    shape = shape_of(model("llama"))
    assert refusals(Flash(), replace(shape, dtype="bfloat16")) == []
    assert refusals(Flash()) == []

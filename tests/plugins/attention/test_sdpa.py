"""attention=sdpa is one fused operator per layer, equal to eager but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine import compose
from engine.errors import RecipeError, RuntimeFailure
from engine.plugins.attention.sdpa import Kernel, Sdpa
from engine.verdict import check
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.helpers import (
    IDS,
    hints,
    logits,
    plain,
    probe,
    receipt,
    refusals,
    relative,
    shape_of,
    verdict,
)

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt_bigcode"])
def test_logits_equal_those_of_eager(build: Build, family: str) -> None:
    session = build("attention=sdpa", family=family)
    reference = logits(plain(Path(session.recipe.model.path)))
    assert relative(logits(session.model), reference) < 1e-5  # float32 rounding


def test_the_receipt_names_the_kernel_and_counts_it(build: Build) -> None:
    evidence = receipt(build("attention=sdpa"), "attention").evidence
    assert evidence["kernels"] == KERNEL
    assert (evidence["calls"], evidence["layers"], evidence["forward passes"]) == (4, 2, 2)


def test_what_ran_too_seldom_or_not_at_all_is_no_proof(build: Build) -> None:
    session = build("attention=sdpa")
    assert verdict(Sdpa(), session, probe=probe({KERNEL: 4}))
    assert verdict(Sdpa(), session, probe=probe({"aten::_safe_softmax": 4}))
    assert not verdict(Sdpa(), session, probe=probe({KERNEL: 3}))
    assert not verdict(Sdpa(), session, probe=probe({"aten::_softmax": 4}))
    assert not verdict(Sdpa(), session, probe=probe({KERNEL: 4}, tokens=()))
    assert not verdict(Sdpa(), build("attention=eager"))


def test_models_without_it_are_refused(build: Build, model: Callable[[str], Path]) -> None:
    bloom = shape_of(model("bloom"))
    assert hints(Sdpa(), bloom) == ["attention=eager"]
    capped = replace(bloom, traits=frozenset({"model.softcap"}))
    assert "caps attention scores" in refusals(Sdpa(), capped)[0].message
    assert hints(Sdpa(), shape_of(model("llama"))) == hints(Sdpa(), None) == []
    with pytest.raises(RecipeError, match="plain torch only"):
        build("attention=sdpa", family="bloom")


@pytest.mark.parametrize(
    ("kernel", "seen"), [("auto", KERNEL), ("flash", KERNEL), ("math", "math fallback")]
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_a_kernel_is_the_only_one(build: Build, family: str, kernel: str, seen: str) -> None:
    session = build("attention=sdpa", f"attention.kernel={kernel}", family=family)
    folder = Path(session.recipe.model.path)
    found = receipt(session, "attention").evidence
    assert found["kernels"] == seen
    assert found["calls of the math fallback"] == (0 if seen == KERNEL else 4)
    how = {"attn_implementation": "sdpa"} if family == "falcon" else {}  # eager is wrong there
    assert relative(logits(session.model), logits(plain(folder, **how))) < 1e-5
    assert session.generate(["def add(a, b):", "x"])


def test_heads_are_shared_without_copies(build: Build) -> None:
    evidence = receipt(build("attention=sdpa"), "attention").evidence
    assert evidence["key/value heads given to the kernel"] == "2 of 4"
    assert evidence["under a mask of several queries"] == "4 of 4"
    assert (
        "key/value heads given to the kernel"
        not in receipt(build("attention=sdpa", family="gpt2"), "attention").evidence
    )


def test_a_kernel_that_was_not_asked_for_is_no_proof(build: Build) -> None:
    session = build("attention=sdpa")
    assert verdict(Sdpa(Kernel.flash), session)
    assert not verdict(Sdpa(Kernel.math), session)
    assert not verdict(Sdpa(Kernel.efficient), session)
    assert not verdict(Sdpa(Kernel.flash), session, probe=probe({"aten::_safe_softmax": 4}))


def problems(folder: Path, *words: str) -> list[str]:
    """Return the codes of what check finds wrong."""
    recipe = compose("base", [f"model.path={folder}", "attention=sdpa", *words])
    return [problem.code for problem in check(recipe).problems]


def test_kernels_that_cannot_run_are_refused(model: Callable[[str], Path]) -> None:
    llama, gpt2 = model("llama"), model("gpt2")
    cuda, cpu = "target=a100-40gb", "target=cpu"
    flash, half = "attention.kernel=flash", "model.dtype=bfloat16"
    efficient, cudnn = "attention.kernel=efficient", "attention.kernel=cudnn"
    assert problems(llama, cpu, flash) == problems(llama, cuda, flash, half) == []
    assert problems(llama, cpu, efficient) == ["sdpa-kernel-cuda"]
    assert problems(llama, cpu, cudnn) == ["sdpa-kernel-cuda"]
    assert problems(llama, cuda, cudnn, half) == []
    assert problems(llama, cuda, flash) == ["sdpa-kernel-dtype"]  # the checkpoint's is float32
    assert problems(llama, cuda, efficient) == ["sdpa-kernel-gqa"]
    assert problems(gpt2, cuda, efficient) == []
    assert problems(llama, "target=t4", flash, "model.dtype=float16") == ["sdpa-kernel-capability"]
    assert problems(model("deepseek_v3"), cpu, flash) == ["sdpa-flash-latent"]
    assert problems(llama, "target=apple-m1", flash) == ["sdpa-kernel-mps"]


def test_wide_heads_are_refused(tmp_path: Path) -> None:
    wide = tiny_model("llama", tmp_path, head_dim=264)
    words = ("target=a100-40gb", "attention.kernel=flash", "model.dtype=bfloat16")
    assert problems(wide, *words) == ["sdpa-kernel-head-dim"]


def test_torchs_refusal_is_told_with_a_remedy(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sdpa, "needs", {})
    with pytest.raises(RuntimeFailure, match="cannot compute this pass") as caught:
        build("attention=sdpa", "attention.kernel=efficient")
    assert caught.value.problems[0].hint == "attention.kernel=auto"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_kernels_run_on_a_gpu(build: Build, kernel: str) -> None:
    words = ("attention=sdpa", f"attention.kernel={kernel}", "model.dtype=bfloat16")
    session = build(*words, family="gpt_neox")
    reference = logits(plain(Path(session.recipe.model.path)))
    found = logits(session.model, IDS.to(session.device)).float().cpu()
    assert relative(found, reference) < 0.05  # bfloat16
    assert session.generate(["def add(a, b):", "x"])

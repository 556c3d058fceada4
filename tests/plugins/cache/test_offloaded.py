"""cache=offloaded needs a GPU: here it is refused in time, and priced by the layers on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.plugins.cache.offloaded import Offloaded
from tests.conftest import Build
from tests.plugins.helpers import held, receipt, shape_of, verdict


def test_it_is_refused_without_cuda(build: Build) -> None:
    with pytest.raises(RecipeError, match="stream of CUDA") as refused:
        build("cache=offloaded", "target=cpu")
    assert [problem.code for problem in refused.value.problems] == ["offloaded-needs-cuda"]


def test_two_layers_are_on_the_gpu(build: Build) -> None:
    shape = shape_of(Path(build().recipe.model.path))
    planned = held(Offloaded(), shape, 9)
    assert planned == 2 * 9 * 64 * 4
    hybrid = shape_of(Path(build(family="lfm2").recipe.model.path))
    assert held(Offloaded(), hybrid, 9) == 9 * 64 * 4


def test_a_cache_that_stays_is_no_proof(build: Build) -> None:
    assert not verdict(Offloaded(), build())


@pytest.mark.gpu
def test_answers_are_those_without_it(build: Build) -> None:
    session = build("cache=offloaded", "target=auto", "decode.max_new_tokens=20")
    evidence = receipt(session, "cache").evidence
    assert int(evidence["of these in main memory"]) >= int(evidence["layers with keys"]) - 1
    plain = build("cache=dynamic", "decode.max_new_tokens=20")
    for prompt in ("def add", "a longer prompt than that"):
        assert session.generate(prompt).token_ids == plain.generate(prompt).token_ids

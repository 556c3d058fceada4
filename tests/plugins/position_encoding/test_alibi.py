"""position_encoding=alibi is the paper's formula on any model that takes attention from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from engine.plugins.position_encoding.alibi import Alibi, LinearBias, slopes
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

IDS = (torch.arange(40)[None] * 7 + 3) % 300 + 3
PROMPTS = ["def add(a, b):", "a", "once upon a time there was a model of two layers only"]
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt")


def masks(config: Any, tokens: int) -> Any:
    """Return section 3 of the paper as masks, by hand: `[1, heads, tokens, tokens]`."""
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    slope = torch.tensor([2.0 ** (-8 * (head + 1) / 4) for head in range(4)])[:, None, None]
    bias = (slope * (column - row))[None]
    lowest = torch.finfo(torch.float32).min
    full = bias.masked_fill(column > row, lowest)
    window = getattr(config, "sliding_window", None)
    if window is None:
        return full
    near = full.masked_fill(row - column >= window, lowest)
    if len(set(getattr(config, "layer_types", None) or ["one"])) > 1:
        return {"full_attention": full, "sliding_attention": near}
    return near


class ByHand:
    """Plain transformers, eager, without its positions, with masks by hand, and no cache."""

    @torch.no_grad()
    def __init__(self, folder: Path) -> None:
        self.model = plain(folder)
        for name, tensor in [*self.model.named_buffers(), *self.model.named_parameters()]:
            if name.endswith(("inv_freq", "wpe.weight", "embed_positions.weight")):
                tensor.zero_()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        mask = masks(self.model.config, ids.shape[1])
        positions = torch.arange(ids.shape[1])[None]
        found: torch.Tensor = self.model(
            ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        return found

    def greedy(self, prompt: str, new: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(new):
            ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], dim=-1)
        rest: list[int] = ids[0, -new:].tolist()
        return rest


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_formula_by_hand(build: Build, family: str) -> None:
    session = build("position_encoding=alibi", "decode.max_new_tokens=8", family=family)
    reference = ByHand(Path(session.recipe.model.path))
    assert relative(logits(session.model, IDS), reference.logits(IDS)) < 1e-5
    assert relative(logits(session.model, IDS), logits(plain(reference_folder(session)), IDS)) > 0.1
    expected = [reference.greedy(prompt, 8) for prompt in PROMPTS]
    assert [session.generate(prompt).token_ids for prompt in PROMPTS] == expected
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


def reference_folder(session: Any) -> Path:
    return Path(session.recipe.model.path)


@pytest.mark.parametrize("cache", ["none", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "chunked"])
def test_every_attention_and_cache_gives_the_same(build: Build, attention: str, cache: str) -> None:
    words = ["position_encoding=alibi", f"attention={attention}", f"cache={cache}"]
    session = build(*words, "decode.max_new_tokens=8")
    reference = ByHand(reference_folder(session))
    expected = [reference.greedy(prompt, 8) for prompt in PROMPTS]
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


def test_rotary_models_have_no_limit_any_more(build: Build) -> None:
    session = build("position_encoding=alibi", "attention=chunked", "decode.max_new_tokens=4")
    assert session.context_tokens is None
    prompt = "once upon a time " * 40
    reference = ByHand(reference_folder(session))
    assert len(reference.tokenizer(prompt)["input_ids"]) > 128
    assert session.generate(prompt).token_ids == reference.greedy(prompt, 4)


def test_a_table_keeps_its_limit(build: Build) -> None:
    assert build("position_encoding=alibi", family="gpt2").context_tokens == 128


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 20, 32, 71])
def test_the_bias_is_that_of_bloom(heads: int) -> None:
    """Which is a row's own, but for what the whole row has in common."""
    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[None]
    ours = LinearBias(slopes(heads))(torch.arange(9), torch.arange(9))
    torch.testing.assert_close(ours - ours[..., :1], (theirs - theirs[..., :1]).expand_as(ours))


def test_eight_heads_have_the_slopes_of_the_paper() -> None:
    assert slopes(8) == [2.0**-power for power in range(1, 9)]


def test_the_receipt_reads_the_masks(build: Build) -> None:
    session = build("position_encoding=alibi")
    found = receipt(session, "position_encoding").evidence
    # The ninth token, behind a prompt of 8: slopes 1/4, 1/16, 1/64, 1/256.
    assert found["distance of the last pair"] == 8
    assert found["penalties there"] == "-2, -0.5, -0.125, -0.03125"
    assert found["masks biased"] == 2
    assert found["numbers left of the former positions"] == 0


def test_an_idle_or_wrong_bias_is_no_proof(build: Build) -> None:
    session = build("position_encoding=alibi")
    given = session.built["position_encoding"]
    assert verdict(Alibi(), session)

    def with_bias(bias: LinearBias) -> bool:
        return verdict(Alibi(), session, built={"position_encoding": replace(given, bias=bias)})

    idle = LinearBias(slopes(4))
    assert not with_bias(idle)
    idle(torch.arange(9), torch.arange(9))
    assert with_bias(idle)
    idle.slopes = (0.5, 0.25, 0.125, 0.1)
    assert not with_bias(idle)
    rotating = build()
    assert not verdict(Alibi(), rotating, built=session.built)


def test_models_whose_positions_stay_are_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    assert hints(Alibi(), llama) == hints(Alibi(), None) == []
    bare = replace(llama, traits=frozenset())
    assert "rotates without" in refusals(Alibi(), bare)[0].message
    assert "made in code" in refusals(Alibi(), replace(llama, position="sinusoidal"))[0].message
    assert "none of the names" in refusals(Alibi(), replace(llama, position="learned"))[0].message
    assert hints(Alibi(), shape_of(model("gpt2"))) == []
    assert "model.alibi" in Alibi.excludes


def test_a_made_up_table_cannot_be_emptied(model: Callable[[str], Path]) -> None:
    (problem,) = refusals(Alibi(), shape_of(model("opt")), {"load.random"})
    assert "made up weights" in problem.message
    assert refusals(Alibi(), shape_of(model("llama")), {"load.random"}) == []

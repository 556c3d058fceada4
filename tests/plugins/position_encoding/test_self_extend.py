"""position_encoding=self-extend is algorithm 1 of the paper, computed naively here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoTokenizer
from transformers.masking_utils import eager_mask

from engine.errors import RecipeError
from engine.plugins.position_encoding.self_extend import GroupedScores, SelfExtend
from tests.conftest import Build
from tests.models import tiny_config, tiny_model
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

GROUP, WINDOW = 4, 8
WORDS = (
    "position_encoding=self-extend",
    f"position_encoding.group_size={GROUP}",
    f"position_encoding.window={WINDOW}",
    "attention=chunked",
    "attention.query_block=6",
    "attention.key_block=9",
)
IDS = (torch.arange(40)[None] * 7 + 3) % 300 + 3
PROMPTS = ["def add(a, b):", "a", "once upon a time there was a model of two layers only"]
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gpt_neox", "gpt_oss", "mixtral")


def turned(states: torch.Tensor, positions: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Return states turned to positions, `[tokens]`: halves of a head are the two coordinates."""
    angles = positions[:, None].float() * rotary.inv_freq
    cos, sin = (part * rotary.attention_scaling for part in (angles.cos(), angles.sin()))
    half = angles.shape[-1]
    one, two, rest = states[..., :half], states[..., half : 2 * half], states[..., 2 * half :]
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)


class Naive:
    """Plain transformers with algorithm 1 in it, on all tokens each time."""

    def __init__(self, folder: Path) -> None:
        self.model = plain(folder)
        decoder = self.model.get_decoder()
        rotary = decoder.rotary_emb
        (frequencies,) = rotary.inv_freq.shape
        size = frequencies if self.model.config.model_type == "gpt_oss" else 2 * frequencies

        def still(states: torch.Tensor, positions: Any = None, **_: Any) -> Any:
            shape = (1, states.shape[1], size)
            return torch.ones(shape), torch.zeros(shape)

        del decoder.rotary_emb
        decoder.rotary_emb = still

        def attend(
            module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any
        ) -> tuple[torch.Tensor, None]:
            heads = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(heads, dim=1) for each in (key, value))
            position = torch.arange(query.shape[2])
            neighbor = turned(query, position, rotary) @ turned(key, position, rotary).mT
            grouped = position // GROUP
            shift = WINDOW - WINDOW // GROUP
            group = turned(query, grouped + shift, rotary) @ turned(key, grouped, rotary).mT
            far = position[:, None] - position[None] >= WINDOW
            scores = torch.where(far, group, neighbor) * given["scaling"]
            if given.get("softcap") is not None:
                scores = (scores / given["softcap"]).tanh() * given["softcap"]
            scores = scores + mask
            if given.get("s_aux") is not None:
                sinks = given["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(-1)[..., : key.shape[2]]
            return (weights @ value).transpose(1, 2), None

        AttentionInterface.register("naive", attend)
        AttentionMaskInterface.register("naive", eager_mask)
        self.model.set_attn_implementation("naive")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(ids, use_cache=False).logits
        return found

    def greedy(self, prompt: str, new: int) -> list[int]:
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(new):
            ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], dim=-1)
        rest: list[int] = ids[0, -new:].tolist()
        return rest


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("naive", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_algorithm_by_hand(build: Build, family: str) -> None:
    """Alone and padded, with a cache that grows."""
    session = build(*WORDS, "decode.max_new_tokens=8", family=family)
    folder = Path(session.recipe.model.path)
    reference = Naive(folder)
    assert relative(logits(session.model, IDS), reference.logits(IDS)) < 1e-5
    assert relative(logits(session.model, IDS), logits(plain(folder), IDS)) > 0.01
    expected = [reference.greedy(prompt, 8) for prompt in PROMPTS]
    assert [session.generate(prompt).token_ids for prompt in PROMPTS] == expected
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


@pytest.mark.parametrize("cache", ["none", "static"])
@pytest.mark.parametrize("attention", ["native", "eager", "chunked"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_attention_and_cache_gives_the_same(
    build: Build, family: str, attention: str, cache: str
) -> None:
    words = (*WORDS[:3], f"attention={attention}", f"cache={cache}", "decode.max_new_tokens=8")
    session = build(*words, family=family)
    reference = Naive(Path(session.recipe.model.path))
    expected = [reference.greedy(prompt, 8) for prompt in PROMPTS]
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


def test_it_reaches_beyond_the_context(build: Build) -> None:
    session = build(*WORDS, "decode.max_new_tokens=4")
    assert session.context_tokens == (128 - WINDOW) * GROUP + WINDOW == 488
    prompt = "once upon a time " * 30
    reference = Naive(Path(session.recipe.model.path))
    assert 128 < len(reference.tokenizer(prompt)["input_ids"]) < 488
    assert session.generate(prompt).token_ids == reference.greedy(prompt, 4)


@pytest.mark.parametrize(
    "family", ["llama", "olmo2", "starcoder2", "phi3", "gpt_oss", "deepseek_v3"]
)
def test_within_the_window_nothing_changes(build: Build, family: str) -> None:
    words = ("position_encoding=self-extend", "position_encoding.window=120", "attention=eager")
    session = build(*words, family=family)
    reference = logits(plain(Path(session.recipe.model.path)), IDS)
    assert relative(logits(session.model, IDS), reference) < 1e-6


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("cohere", {"logit_scale": 1.0}),  # neighboring numbers are the coordinates
        ("glm4", {"head_dim": 16, "pad_token_id": 0}),
        ("phi", {"partial_rotary_factor": 0.5}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
    ],
)
def test_the_models_own_rotation_is_respected(
    build: Build, tmp_path: Path, family: str, extra: dict[str, Any], monkeypatch: Any
) -> None:
    """Parts of a head, other coordinates, frequencies and scaling of a yarn checkpoint."""
    from tests import models

    monkeypatch.setitem(models._SHAPES, family, (family, {**models._GROUPED, **extra}))
    folder = tiny_model(family, tmp_path)
    words = ("position_encoding=self-extend", "position_encoding.window=120", "attention=eager")
    session = build(f"model.path={folder}", *words)
    assert relative(logits(session.model, IDS), logits(plain(folder), IDS)) < 1e-6


def test_padding_does_not_count_without_generate(build: Build) -> None:
    """A decoder that tells the model no positions gets those behind the padding."""
    session = build(*WORDS)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(43) >= 3)[None].long()
    with torch.no_grad():
        found = session.model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    assert relative(found, logits(session.model, IDS)) < 1e-5


def test_the_receipt_counts_pairs(build: Build) -> None:
    session = build(*WORDS[:2], "position_encoding.window=5", *WORDS[3:])
    evidence = receipt(session, "position_encoding").evidence
    # Two layers; of 9 tokens, each with itself and those before: 4 * 5 / 2 = 10 beyond 4 apart.
    assert evidence["pairs of tokens grouped"] == 2 * 10
    assert evidence["pairs of tokens in the window"] == 2 * (45 - 10)
    assert evidence["frequencies that rotate keys before they are cached"] == 0
    assert evidence["largest distance in it"] == 127
    # (128 - 5 + 5 // 4) * 4: one more and the last token would be 128 apart from the first.
    assert (evidence["context before"], evidence["context after"]) == (128, 496)
    assert session.built["position_encoding"].scores.largest_distance(497) == 128


def test_what_still_rotates_or_never_ran_is_no_proof(build: Build) -> None:
    session = build(*WORDS)
    plugin = SelfExtend(GROUP, WINDOW)
    given = session.built["position_encoding"]
    assert verdict(plugin, session)
    assert not verdict(plugin, build(), built=session.built)
    idle = replace(given, scores=GroupedScores(session.source_config, GROUP, WINDOW))
    assert not verdict(plugin, session, built={"position_encoding": idle})
    assert not verdict(plugin, session, source_config=session.config)


def test_what_cannot_be_grouped_is_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    assert hints(SelfExtend(window=64), llama) == hints(SelfExtend(), None) == []
    assert hints(SelfExtend(group_size=1, window=0), llama) == [
        "position_encoding.group_size=4",
        "position_encoding.window=64",
    ]
    assert hints(SelfExtend(window=128), llama) == ["position_encoding.window=64"]
    for model_type, why in (
        ("smollm3", "not all of its layers rotate"),
        ("cohere2", "not all of its layers rotate"),
        ("hunyuan_v1_dense", "after rotating"),
        ("nanochat", "after rotating"),
        ("llama4_text", "code of its own kind"),
        ("deepseek_v32", "once more to pick the keys"),
        ("persimmon", "does not tell its attention the positions"),
    ):
        (problem,) = refusals(SelfExtend(window=64), replace(llama, model_type=model_type))
        assert why in problem.message
    gemma = shape_of(model("gemma3"))
    assert "rotate differently" in refusals(SelfExtend(window=64), gemma)[0].message
    dynamic = replace(llama, rope_type="dynamic")
    assert "length of the text" in refusals(SelfExtend(window=64), dynamic)[0].message


def test_it_needs_attention_that_asks_it(build: Build) -> None:
    with pytest.raises(RecipeError, match=r"attention\.scores"):
        build("position_encoding=self-extend", "position_encoding.window=64", "attention=sdpa")


def test_the_given_config_is_left_alone() -> None:
    from engine.contexts import PositionContext

    config = tiny_config("llama")
    before = config.to_dict()
    SelfExtend(window=64).position_encoding(PositionContext(config=config))
    assert config.to_dict() == before
    assert AutoConfig.for_model("llama").model_type == "llama"

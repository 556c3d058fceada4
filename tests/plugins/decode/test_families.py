"""Every decoder gives the tokens of plain transformers, on families that keep text differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, StaticCache

from engine.contexts import DecodeContext, Generation
from engine.decoding.loop import TokenDecoder
from engine.plugins.decode.assisted import Assisted, AssistedDecoder
from engine.plugins.decode.beam import Beam, BeamDecoder
from engine.plugins.decode.generate import Generate
from engine.plugins.decode.prompt_lookup import LookupDecoder, PromptLookup
from tests.conftest import Build
from tests.models import tiny_model
from tests.plain import greedy
from tests.plugins.helpers import plain

FAMILIES = (
    "llama", "mistral", "qwen3", "gemma3", "gpt2", "bloom", "falcon", "gpt_neox", "opt",
)  # fmt: skip
NEW = 24
"""With the longer row, beyond the windows of 16 tokens."""
ROWS = [[5, 9, 3], [3, 14, 15, 92, 65, 35, 89, 79, 3, 14, 15, 92]]


def batch(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class Family:
    """A tiny model, a draft that is often right, and what plain transformers makes of it."""

    def __init__(self, folder: Path) -> None:
        self.model = plain(folder)
        self.draft = plain(folder)
        self.folder = folder
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.context = DecodeContext(
            model=self.model, tokenizer=tokenizer, seed=3, end_ids=frozenset({2})
        )
        with torch.no_grad():
            torch.manual_seed(1)
            for weight in self.draft.parameters():
                if weight.dim() > 1:
                    weight.add_(0.02 * weight.std() * torch.randn_like(weight))

    def reference(self, rows: list[list[int]], **options: Any) -> list[list[int]]:
        ids, mask = batch(rows)
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options
        )
        found: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return found

    def ask(self, rows: list[list[int]], cache: str = "dynamic") -> Generation:
        ids, mask = batch(rows)
        length = ids.shape[1] + NEW
        makers: dict[str, Any] = {
            "dynamic": lambda: DynamicCache(config=self.model.config),
            "static": lambda: StaticCache(config=self.model.config, max_cache_len=length),
            "none": lambda: None,
        }
        return Generation(
            input_ids=ids, attention_mask=mask, cache=makers[cache](), max_new_tokens=NEW
        )

    def assisted(self, **options: Any) -> AssistedDecoder:
        plugin = Assisted(draft=str(self.folder), **options)
        decoder = AssistedDecoder(plugin, self.context)
        decoder.draft = self.draft
        return decoder


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, model: Callable[[str], Path]) -> Family:
    return Family(model(request.param))


def answers(decoder: Any, generation: Generation) -> tuple[list[list[int]], Any]:
    steps = list(decoder(generation))
    return [list(row) for row in zip(*steps, strict=True)], steps[-1]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_one_by_one(family: Family, cache: str) -> None:
    alibi = family.model.config.model_type in ("bloom", "falcon")
    if cache == "static" and alibi:
        pytest.skip("refused by cache=static: its ALiBi is as long as the text")
    decoder = TokenDecoder(Generate(), family.context)
    for rows in (ROWS[1:], ROWS):
        found, _ = answers(decoder, family.ask(rows, cache))
        assert found == family.reference(rows)


@pytest.mark.parametrize("cache", ["dynamic", "none"])
def test_speculation(family: Family, cache: str) -> None:
    lookup = LookupDecoder(PromptLookup(num_draft_tokens=3, max_ngram=1), family.context)
    for decoder in (family.assisted(num_draft_tokens=3), lookup):
        for rows in (ROWS[1:], ROWS):
            generation = family.ask(rows, cache)
            found, last = answers(decoder, generation)
            # In a batch each row is alone: padding changes nothing, not even by rounding.
            assert found == [family.reference([row])[0] for row in rows]
            assert last.drafted >= last.accepted
            assert last.accepted > 0 or decoder is lookup
            if len(rows) == 1 and generation.cache is not None:
                assert generation.cache.get_seq_length() == len(rows[0]) + NEW - 1


def test_beams(family: Family) -> None:
    decoder = BeamDecoder(Beam(num_beams=3, length_penalty=0.5), family.context)
    for rows in (ROWS[1:], ROWS):
        found, _ = answers(decoder, family.ask(rows))
        assert found == family.reference(rows, num_beams=3, length_penalty=0.5)


@pytest.mark.parametrize(
    "cache",
    [
        ("dynamic",),
        ("static",),
        ("none",),
        ("sliding", "cache.window=64"),
        ("quantized", "cache.bits=8", "cache.residual=64", "cache.group_size=8"),
    ],
    ids=lambda words: words[0],
)
def test_a_change_of_frequencies_keeps_the_cache_that_was_chosen(
    build: Build, tmp_path: Path, cache: tuple[str, ...]
) -> None:
    """Phi-3 drops its keys where its long factors begin; the class of the cache must stay."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0 + i for i in range(8)]}
    folder = tiny_model(
        "phi3", tmp_path, original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    words = [f"cache={cache[0]}", *cache[1:], "decode.max_new_tokens=20"]
    session = build(f"model.path={folder}", *words)
    kept: list[Any] = []
    session.model.register_forward_hook(lambda module, given, out: kept.append(out.past_key_values))
    prompt = "a tale of two layers"
    ids = list(session.tokenizer(prompt)["input_ids"])
    assert len(ids) < 32 < len(ids) + 20
    found = session.generate(prompt).token_ids
    assert found == greedy(folder, ids, 20, use_cache=False)
    assert len({type(each) for each in kept}) == 1
    assert len({id(each) for each in kept}) == 1

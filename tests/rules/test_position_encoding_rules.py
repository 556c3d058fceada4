"""What the rules of position encodings forbid still goes wrong in plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from engine.plugins.position_encoding.dynamic import CACHE, Dynamic
from engine.plugins.position_encoding.longrope import LongRope
from tests.models import CONTEXT, VOCABULARY
from tests.plugins.helpers import plain

Folder = Callable[[str], Path]


def _answers(folder: Path, **parameters: Any) -> list[list[int]]:
    """Return what a model says beyond its context, with a cache and without."""
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {**config.rope_parameters, **parameters}
    config.max_position_embeddings = parameters.pop("context", CONTEXT)
    ids = torch.randint(3, VOCABULARY, (1, CONTEXT - 4), generator=torch.Generator().manual_seed(0))
    found = []
    for use_cache in (True, False):
        out = plain(folder, config=config).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            use_cache=use_cache,
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def test_dynamic_rope_cache(model: Folder) -> None:
    assert CACHE.code == "dynamic-rope-cache"
    cached, recomputed = _answers(model("llama"), rope_type="dynamic", factor=1.0)
    assert cached[:3] == recomputed[:3]
    assert cached != recomputed


def test_dynamic_rope_kept(model: Folder) -> None:
    """What a layer makes of a token depends on the length of the text, but for the first's keys."""
    assert {rule.code for rule in Dynamic.alarms.values()} == {"dynamic-rope-kept"}
    config = AutoConfig.from_pretrained(model("llama"))
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 4.0}
    ids = torch.randint(3, VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(0))

    def made(tokens: int) -> list[torch.Tensor]:
        tried = plain(model("llama"), config=config)
        with torch.no_grad():
            found = tried(ids[:, :tokens], use_cache=False, output_hidden_states=True)
        return [each[:, :100] for each in found.hidden_states]

    usual = made(100)
    for tokens, same in ((CONTEXT, [True, True, True]), (200, [True, False, False])):
        pairs = zip(made(tokens), usual, strict=True)
        assert [torch.allclose(one, other, atol=1e-4) for one, other in pairs] == same


def test_longrope_switch_cache(model: Folder) -> None:
    rule = LongRope([2.0], [1.0]).needs["cache.none"]
    assert rule.code == "longrope-switch-cache"
    told = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    factors = [1.0 + index for index in range(8)]
    cached, recomputed = _answers(
        model("llama"), **told, long_factor=factors, short_factor=[1.0] * 8
    )
    assert cached[:3] == recomputed[:3]
    assert cached != recomputed
    cached, recomputed = _answers(model("llama"), **told, long_factor=factors, short_factor=factors)
    assert cached == recomputed

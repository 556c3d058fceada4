"""position_encoding=native compares real frequencies with the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import engine
from engine.plugins.position_encoding.native import NativePositions
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.helpers import logits, plain, receipt, verdict


@pytest.mark.parametrize(
    ("family", "frequencies"),
    [
        ("llama", 8),
        ("gemma3", 16),
        ("gpt_neox", 2),
        ("falcon-rotary", 8),
        ("gpt2", 0),
        ("bloom", 0),
    ],
)
def test_frequencies_are_the_checkpoints(build: Build, family: str, frequencies: int) -> None:
    found = receipt(build(family=family), "position_encoding")
    assert found.ok
    assert found.evidence["inverse frequencies"] == frequencies
    assert found.evidence["of them changed"] == 0


def test_changed_positions_contradict_it(build: Build) -> None:
    session = build()
    assert verdict(NativePositions(), session)
    session.model.model.rotary_emb.inv_freq[3] *= 1.01
    assert not verdict(NativePositions(), session)
    assert not verdict(NativePositions(), build("position_encoding=yarn"))


def test_what_was_asked_before_changes_no_answer(tmp_path: Path) -> None:
    """transformers keeps the frequencies of the longest text so far: those of a checkpoint, too."""
    positions = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    folder = tiny_model("llama", tmp_path, rope_parameters=positions, max_position_embeddings=32)
    ids = torch.arange(100)[None] + 3
    with engine.build(engine.compose("base", [f"model.path={folder}"])) as session:
        before = logits(session.model, ids[:, :48])
        logits(session.model, ids)
        assert torch.equal(logits(session.model, ids[:, :48]), before)
    stock = plain(folder)
    before = logits(stock, ids[:, :48])
    logits(stock, ids)
    assert not torch.equal(logits(stock, ids[:, :48]), before)

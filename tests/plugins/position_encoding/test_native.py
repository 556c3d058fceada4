"""position_encoding=native compares real frequencies with the checkpoint's."""

from __future__ import annotations

import pytest

from engine.plugins.position_encoding.native import NativePositions
from tests.conftest import Build
from tests.plugins.helpers import receipt, verdict


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

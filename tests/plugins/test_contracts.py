"""Every plugin that we ship keeps the contract that `engine.testing` holds third parties to."""

from __future__ import annotations

from typing import Any

import pytest

from engine import registry
from engine.testing import PluginContract
from tests.gguf_files import contract_words

# What a choice needs beside its defaults; a new plugin gets its contract without an entry here.
SETTINGS: dict[str, dict[str, Any]] = {
    "decode=assisted": {"options": {"draft": "models/llama"}},  # the contract's own model
    "decode=beam": {"exact": False},  # it looks for a likelier answer than the greedy one
    "decode=compiled": {"overrides": ["cache=static"], "pytestmark": pytest.mark.slow},
    "attention=window": {"options": {"size": 8}, "exact": False},
    "attention=sinks": {"options": {"sinks": 2, "window": 8}, "exact": False},
    "cache=fp8": {"exact": False},
    "cache=quantized": {"options": {"group_size": 8, "residual": 8}, "exact": False},
    "cache=sinks": {"options": {"sinks": 2, "window": 8}, "exact": False},
    "cache=sliding": {"options": {"window": 8}, "exact": False},
    "load=gguf": {"options": {"file": "F32.gguf"}, "_words": contract_words},
    "heads=grouped": {"options": {"num_key_value_heads": 1}},
    "position_encoding=learned": {"family": "gpt2"},
    "position_encoding=longrope": {"options": {"long_factor": [1.0, 1.5, 2, 2.5, 3, 3.5, 4, 4]}},
    "position_encoding=self-extend": {"options": {"window": 64}},
    "position_encoding=sinusoidal": {"family": "gpt2"},
    "observe=trace": {"options": {"path": "trace.jsonl"}},
}

OURS = [
    claim
    for names in registry.installed().values()
    for claims in names.values()
    for claim in claims
    if claim.distribution.startswith("recipe-engine ")
]


def _contract(choice: registry.Choice) -> type[PluginContract]:
    settings = SETTINGS.get(f"{choice.slot}={choice.name}", {})
    name = f"Test{choice.slot.title()}{choice.name.title()}".replace("_", "").replace("-", "")
    return type(name, (PluginContract,), {"plugin": choice.load(), "slot": choice.slot, **settings})


for _choice in OURS:
    _made = _contract(_choice)
    assert _made.__name__ not in globals()
    globals()[_made.__name__] = _made


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_for_choices_that_exist(name: str) -> None:
    assert name in {f"{choice.slot}={choice.name}" for choice in OURS}

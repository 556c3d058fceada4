"""A choice that does nothing is an error, and its own word for it is not enough."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from engine import receipts
from engine.contexts import Attention, Heads, PositionEncoding, Quantization, Receipt
from engine.errors import PluginError
from engine.probe import Probe
from engine.session import Session
from tests.conftest import Build


@pytest.fixture
def session(build: Build) -> Session:
    return build()


def _denied(session: Session) -> str:
    with pytest.raises(PluginError) as caught:
        receipts.collect(session)
    assert caught.value.exit_code == 5
    assert {problem.code for problem in caught.value.problems} == {"no-effect"}
    assert all(problem.hint for problem in caught.value.problems)
    return str(caught.value)


def _claim(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every plugin claim that all is well."""
    said = [
        Receipt(slot=one.slot, claim="it works", evidence={}, ok=True, plugin=one.choice)
        for one in session.hooks.chosen
    ]
    monkeypatch.setattr(session.hooks, "receipts", lambda _: list(said))


@pytest.fixture
def believed(session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Return a session whose plugins claim that all is well, whatever is done to it."""
    _claim(session, monkeypatch)
    assert len(receipts.collect(session)) == len(session.hooks.chosen)
    return session


def test_receipts_come_in_the_order_of_the_slots(session: Session) -> None:
    order = [one.slot for one in session.hooks.chosen]
    assert [receipt.slot for receipt in session.receipts] == order


def test_a_slot_without_receipt_is_an_error(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [receipt for receipt in session.receipts if receipt.slot not in ("cache", "load")]
    monkeypatch.setattr(session.hooks, "receipts", lambda _: given)
    message = _denied(session)
    assert "load=transformers (recipe-engine 0.1.0) gave no receipt" in message
    assert "cache=dynamic (recipe-engine 0.1.0) gave no receipt" in message
    assert "attention" not in message


def test_a_receipt_that_does_not_hold_is_an_error(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [replace(one, ok=one.slot != "cache") for one in session.receipts]
    monkeypatch.setattr(session.hooks, "receipts", lambda _: given)
    message = _denied(session)
    assert "cache=dynamic (recipe-engine 0.1.0) did not take effect" in message
    assert "tokens held 9" in message


def test_observers_owe_no_receipt(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build("observe=trace", f"observe.path={tmp_path / 'trace.jsonl'}")
    given = [receipt for receipt in session.receipts if receipt.slot != "observe"]
    monkeypatch.setattr(session.hooks, "receipts", lambda _: given)
    assert receipts.collect(session) == given


@pytest.mark.parametrize("probe", [None, Probe()])
def test_a_probe_that_sent_nothing_proves_nothing(probe: Any, session: Session) -> None:
    session.probe = probe
    message = _denied(session)
    assert "task=text-generation" in message
    assert "did not send anything through the model" in message


# -- what the core saw itself -------------------------------------------------------------------


def _other(**values: Any) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        config = copy.deepcopy(config)
        for name, value in values.items():
            setattr(config, name, value)
        return config

    return make


def test_positions_that_the_model_was_not_built_with(believed: Session) -> None:
    asked = _other(max_position_embeddings=999)(believed.source_config)
    believed.built["position_encoding"] = PositionEncoding(config=asked)
    message = _denied(believed)
    assert "max_position_embeddings" in message
    assert "asked 999, model 128" in message


def test_heads_that_the_model_does_not_have(believed: Session) -> None:
    asked = _other(num_key_value_heads=1)(believed.source_config)
    believed.built["heads"] = Heads(config=asked)
    assert "heads=native" in (message := _denied(believed))
    assert "asked 1, model 2" in message


def test_weights_that_are_not_packed(believed: Session) -> None:
    config: Any = BitsAndBytesConfig  # which has no annotations
    believed.built["quantize"] = Quantization(config=config(load_in_8bit=True))
    assert "it packs weights; evidence: packed tensors 0" in _denied(believed)


def test_a_trait_that_says_that_weights_are_packed(
    believed: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(believed.recipe.quantize), "provides", ("weights.packed",))
    assert "it packs weights; evidence: packed tensors 0" in _denied(believed)


def test_an_attention_that_was_never_called(believed: Session) -> None:
    believed.built["attention"] = Attention(forward=print, mask=print)  # type: ignore[arg-type]
    assert "calls in the probe 0, used instead sdpa" in _denied(believed)


def test_an_attention_that_was_called_is_believed(believed: Session) -> None:
    believed.built["attention"] = Attention(forward=print, mask=print)  # type: ignore[arg-type]
    assert believed.probe is not None
    believed.probe.attention_calls = 4
    receipts.collect(believed)


def test_another_implementation_than_asked(believed: Session) -> None:
    believed.built["attention"] = Attention(implementation="eager")
    assert "asked eager, used sdpa" in _denied(believed)
    believed.model.config._attn_implementation_internal = "kernels-community/flash-attn2"
    believed.built["attention"] = Attention(implementation="flash_attention_2")
    receipts.collect(believed)


def test_a_cache_that_missed_tokens(believed: Session) -> None:
    assert believed.probe is not None
    believed.probe.tokens = [8, 1, 1]
    assert "known 9, sent 10" in _denied(believed)


def _counting(session: Session) -> Any:
    """Return the probe's cache, which from now on says that it knows what it knows now."""
    assert session.probe is not None
    cache: Any = session.probe.cache
    known = cache.get_seq_length()
    cache.get_seq_length = lambda: known
    return cache


def test_a_cache_that_holds_no_numbers(believed: Session) -> None:
    for layer in _counting(believed).layers:
        layer.keys = layer.values = torch.tensor([])
    assert "numbers kept 0" in _denied(believed)


@pytest.mark.parametrize(
    "keep",
    [
        lambda keys: {"packed": [(keys.to(torch.uint8), {"scale": 1})]},
        lambda keys: (keys,),
        lambda keys: type("Kept", (), {"__init__": lambda self: setattr(self, "data", keys)})(),
    ],
)
def test_a_cache_may_keep_its_numbers_anywhere(
    keep: Callable[[torch.Tensor], Any], believed: Session
) -> None:
    for layer in _counting(believed).layers:
        layer.elsewhere = keep(layer.keys)
        layer.keys = layer.values = None
    receipts.collect(believed)


IDLE = {
    "position_encoding": "position_encoding.unchanged",
    "heads": "heads.unchanged",
    "quantize": "quantize.unchanged",
    "attention": "attention.unchanged",
}


@pytest.mark.parametrize("slot", IDLE)
def test_a_choice_that_changes_nothing_must_say_so(
    slot: str, believed: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = believed.hooks.slot(slot).plugin
    assert IDLE[slot] in plugin.provides
    monkeypatch.setattr(type(plugin), "provides", ())
    monkeypatch.setattr(believed.hooks, "answers", lambda who, hook: False)
    believed.built["quantize"] = Quantization()
    message = _denied(believed)
    assert f"{slot}={believed.recipe.choices[slot]} (recipe-engine 0.1.0)" in message
    assert f"trait it lacks {IDLE[slot]}" in message


def test_no_cache_must_be_meant(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    session = build("cache=none")
    monkeypatch.setattr(type(session.recipe.cache), "provides", ())
    assert "trait it lacks cache.none" in _denied(session)


@pytest.mark.parametrize("slot", [slot for slot in IDLE if slot != "quantize"])
def test_who_works_on_the_loaded_model_is_believed(
    slot: str, believed: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is seen in a config, it may have been done in `prepare`."""
    one = believed.hooks.slot(slot)
    monkeypatch.setattr(type(one.plugin), "provides", ())
    monkeypatch.setattr(
        believed.hooks, "answers", lambda who, hook: (who, hook) == (one, "prepare")
    )
    receipts.collect(believed)


FAITHFUL = [
    ["cache=none"],
    ["cache=static"],
    ["attention=eager"],
    ["quantize=bitsandbytes"],
    ["quantize=bitsandbytes", "quantize.bits=8"],
    ["load=random"],
    ["load=random", "quantize=bitsandbytes"],
]


@pytest.mark.parametrize("choices", FAITHFUL, ids=" ".join)
def test_no_honest_choice_is_denied(choices: list[str], build: Build) -> None:
    assert all(receipt.ok for receipt in build(*choices).receipts)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "bloom", "gpt2", "falcon-rotary"])
def test_no_family_is_denied(family: str, build: Build) -> None:
    """Windows, models without the attention interface, masks in buffers, fused projections."""
    assert all(receipt.ok for receipt in build(family=family).receipts)

"""What is suggested can be pasted, is sound, fits, and costs what is said."""

from __future__ import annotations

import pytest

from engine.planning.planner import Plan, plan
from engine.planning.suggesting import suggest
from engine.recipe import compose

TOO_LARGE = {
    "weights": ["model=llama-3.1-8b", "model.dtype=float16", "target=t4"],
    "keys and values": [
        "model=llama-3.1-8b", "model.dtype=bfloat16", "target=rtx4090", "workload.batch=2",
        "workload.prompt_tokens=40000",
    ],
    "scores": [
        "model=octocoder", "model.dtype=bfloat16", "target=a100-40gb", "attention=eager",
        "workload.prompt_tokens=8000",
    ],
    "everything": ["model=llama-3.1-70b", "model.dtype=bfloat16", "target=l4"],
}  # fmt: skip


def planned(*words: str) -> Plan:
    return plan(compose("base", words))


@pytest.mark.parametrize("words", TOO_LARGE.values(), ids=TOO_LARGE)
def test_every_change_makes_it_fit_as_it_says(words: list[str]) -> None:
    found = planned(*words)
    assert found.fits is False
    suggestions = suggest(found)
    assert suggestions
    for each in suggestions:
        again = planned(*words, *each.overrides)
        assert again.fits, each.overrides
        assert not again.verdict.problems
        assert again.peak_bytes == each.plan.peak_bytes
        assert again.tokens_per_second == each.plan.tokens_per_second


def test_what_keeps_the_answers_comes_first() -> None:
    suggestions = suggest(planned(*TOO_LARGE["scores"]))
    assert suggestions[0].costs == "exact"
    assert suggestions[0].overrides[0].startswith("attention=")
    losses = [each.lost for each in suggestions if each.overrides[0].startswith("quantize")]
    assert losses == sorted(losses)


def test_a_choice_that_helps_nothing_is_not_suggested() -> None:
    slots = {
        override.partition("=")[0]
        for each in suggest(planned(*TOO_LARGE["weights"]))
        for override in each.overrides
    }
    assert "quantize" in slots
    assert "cache" not in slots  # the weights alone are too large


def test_the_smallest_device_where_it_fits_is_named() -> None:
    (*_, last) = suggest(planned(*TOO_LARGE["weights"]))
    assert last.costs == "another device"
    assert last.plan.target.usable_gib is not None
    smaller = [
        name for name in ("t4", "l4", "a10", "rtx3090", "rtx4090", "a100-40gb", "h100")
        if planned(*TOO_LARGE["weights"], f"target={name}").fits
        and (planned("model=gpt-3", f"target={name}").target.usable_gib or 0)
        < last.plan.target.usable_gib
    ]  # fmt: skip
    assert smaller == []


def test_where_no_choice_is_enough_a_device_for_packed_weights_is_named_too() -> None:
    packed, plain = suggest(planned(*TOO_LARGE["everything"]))
    assert [word.partition("=")[0] for word in packed.overrides] == ["quantize", "target"]
    assert [word.partition("=")[0] for word in plain.overrides] == ["target"]
    assert (packed.plan.target.usable_gib or 0) < (plain.plan.target.usable_gib or 0)


def test_another_device_is_not_named_to_whom_has_one_of_their_own() -> None:
    words = ["model=llama-3.1-8b", "model.dtype=bfloat16", "target=l4", "target.usable_gib=12"]
    suggestions = suggest(planned(*words))
    assert suggestions
    assert not [each for each in suggestions if each.overrides[-1].startswith("target=")]


def test_no_change_is_beaten_by_another() -> None:
    choices = [each for each in suggest(planned(*TOO_LARGE["weights"])) if each.lost]
    for one in choices:
        for other in choices:
            worse = other.plan.peak_bytes > one.plan.peak_bytes
            slower = (other.plan.tokens_per_second or 0) < (one.plan.tokens_per_second or 0)
            assert other is one or worse or slower or other.lost > one.lost


def test_of_equals_the_one_that_needs_less_is_named() -> None:
    words = ["quantize=nf4", "model=octocoder", "target=rtx3090", "attention=eager"]
    first = suggest(planned(*words, "workload.prompt_tokens=8000"))[0]
    assert first.overrides == ("attention=native",)  # flash is as fast, of another package


def test_what_is_refused_anyway_gets_no_changes() -> None:
    found = planned("model=llama-3.1-8b", "model.dtype=bfloat16", "target=t4")
    assert found.fits is False
    assert found.refused
    assert suggest(found) == []


def test_what_fits_needs_no_change() -> None:
    assert suggest(planned("model=llama-3.1-8b", "model.dtype=bfloat16", "target=h100")) == []

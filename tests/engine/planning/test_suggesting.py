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


def test_what_fits_needs_no_change() -> None:
    assert suggest(planned("model=llama-3.1-8b", "model.dtype=bfloat16", "target=h100")) == []

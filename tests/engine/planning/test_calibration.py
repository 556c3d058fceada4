"""What was measured of this machine is fitted, kept and found again, and of no other machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.contexts import Term
from engine.errors import EngineError
from engine.planning import calibration
from engine.planning.calibrating import calibrate
from engine.planning.calibration import Calibration, Point
from engine.planning.fitting import Measured, fit
from engine.planning.passes import Pass
from engine.planning.planner import plan
from engine.planning.speed import Rates, cost
from engine.recipe import Recipe, compose

RESERVE = 300 * 2**20

TRUE = Calibration(
    launch=2e-5,
    fixed=1e-3,
    points=(
        Point(bytes=10_000_000, bandwidth=20e9, flops=50e9),
        Point(bytes=160_000_000, bandwidth=10e9, flops=100e9),
    ),
    reserve=RESERVE,
    retained=1.5,
    measured="2026-11-26",
)


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def embedded(*words: str) -> Recipe:
    return compose("base", ["model.path=recipes://embedded", "model.dtype=float32", *words])


def measured(launches: float, weights: int, flops: float, *, passing: int) -> Measured:
    """Return what a machine with the true figures would have shown of a stand-in."""
    context: Any = None
    rates = TRUE.rates(weights=weights, formats=("float32",), overlaps=False, origin="")
    terms = {
        "token": [
            Term(name="weights", bytes=weights, launches=launches, moved=weights),
            Term(name="products", flops=2.0 * weights, rate="float32"),
        ],
        "prompt": [
            Term(name="weights", bytes=weights, launches=launches, moved=weights),
            Term(name="products", flops=flops, rate="float32"),
            Term(name="activations", bytes=passing, during="pass"),
        ],
    }
    prices = {name: Pass(context, tuple(found), rates) for name, found in terms.items()}
    seconds = {name: cost(rates, found).seconds for name, found in terms.items()}
    peak = RESERVE + weights + int(TRUE.retained * passing)
    return Measured(prices, seconds, seconds, peak)


def test_the_figures_behind_what_was_measured_are_found() -> None:
    found = fit(
        {
            "narrow": measured(100, 1000, 1e6, passing=2_000_000),
            "deep": measured(500, 1000, 1e6, passing=2_000_000),
            "small": measured(200, 10_000_000, 5e9, passing=4_000_000),
            "wide": measured(150, 160_000_000, 80e9, passing=30_000_000),
        },
        ("small", "wide"),
    )
    assert found.launch == pytest.approx(TRUE.launch, rel=0.01)
    assert found.fixed == pytest.approx(TRUE.fixed, rel=0.01)
    assert found.reserve == pytest.approx(RESERVE, rel=0.01)
    assert found.retained == pytest.approx(TRUE.retained, rel=0.01)
    for ours, theirs in zip(found.points, TRUE.points, strict=True):
        assert ours.bytes == theirs.bytes
        assert ours.bandwidth == pytest.approx(theirs.bandwidth, rel=0.01)
        assert ours.flops == pytest.approx(theirs.flops, rel=0.01)


def test_a_gpus_arithmetic_is_told_from_what_a_prompt_takes_beside_it() -> None:
    launch, beside, reading, flops = 1e-5, 3e-3, 1e12, 4e14

    def shown(launches: int, computed: float) -> Measured:
        terms = {
            "token": [Term(name="weights", bytes=1000, launches=launches)],
            "prompt": [
                Term(name="weights", bytes=1000, launches=launches),
                Term(name="products", flops=computed, rate="float32"),
            ],
        }
        context: Any = None
        prices = {name: Pass(context, tuple(found), None) for name, found in terms.items()}
        least = {
            "token": launch * launches,
            "prompt": beside + max(launch * launches, computed / flops),
        }
        # The computer is busy with other work most of the time, which the device does not mind.
        busy = {"token": 2 * least["token"], "prompt": least["prompt"] + launch * launches}
        return Measured(prices, busy, least, 0)

    models = {"narrow": shown(100, 0), "deep": shown(1000, 0), "wide": shown(150, 4e12)}
    found = fit(models, ("wide",), reading)
    assert found.launch == pytest.approx(2 * launch)
    (point,) = found.points
    assert point.bandwidth == reading
    assert point.flops == pytest.approx(flops, rel=0.01)


def test_a_machine_that_slows_down_starts_no_pass_before_it_begins() -> None:
    models = {
        "narrow": measured(100, 1000, 1e6, passing=0),
        "deep": measured(500, 1000, 1e6, passing=0),
    }
    slower = {name: 1.5 * each for name, each in models["deep"].seconds.items()}
    models["deep"] = replace(models["deep"], seconds=slower)
    found = fit(models | {"wide": measured(150, 160_000_000, 80e9, passing=0)}, ("wide",))
    assert found.fixed == 0
    assert found.launch == pytest.approx(slower["token"] / 500, rel=0.01)


def test_figures_of_a_busy_machine_say_so() -> None:
    for spread, told in ((1.4, False), (3.1, True)):
        calibration.save(embedded(), "float32", replace(TRUE, spread=spread))
        assert ("differed by a factor of 3.1" in plan(embedded()).as_dict()["rates"]) == told


@pytest.mark.parametrize(
    ("weights", "bandwidth"),
    [(1, 20e9), (10_000_000, 20e9), (40_000_000, 200e18**0.5), (10**10, 10e9)],
)
def test_sizes_in_between_are_reckoned_by_their_logarithms(weights: int, bandwidth: float) -> None:
    rates = TRUE.rates(weights=weights, formats=("float32",), overlaps=False, origin="")
    assert rates.bandwidth == pytest.approx(bandwidth)


def test_a_plan_uses_what_was_measured_of_its_choices() -> None:
    before = plan(embedded())
    assert before.tokens_per_second is None
    calibration.save(embedded(), "float32", TRUE)
    found = plan(embedded())
    assert found.tokens_per_second is not None
    assert "measured of this machine on 2026-11-26" in found.as_dict()["rates"]
    assert "other choices" not in found.as_dict()["rates"]
    # Lengths change nothing of what runs, a number of bits does.
    assert "other choices" not in plan(embedded("decode.max_new_tokens=7")).as_dict()["rates"]
    other = plan(embedded("quantize=nf4"))
    assert "other choices" in other.as_dict()["rates"]
    assert other.tokens_per_second is not None


def test_choices_have_figures_of_their_own() -> None:
    slow = Calibration(**{**vars(TRUE), "launch": 1e-3})
    calibration.save(embedded(), "float32", TRUE)
    calibration.save(embedded("quantize=nf4"), "float32", slow)
    plain, packed = plan(embedded()), plan(embedded("quantize=nf4"))
    assert plain.pricer.rates is not None
    assert packed.pricer.rates is not None
    assert (plain.pricer.rates.launch, packed.pricer.rates.launch) == (2e-5, 1e-3)


def test_the_reserve_and_what_allocators_keep_is_what_was_measured() -> None:
    calibration.save(embedded(), "float32", TRUE)
    found = plan(embedded("workload.prompt_tokens=400")).prompt
    kept = RESERVE + int((TRUE.retained - 1) * sum(found.passing.values()))
    assert found.reserve == kept


def test_figures_of_another_machine_or_library_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibration.save(embedded(), "float32", TRUE)
    here = calibration.machine()
    for change in ({"host": "other"}, {"versions": {"torch": "9.9"}}, {"threads": "64"}):
        calibration._parsed.cache_clear()
        monkeypatch.setattr(calibration, "machine", lambda change=change: here | change)
        assert plan(embedded()).tokens_per_second is None
    # Of another device than this one there is only its specification.
    monkeypatch.setattr(calibration, "machine", lambda: here)
    calibration._parsed.cache_clear()
    other = plan(compose("base", ["model=llama-3.1-8b", "target=a10"]))
    assert "specification of a10" in other.as_dict()["rates"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, '{"machine": 3}', '{"entries": {"a": {}}}']
)
def test_a_file_that_cannot_be_read_is_no_measurement(text: str) -> None:
    calibration.save(embedded(), "float32", TRUE)
    calibration.file().write_text(text, encoding="utf-8")
    calibration._parsed.cache_clear()
    assert plan(embedded()).tokens_per_second is None
    calibration.save(embedded(), "float32", TRUE)  # and is written anew
    assert plan(embedded()).tokens_per_second is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"launch": "x"}, {"launch": -1}, {"fixed": "x"}, {"fixed": None}, {"fixed": -2},
        {"points": []}, {"points": [{"bytes": 1}]}, {"retained": "x"}, {"reserve": "x"},
        {"reserve": -5}, {"spread": None}, {"nonsense": 1}, {"fixed": -0.1}, {"reserve": 10**400},
        {"points": [{"bytes": 0, "bandwidth": 1e9, "flops": 1e9}]},
        {"points": [{"bytes": 9, "bandwidth": 1e-320, "flops": 1e9}]},
    ],
)  # fmt: skip
def test_figures_that_no_machine_has_are_no_measurement(changes: dict[str, Any]) -> None:
    calibration.save(embedded(), "float32", TRUE)
    content = json.loads(calibration.file().read_text("utf-8"))
    for entry in content["entries"].values():
        entry |= changes
    calibration.file().write_text(json.dumps(content), encoding="utf-8")
    calibration._parsed.cache_clear()
    assert plan(embedded()).tokens_per_second is None


def test_a_bad_entry_spoils_no_other() -> None:
    calibration.save(embedded(), "float32", TRUE)
    calibration.save(embedded("quantize=nf4"), "float32", replace(TRUE, fixed=-1))
    assert plan(embedded()).tokens_per_second is not None


def test_figures_of_the_users_own_are_not_replaced_by_measured_ones() -> None:
    calibration.save(embedded(), "float32", TRUE)
    own = ("target=cpu", "target.launch_us=5", "target.tflops={float32:0.1}")
    slow, fast = (plan(embedded(*own, f"target.bandwidth_gbs={each}")) for each in (1, 1000))
    assert "specification" in slow.as_dict()["rates"]
    assert (slow.tokens_per_second or 0) < (fast.tokens_per_second or 0)


def test_what_cannot_be_kept_is_refused_before_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be kept.*Not a directory[\s\S]*XDG_CACHE_HOME"):
        calibrate(embedded())
    calibration.file().parent.parent.unlink()
    calibration.file().mkdir(parents=True)
    with pytest.raises(EngineError, match="cannot be kept"):
        calibration.save(embedded(), "float32", TRUE)
    assert [each.name for each in calibration.file().parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("rates", "binds"),
    [
        ({"launch": 1.0}, "launches"),
        ({"bandwidth": 1.0}, "bandwidth"),
        ({"flops": {"float32": 1.0}}, "compute"),
    ],
)
def test_what_takes_longest_binds(rates: dict[str, Any], binds: str) -> None:
    fast: dict[str, Any] = {"launch": 1e-9, "bandwidth": 1e15, "flops": {"float32": 1e18}}
    term = Term(name="x", launches=3, moved=100.0, flops=300.0, rate="float32")
    both = [cost(Rates(**(fast | rates), overlaps=each), [term]) for each in (True, False)]
    assert [each.binds for each in both] == [binds, binds]
    assert both[0].seconds < both[1].seconds  # a GPU does not wait while operators are started


def test_a_driver_name_means_a_known_device() -> None:
    from engine.planning.devices import with_specification
    from engine.target import Target

    seen = Target(name="NVIDIA H200", kind="cuda", bandwidth_gbs=4814, capability="9.0")
    filled = with_specification(seen)
    assert filled.tflops["bfloat16"] == 989
    assert filled.bandwidth_gbs == 4814  # what the driver tells stays
    assert filled.name == seen.name
    old = with_specification(Target(name="GeForce RTX 3090", kind="cuda"))
    assert old.tflops["float16"] == 71
    unknown = Target(name="NVIDIA Unheard 9000", kind="cuda")
    assert with_specification(unknown) == unknown


def test_a_target_of_the_users_own_breaks_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from engine.planning.devices import known_targets

    folder = tmp_path / "recipes" / "target"
    folder.mkdir(parents=True)
    good = 'name: other\nkind: cuda\nusable_gib: "31"\ncapability: 8.6\n'
    (folder / "mine.yaml").write_text(good, encoding="utf-8")
    for number, text in enumerate(("usable_gib: abc", "tflops: 3", "usable_gib: .inf", "{")):
        (folder / f"bad{number}.yaml").write_text(f"kind: cuda\n{text}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    known = {target.name: target for target in known_targets()}
    assert not [name for name in known if name.startswith("bad")]
    assert known["mine"].usable_gib == 31.0  # by the name that chooses it
    assert known["mine"].capability == "8.6"
    assert "l4" in known


def test_every_known_device_can_be_recognized() -> None:
    from engine.planning.devices import known_targets

    named = {target.name: target.devices for target in known_targets() if target.kind == "cuda"}
    assert len(named) >= 14
    assert all(named.values())
    every = [device for devices in named.values() for device in devices]
    assert len(every) == len(set(every))

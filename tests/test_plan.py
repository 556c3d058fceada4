"""`engine plan` and `engine calibrate`, as a user runs them, and the score of runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

ModelFolder = Callable[[str], Path]


def as_json(engine: Run, *words: str, code: int = 0) -> dict[str, Any]:
    done = engine("plan", *words, "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_memory_reach_and_speed_are_told(engine: Run) -> None:
    done = engine("plan", "octocoder-4bit-rtx3090")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "fits, " in text.splitlines()[0]
    for word in (
        "packed weights", "scales", "KV cache", "activations", "runtime reserve", "together",
        "longest context: 8,192 tokens, the model's end", "largest batch: ", "decoding: ",
        "first token after ", "limited by ", "specification of rtx3090",
    ):  # fmt: skip
        assert word in text, word
    assert "\x1b" not in text


def test_the_terms_add_up(engine: Run) -> None:
    found = as_json(engine, "octocoder-4bit-rtx3090", "workload.prompt_tokens=1000")
    for part in (found["prefill"], found["decode"]):
        terms = [*part["held"].values(), *part["passing"].values(), part["reserve_bytes"]]
        assert part["peak_bytes"] == sum(terms)
    assert found["peak_bytes"] == max(found[name]["peak_bytes"] for name in ("prefill", "decode"))
    assert found["fits"] == (found["peak_bytes"] <= found["usable_bytes"])
    assert found["suggestions"] == []


def test_what_was_promised_of_reach_is_so(engine: Run) -> None:
    words = ["base", "model=llama-3.1-8b", "target=a10", "workload.prompt_tokens=2000"]
    found = as_json(engine, *words)
    batch, longest = found["largest_batch"], found["longest_context"]
    assert as_json(engine, *words, f"workload.batch={batch}")["fits"]
    assert not as_json(engine, *words, f"workload.batch={batch + 1}", code=4)["fits"]
    prompt = longest - found["workload"]["new_tokens"]
    words[-1] = f"workload.prompt_tokens={prompt}"
    assert as_json(engine, *words)["fits"]
    if longest < 131072:
        words[-1] = f"workload.prompt_tokens={prompt + 1}"
        assert not as_json(engine, *words, code=4)["fits"]


def test_what_does_not_fit_is_refused_with_lines_to_paste(engine: Run) -> None:
    words = ("base", "model=octocoder", "model.dtype=float16", "target=t4")
    found = as_json(engine, *words, code=4)
    assert found["fits"] is False
    pasted = found["suggestions"][0]["overrides"]
    assert as_json(engine, *words, *pasted)["fits"]
    done = engine("plan", *words)
    assert done.returncode == 4
    assert "does NOT fit" in done.stdout
    assert "it fits with:" in done.stdout
    assert " ".join(pasted) in done.stdout
    assert done.stderr == ""


def test_a_config_is_enough(engine: Run, model: ModelFolder, tmp_path: Path) -> None:
    shutil.copy(model("llama") / "config.json", tmp_path)
    found = as_json(engine, "base", f"model.path={tmp_path}", "target=l4")
    whole = as_json(engine, "base", f"model.path={model('llama')}", "target=l4")
    assert found["decode"] == whole["decode"]
    assert found["model"]["parameters"] == whole["model"]["parameters"]


def test_recipes_and_values_are_compared(engine: Run) -> None:
    words = ("base", "model=qwen3-8b", "model.dtype=bfloat16", "target=l4,t4")
    found = as_json(engine, *words, "quantize=none,int8,nf4")["plans"]
    assert len(found) == 6
    assert len({plan["peak_bytes"] for plan in found}) == 3
    done = engine("plan", "tiny", "tiny-4bit-gqa")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["tiny", "tiny-4bit-gqa"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("base", "model=nobody"), "nobody"),
        (("base", "model.path=no/such-model"), "engine list model"),
        (("base", "model=octocoder", "workload.batch=0"), "workload.batch"),
        (("base", "model=octocoder", "workload.prompt_tokens=-1"), "workload.prompt_tokens"),
        (("base", "model=octocoder", "target.bandwidth_gbs=-1"), "target.bandwidth_gbs"),
        (("octocoder-4bit-rtx3090", "--plot", "memory.gif"), ".png or .html"),
        (("octocoder-4bit-rtx3090", "--plot", "no/such/memory.png"), "no folder"),
        (("octocoder-4bit-rtx3090", "base", "quantize=awq,nf4"), "awq"),
        (("base", "model=octocoder", "workload.prompt_tokens=9000"), "workload.prompt_tokens=8064"),
        (
            ("llama-3.1-8b-nf4-t4", "workload.prompt_tokens=9000"),
            "the cache has room for 8,192 tokens",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(engine: Run, words: tuple[str, ...], told: str) -> None:
    done = engine("plan", *words)
    assert done.returncode not in (0, 1), done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_of_an_unsound_recipe_the_plan_and_the_refusal_are_told(engine: Run) -> None:
    done = engine("plan", "octocoder-4bit-rtx3090", "attention=flash", "model.dtype=float32")
    assert done.returncode not in (0, 1, 4)
    assert "packed weights" in done.stdout
    assert "on rtx3090: REFUSED" in done.stdout
    assert "flash" in done.stderr
    done = engine(
        "plan", "octocoder-4bit-rtx3090", "attention=flash", "model.dtype=float32,float16"
    )
    assert done.returncode == 0  # one of them can be had
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("model.dtype=float32:"))
    assert "flash" in told
    assert engine("plan", "tiny", "target=t4", "target.usable_gib=0.1,0.2").returncode == 4


def test_a_model_that_is_known_by_its_path_is_planned_with_its_known_sizes(engine: Run) -> None:
    words = ("target=rtx3090", "quantize=nf4")
    by_path = as_json(engine, "base", "model.path=bigcode/octocoder", *words)
    by_name = as_json(engine, "base", "model=octocoder", *words)
    assert by_name["choices"].pop("model") == "octocoder"
    assert by_path == by_name


def test_packed_weights_that_are_not_here_are_no_nothing(engine: Run, tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 128}
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    text = json.dumps(config | {"quantization_config": packed})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    words = ("base", f"model.path={tmp_path}", "target=h100")
    done = engine("plan", *words)
    assert done.returncode == 3
    assert "its weights are not on this machine" in done.stderr
    assert "note: what its weights take is not known" in engine("check", *words).stdout


def test_a_draft_that_is_known_by_its_path_is_counted(engine: Run) -> None:
    words = ("base", "model=llama-3.1-70b", "target=b200")
    draft = ("decode=assisted", "decode.draft=meta-llama/Llama-3.1-8B-Instruct")
    alone, both = as_json(engine, *words), as_json(engine, *words, *draft)
    assert both["decode"]["held"]["draft weights"] == 2 * 8_030_261_248
    assert both["peak_bytes"] > alone["peak_bytes"] + 2 * 8_030_261_248


def test_what_a_known_model_is_planned_in_is_told(engine: Run) -> None:
    done = engine("plan", "base", "model=gpt-oss-20b", "target=h100", "quantize=nf4")
    assert "(20.9 billion weights, bfloat16) on h100: fits" in done.stdout
    assert "published in 4 bits" in done.stdout
    assert "quantize=nf4 leaves 99% of the bytes" in done.stdout


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.html", b"<!doctype html>")])
def test_memory_is_drawn(engine: Run, tmp_path: Path, name: str, start: bytes) -> None:
    file = tmp_path / name
    odd = tmp_path / "a$\\b$.yaml"  # no formula
    odd.write_text("defaults: [tiny]\n", encoding="utf-8")
    assert engine("plan", str(odd), "--plot", str(file)).returncode == 0
    words = ("base", "model=llama-3.1-8b", "target=a10", "quantize=none,nf4")
    done = engine("plan", *words, "--plot", str(file))
    assert done.returncode == 0, done.stderr
    assert f"drawn: {file}" in done.stdout
    content = file.read_bytes()
    assert content.startswith(start)
    assert len(content) > 10_000
    if name.endswith("html"):
        text = content.decode("utf-8")
        found = as_json(engine, *words)["plans"]
        assert text.count("<table>") == len(found)
        for word in ("packed weights", "KV cache", "a10", "quantize=nf4", "131,072"):
            assert word in text, word
        # What is over the line is marked in the table.
        assert text.count('class="over"') > 0


def test_a_run_says_what_was_planned_and_keeps_the_score(
    engine: Run, model: ModelFolder, tmp_path: Path
) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    words = ("base", f"model.path={model('llama')}", "decode.max_new_tokens=8")
    done = engine("run", *words, "-p", "once upon a time", env=env)
    assert done.returncode == 0, done.stderr
    assert "planned: peak " in done.stderr
    assert "engine calibrate" in done.stderr
    done = engine("run", *words, "-p", "once upon a time", "--json", env=env)
    plan = json.loads(done.stdout)["plan"]
    assert plan["errors"]["peak_memory_bytes"] == pytest.approx(
        plan["planned"]["peak_memory_bytes"] / plan["measured"]["peak_memory_bytes"] - 1
    )
    engine("chat", *words, text="hello\nand again\n", env=env)
    lines = (tmp_path / "engine" / "scores.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4
    done = engine("plan", *words, env=env)
    assert "plans of 4 runs with these choices here were off by (median): peak " in done.stdout


def test_a_machine_is_measured_and_then_known(
    engine: Run, model: ModelFolder, tmp_path: Path
) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    words = ("base", f"model.path={model('llama')}", "model.dtype=float32")
    assert "speed: not known" in engine("plan", *words, env=env).stdout
    done = engine("calibrate", *words, "--json", env=env)
    assert done.returncode == 0, done.stderr
    ((_, found),) = json.loads(done.stdout)["calibrations"].items()
    assert 1e-7 < found["launch"] < 1e-3
    assert all(1e8 < point["bandwidth"] < 1e13 for point in found["points"])
    assert all(1e8 < point["flops"] < 1e15 for point in found["points"])
    done = engine("plan", *words, env=env)
    assert "decoding: " in done.stdout
    assert "by what was measured of this machine" in done.stdout
    done = engine("run", *words, "-p", "once upon a time", "--json", env=env)
    assert set(json.loads(done.stdout)["plan"]["errors"]) == {
        "tokens_per_second", "time_to_first_token", "peak_memory_bytes",
    }  # fmt: skip

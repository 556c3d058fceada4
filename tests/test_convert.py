"""`engine convert` writes what a recipe describes, and what it wrote is that model, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine
from engine.errors import CheckpointError, RecipeError, RuntimeFailure
from engine.loading import converting
from engine.loading.converting import convert
from tests.conftest import Run
from tests.models import tiny_model
from tests.plugins.helpers import IDS, logits, plain

Model = Callable[[str], Path]


def words(folder: Path, *more: str) -> list[str]:
    return [f"model.path={folder}", "model.dtype=float32", *more]


def answer(recipe: str, overrides: list[str]) -> tuple[dict[str, Any], list[int]]:
    """Return the tensors and the greedy tokens of a recipe."""
    with engine.build(engine.compose(recipe, overrides)) as session:
        state = {name: value.clone() for name, value in session.model.state_dict().items()}
        return state, session.generate("def add").token_ids


EVERYTHING = ("heads=grouped", "quantize=nf4-double", "position_encoding=yarn")


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", ()),
        ("llama", ("heads=grouped",)),
        ("llama", ("quantize=bitsandbytes",)),
        ("llama", ("quantize=bitsandbytes", "quantize.bits=8")),
        ("llama", ("position_encoding=yarn",)),
        ("gemma3", EVERYTHING),
        ("mixtral", ("quantize=nf4",)),
    ],
)
def test_what_is_written_is_the_model(
    model: Model, tmp_path: Path, family: str, choices: tuple[str, ...]
) -> None:
    overrides = words(model(family), *choices)
    done = convert(engine.compose("base", overrides), tmp_path / "new")
    before, expected = answer("base", overrides)
    recipe, *again = done.recipe
    after, found = answer(recipe, again)
    assert found == expected
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = tensor.equal(after[name]) if isinstance(tensor, torch.Tensor) else True
        assert same, name
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(done.files)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    if "heads=grouped" in choices:
        assert config["num_key_value_heads"] == 1
    assert ("quantization_config" in config) == any("quantize" in choice for choice in choices)


def test_plain_transformers_reads_it(model: Model, tmp_path: Path) -> None:
    recipe = engine.compose("base", words(model("llama"), "heads=grouped"))
    convert(recipe, tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    source = load_file(model("llama") / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert stored[name].equal(source[name].reshape(2, 16, 64).mean(0))
    with engine.build(recipe) as session:
        reference = logits(session.model)
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert (loaded(IDS, use_cache=False).logits - reference).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model("llama")).chat_template


def test_torchao_is_saved_too(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    overrides = words(model("llama"), "quantize=torchao")
    done = convert(engine.compose("base", overrides), tmp_path / "new")
    assert answer("base", overrides)[1] == answer(done.recipe[0], list(done.recipe[1:]))[1]


def test_settings_of_sampling_are_kept_as_they_were(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "old")
    given = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 1], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(given))
    convert(engine.compose("base", words(folder)), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text()) == given


def test_damage_is_found_later(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    done = convert(engine.compose("base", words(model("llama"))), folder)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in lines} == set(done.files) - {"SHA256SUMS"}
    assert all(
        hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() == line[:64] for line in lines
    )
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: SHA256SUMS says"):
        engine.build(engine.compose("base", words(folder)))


def test_nothing_that_is_there_is_lost(model: Model, tmp_path: Path) -> None:
    recipe = engine.compose("base", words(model("llama")))
    (tmp_path / "file").write_text("mine")
    for folder, says in (
        (tmp_path, "something in it"),
        (tmp_path / "file", "a file"),
        (tmp_path / "no" / "where", "no folder"),
    ):
        with pytest.raises(RecipeError, match=says):
            convert(recipe, folder)
    (tmp_path / "empty").mkdir()
    assert convert(recipe, tmp_path / "empty").files
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize(
    ("choices", "code"),
    [
        (["quantize=quanto"], "convert-unsavable"),
        (["position_encoding=alibi", "attention=eager"], "convert-position"),
        (
            ["position_encoding=self-extend", "position_encoding.window=32", "attention=eager"],
            "convert-position",
        ),
        (["load.device_map={rest:disk}", "load.offload_folder=x"], "convert-offloaded"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_loads(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choices: list[str], code: str
) -> None:
    monkeypatch.setattr(converting, "build", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(RecipeError) as caught:
        convert(engine.compose("base", words(model("llama"), *choices)), tmp_path / "new")
    assert code in {problem.code for problem in caught.value.problems}
    assert all(problem.hint for problem in caught.value.problems)
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link(model: Model, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    convert(engine.compose("base", words(model("llama"))), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "config.json").is_file()


def test_a_mounted_folder_is_refused_before_anything_loads(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda folder: folder == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="mounted folder"):
        convert(engine.compose("base", words(model("llama"))), tmp_path / "out")


@pytest.mark.parametrize("fault", ["changed", "failed", "interrupted"])
def test_no_half_of_a_folder_is_left(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    save = converting._save

    def spoiled(session: Any, folder: Path) -> None:
        if fault == "changed":
            with torch.no_grad():
                session.model.model.norm.weight.add_(1)
        save(session, folder)
        if fault == "failed":
            raise OSError(28, "No space left on device")
        if fault == "interrupted":
            raise KeyboardInterrupt
        with torch.no_grad():
            session.model.model.norm.weight.sub_(1)

    monkeypatch.setattr(converting, "_save", spoiled)
    expected: dict[str, tuple[type[BaseException], str]] = {
        "changed": (RuntimeFailure, r"not the same: .*norm\.weight"),
        "failed": (RuntimeFailure, "No space left"),
        "interrupted": (KeyboardInterrupt, ""),
    }
    kind, says = expected[fault]
    with pytest.raises(kind, match=says):
        convert(engine.compose("base", words(model("llama"))), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_to_run_it(model: Model, engine: Run, tmp_path: Path) -> None:
    more = ("cache=static", 'decode.stop=["a, b"]', "decode.max_new_tokens=7")
    done = engine("convert", "base", *words(model("llama"), *more), "--to", str(tmp_path / "new"))
    assert (done.returncode, done.stderr) == (0, "")
    line = done.stdout.splitlines()[-1]
    for part in ("cache=static", "decode.max_new_tokens=7", "decode.stop=", "model.dtype=float32"):
        assert part in line
    again = engine(
        "convert", "base", *words(model("llama")), "--to", str(tmp_path / "new"), "--json"
    )
    assert again.returncode == 2
    assert "something in it" in json.loads(again.stdout)["problems"][0]["message"]
    assert engine("convert", "base", *words(model("llama"))).returncode == 2


def test_the_words_compose_to_what_was_asked(model: Model, tmp_path: Path) -> None:
    asked = words(model("llama"), "cache=static", 'decode.stop=["a, b"]', "decode.max_new_tokens=7")
    recipe = engine.compose("base", asked)
    done = convert(recipe, tmp_path / "new")
    found = engine.compose(done.recipe[0], list(done.recipe[1:]))
    assert (found.cache, found.decode, found.attention) == (
        recipe.cache,
        recipe.decode,
        recipe.attention,
    )
    assert plain(tmp_path / "new").num_parameters() == plain(model("llama")).num_parameters()

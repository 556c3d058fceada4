"""Conversations that are saved, and resumed by another session or another process."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from engine import registry
from engine.caching import cache_file
from engine.contexts import KeyValues
from engine.errors import CheckpointError, RecipeError, RuntimeFailure
from engine.session import Session
from tests.conftest import Build, Run

ModelFolder = Callable[[str], Path]

TURNS = ["hello", "and you?"]
WORDS = ("decode.max_new_tokens=6",)

CHOICES: dict[str, list[str]] = {"static": ["cache.max_tokens=112"]}
"""Options that make a cache of few tokens do what it is for."""

CACHES = [name for name in registry.installed()["cache"] if name != "offloaded"]
"""All but the one that a CPU has no use for."""


def say(chat: Any, message: str) -> list[int]:
    stream = chat.send(message)
    for _ in stream:
        pass
    tokens: list[int] = stream.output.token_ids
    return tokens


def saved(session: Session, file: Path) -> Any:
    chat = session.chat()
    for turn in TURNS:
        say(chat, turn)
    chat.save(file)
    return chat


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("cache", CACHES)
def test_another_session_goes_on_exactly(
    build: Build, tmp_path: Path, cache: str, family: str
) -> None:
    words = [f"cache={cache}", *CHOICES.get(cache, []), *WORDS]
    try:
        session = build(*words, family=family)
    except RecipeError as refusal:
        pytest.skip(f"refused: {refusal.problems[0].message}")
    file = tmp_path / "talk.safetensors"
    chat = saved(session, file)
    expected = [say(chat, message) for message in ("go on", "and on")]
    again: Any = build(*words, family=family).chat(resume=file)
    assert again.messages == chat.messages[:4]
    found = [say(again, "go on")]
    receipt = again.receipt
    found.append(say(again, "and on"))
    assert found == expected
    if cache == "none":
        assert receipt is None
        return
    assert receipt is not None
    assert receipt.ok
    assert receipt.claim == "this turn processed only what was new"
    evidence = receipt.evidence
    assert int(evidence["from_cache"]) > 20
    assert evidence["forwarded"] == (
        int(evidence["conversation_tokens"]) - int(evidence["from_cache"]) + len(found[0]) - 1
    )


def test_another_process_goes_on_exactly(engine: Run, model: ModelFolder, tmp_path: Path) -> None:
    words = ["base", f"model.path={model('llama')}", *WORDS, "--json"]
    file = str(tmp_path / "talk.safetensors")
    whole = engine("chat", *words, text="hello\nand you?\n")
    first = engine("chat", *words, "--save", file, text="hello\n")
    assert first.returncode == 0, first.stderr
    assert f"saved to {file}" in first.stderr
    second = engine("chat", *words, "--resume", file, text="and you?\n")
    assert second.returncode == 0, second.stderr
    expected, found = json.loads(whole.stdout.splitlines()[1]), json.loads(second.stdout)
    for key in ("text", "token_ids"):
        assert found[key] == expected[key]
    assert found["figures"]["forwarded_tokens"] == expected["figures"]["forwarded_tokens"]
    assert found["receipts"][-1] == expected["receipts"][-1]


def test_a_file_holds_no_pickle_and_says_what_it_is(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    chat = saved(session, file)
    about = cache_file.read_about(file)
    assert about["recipe digest"] == session.recipe.digest
    assert about["messages"] == chat.messages
    assert set(about["versions"]) == {"recipe-engine", "transformers", "torch"}
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    assert header["cache.layers.0.keys"]["shape"][2] == len(about["token ids"]) - 1
    assert list(tmp_path.iterdir()) == [file]


def test_reading_about_it_needs_no_torch(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS), file)
    code = (
        "import sys; from pathlib import Path; from engine import conversation; "
        "from engine.caching import cache_file; "
        "cache_file.read_about(Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cache=static"], r"cache \(there .*Dynamic, here .*Static\)"),
        (["model.dtype=bfloat16"], r"number format \(there float32, here bfloat16\)"),
        (["heads=grouped", "heads.num_key_value_heads=1"], r"heads \(there[\s\S]*the model's"),
        (["position_encoding=yarn"], "position_encoding"),
    ],
)
def test_a_cache_of_another_make_is_refused(
    build: Build, tmp_path: Path, words: list[str], told: str
) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS), file)
    with pytest.raises(RecipeError, match=told) as refusal:
        build(*WORDS, *words).chat(resume=file)
    assert refusal.value.problems[0].code == "conversation-differs"


def test_other_weights_of_the_same_shape_are_refused(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS), file)
    other = build(*WORDS)
    model: Any = other.model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.001)
    with pytest.raises(RecipeError, match="the model's weights"):
        other.chat(resume=file)


def test_what_computes_it_and_where_it_lies_may_differ(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS), file)
    other = build("decode.max_new_tokens=3", "seed=7", "task.chat_template=true")
    say(other.chat(resume=file), "go on")


@pytest.mark.parametrize("where", ["-8", "0", "10", "half"])
def test_a_damaged_file_is_refused(build: Build, tmp_path: Path, where: str) -> None:
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    saved(session, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if where == "half" else int(where)] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        session.chat(resume=file)


@pytest.mark.parametrize("left", [0, 5, 500, -1])
def test_a_file_that_was_cut_short_is_refused(build: Build, tmp_path: Path, left: int) -> None:
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    saved(session, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError):
        session.chat(resume=file)
    with pytest.raises(CheckpointError):
        cache_file.read_about(file)


def test_another_safetensors_file_is_refused(build: Build, model: ModelFolder) -> None:
    with pytest.raises(CheckpointError, match="holds no conversation"):
        build().chat(resume=model("llama") / "model.safetensors")


def test_values_that_are_not_finite_are_not_saved_and_not_read(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    chat = session.chat()
    say(chat, "hello")
    chat._values.cache.layers[1].values[0, 0, 0, 0] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeFailure, match=r"NaN or infinite: cache.layers.1.values"):
        chat.save(file)
    assert not file.exists()
    monkeypatch.setattr(cache_file, "_not_finite", lambda tensors: "")
    chat.save(file)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"NaN or infinite: cache.layers.1.values"):
        session.chat(resume=file)


class Knowing(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that holds what no file can."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.lock = iter(())
        return super().update(*args, **kwargs)


def test_a_cache_that_no_file_can_hold_is_told(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Cache

    session = build(*WORDS)
    monkeypatch.setattr(
        session, "new_cache", lambda *_: KeyValues(cache=Cache(layer_class_to_replicate=Knowing))
    )
    chat = session.chat()
    say(chat, "hello")
    with pytest.raises(RuntimeFailure, match=r"cache.layers.0.lock is a tuple_iterator"):
        chat.save(tmp_path / "talk.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_replicated_layer_is_made_again(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Cache

    session = build(*WORDS)
    monkeypatch.setattr(
        session,
        "new_cache",
        lambda *_: KeyValues(cache=Cache(layer_class_to_replicate=DynamicLayer)),
    )
    chat = saved(session, tmp_path / "talk.safetensors")
    again = session.chat(resume=tmp_path / "talk.safetensors")
    assert say(again, "go on") == say(chat, "go on")


def test_a_file_cannot_replace_what_a_cache_does(build: Build, tmp_path: Path) -> None:
    """A file may name any attribute; none that is code is set, whatever its checksum says."""
    session = build(*WORDS)
    chat = session.chat()
    say(chat, "hello")
    chat._values.cache.layers[0].update = 5  # type: ignore[attr-defined]
    with pytest.raises(RuntimeFailure, match=r"update is no value"):
        chat.save(tmp_path / "talk.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("messages", "hello"),
        ("messages", [{"content": "hello"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("token ids", "abc"),
        ("token ids", [-1]),
        ("token ids", [10**9]),
        ("token ids", [1]),
        ("room", "much"),
        ("made with", {}),
    ],
)
def test_a_file_that_says_what_none_says_is_refused(
    build: Build, tmp_path: Path, key: str, value: Any
) -> None:
    """Whatever its checksum says: it may be another program's."""
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    saved(session, file)
    content = cache_file.read(file)
    chat = session.chat()
    say(chat, "hello")
    cache = chat._values.cache  # type: ignore[attr-defined]
    cache_file.write(file, {**content.about, key: value}, cache, None)
    with pytest.raises((CheckpointError, RecipeError)):
        session.chat(resume=file)


def test_a_link_stays_a_link(build: Build, tmp_path: Path) -> None:
    file, link = tmp_path / "talk.safetensors", tmp_path / "link"
    link.symlink_to(file)
    saved(build(*WORDS), link)
    assert link.is_symlink()
    assert file.is_file()


def test_a_conversation_that_breaks_off_is_saved(
    engine: Run, model: ModelFolder, tmp_path: Path
) -> None:
    file = tmp_path / "talk.safetensors"
    words = ["base", f"model.path={model('llama')}", *WORDS, "--save", str(file)]
    done = engine("chat", *words, text="hello\n" + 500 * "z" + "\n")
    assert done.returncode == 6, done.stderr
    assert [one["role"] for one in cache_file.read_about(file)["messages"]] == ["user", "assistant"]


def test_a_conversation_that_did_not_begin_can_be_saved(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    session.chat().save(file)
    assert say(session.chat(resume=file), "hello") == say(session.chat(), "hello")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--save", "/no/such/folder/talk"], 2, "there is no such folder"),
        (["--save", "."], 2, "that is a folder"),
        (["--resume", "nowhere"], 3, "is not there"),
        (["--save", "/dev/null"], 2, "that is no file"),
        (["--save", "x" * 254], 2, "it cannot be written"),
        (["--save", __file__], 2, "it holds no conversation"),
    ],
)
def test_files_are_refused_before_the_model_loads(
    engine: Run, words: list[str], code: int, says: str
) -> None:
    done = engine("chat", "base", "model.path=not/here", *words, text="hello\n")
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_a_resumed_recipe_is_compared_before_the_model_loads(
    engine: Run, build: Build, tmp_path: Path
) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS), file)
    words = ["base", "model.path=not/here", "cache=static", "--resume", str(file)]
    done = engine("chat", *words, text="hello\n")
    assert done.returncode == 2, done.stderr
    assert "cache (there" in done.stderr

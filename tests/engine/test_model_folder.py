"""A model's folder is found, or it is said why not; the hub is played by a local server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.loading import folder_kinds, model_folder
from engine.loading.checkpoint import fetch_weights, locate, read_config, tensors
from tests.hub import COMMIT, Hub, use_hub
from tests.models import tiny_model
from tests.refusal import refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", max_shard_size="100KB")


def test_a_folder_is_found_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(folder), None, download=False) == folder
    assert fetch_weights(str(folder), None) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model", None, download=False) == folder


@pytest.mark.parametrize("download", [False, True])
def test_a_path_that_is_not_there_names_its_neighbor(folder: Path, download: bool) -> None:
    message = refusal(locate, f"{folder.parent}/modle", None, download=download)
    assert f"{folder.parent}/modle is not there" in message
    assert f"did you mean model.path={folder}?" in message


def test_a_relative_path_tells_where_it_looked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    message = refusal(locate, "./modle", None, download=False)
    assert f"./modle is not there (looked for {folder.parent}/modle)" in message
    assert "did you mean model.path=./model?" in message


@pytest.mark.parametrize("name", ["nowhere", "mode-that-is-long", "old"])
def test_a_folder_that_is_only_a_little_alike_is_not_suggested(folder: Path, name: str) -> None:
    (folder.parent / "newuser").mkdir()
    assert "did you mean" not in refusal(locate, f"{folder.parent}/{name}", None, download=False)


@pytest.mark.parametrize("path", ["./gone", "~/gone", "gone\\model", "a/b/c", "../gone"])
def test_what_looks_like_a_path_never_reaches_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "fetch", lambda *_: pytest.fail("asked the hub"))
    assert "is not there" in refusal(locate, path, None, download=True)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    message = refusal(locate, str(folder / "config.json"), None, download=False)
    assert f"model.path={folder}" in message


def test_gguf_files_that_may_be_models_are_listed(folder: Path) -> None:
    for name in ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "a.gguf", "mmproj-a.gguf"):
        (folder / name).touch()
    assert folder_kinds.gguf_files(folder) == ["a.gguf", "b-00001-of-00002.gguf"]


@pytest.mark.parametrize("path", ["", "a b", "org--x/name", "name.git", "n" * 97])
@pytest.mark.parametrize("download", [False, True])
def test_what_can_be_neither_folder_nor_hub_id(path: str, download: bool) -> None:
    assert "nor can the hub have it" in refusal(locate, path, None, download=download)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "recipes"
    (root / "embedded" / "tiny").mkdir(parents=True)
    (root / "embedded" / "tiny" / "config.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setattr(model_folder, "_recipes_root", lambda: root)
    return root


def test_a_shipped_model(shipped: Path) -> None:
    expected = shipped / "embedded" / "tiny"
    assert locate("recipes://embedded/tiny", None, download=False) == expected
    assert fetch_weights("recipes://embedded/tiny", None) == expected


def test_a_shipped_model_with_a_typo(shipped: Path) -> None:
    message = refusal(locate, "recipes://embedded/tyni", None, download=False)
    assert "did you mean model.path=recipes://embedded/tiny?" in message


@pytest.mark.parametrize(
    "name", ["", "../outside", "embedded/../../outside", "embedded/../embedded", "/etc", "link"]
)
def test_shipped_models_stay_in_the_package(shipped: Path, name: str) -> None:
    assert "not inside of the package" in refusal(locate, f"recipes://{name}", None, download=False)


def test_shipped_models_of_a_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)
    message = refusal(locate, "recipes://tiny", None, download=False)
    assert "engine.recipes is not installed" in message


# --- the hub, played by a local server -----------------------------------------------------------


@pytest.fixture
def hub(hub: Hub, folder: Path) -> Hub:
    """Return a hub that has the model of the folder, and more."""
    hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.files |= {"pytorch_model.bin": b"pickle", "original/model.safetensors": b"twice"}
    hub.files |= {"modeling.py": b"code"}
    return hub


def test_small_files_first_then_the_weights(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate("org/model", None, download=False) is None
    assert hub.asked == []
    found = locate("org/model", None, download=True)
    assert found is not None
    assert read_config(found)["model_type"] == "llama"
    assert not [name for name in hub.asked if name.endswith((".safetensors", ".bin", ".py"))]
    assert locate("org/model", None, download=False) == found
    assert fetch_weights("org/model", None) == found
    assert tensors(found).keys() == tensors(folder).keys()
    assert not [name for name in hub.asked if name.endswith((".bin", ".py")) or "/" in name]
    # What was fetched once is found when the hub is gone.
    use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
    assert fetch_weights("org/model", None) == found


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickle_is_fetched_only_when_allowed(hub: Hub, allow_pickle: bool) -> None:
    for name in [name for name in hub.files if "safetensors" in name]:
        del hub.files[name]
    if allow_pickle:
        found = fetch_weights("org/model", None, allow_pickle=True)
        assert tensors(found, allow_pickle=True) == {}
    else:
        assert "load.allow_pickle=true" in refusal(fetch_weights, "org/model", None)
    assert ("pytorch_model.bin" in hub.asked) == allow_pickle


@pytest.mark.parametrize(
    ("path", "revision", "says"),
    [
        ("org/gated", None, "accept its terms"),
        ("org/half-open", None, "`hf auth login`"),
        ("org/forbidden", None, "does not let you read org/forbidden"),
        ("org/gone", None, "there is no folder 'org/gone' in "),
        ("org/model", "gone", "org/model has no revision gone"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, path: str, revision: str | None, says: str) -> None:
    assert says in refusal(locate, path, revision, download=True)


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_without_a_network_it_fails_at_once(
    revision: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
    began = time.perf_counter()
    message = refusal(locate, "org/model", revision, download=True)
    assert time.perf_counter() - began < 5
    assert "fetching it from the hub failed" in message
    assert "HF_HUB_OFFLINE" not in message
    assert "model.path=./folder" in message


def test_offline_by_wish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(locate, "org/model", None, download=True)
    assert "OfflineModeIsEnabled" in message
    assert "HF_HUB_OFFLINE" in message


def test_a_folder_without_its_dot_and_slash(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_hub(monkeypatch, tmp_path, "http://127.0.0.1:9")
    monkeypatch.chdir(folder.parent)
    message = refusal(locate, "modle", None, download=True)
    assert f"there is no folder 'modle' in {folder.parent}" in message
    assert "did you mean model.path=./model? else give a folder" in message

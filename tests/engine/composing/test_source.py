"""A recipe's text is data, and its lines are known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.composing import source
from engine.errors import RecipeError


def test_data_comes_with_the_line_of_each_key() -> None:
    content, lines = source.read_yaml("a: 1\nb:\n  c: [x, {d: 2}]\n", "f.yaml")
    assert content == {"a": 1, "b": {"c": ["x", {"d": 2}]}}
    assert lines[("a",)] == 1
    assert lines[("b",)] == 2
    assert lines[("b", "c")] == 3
    assert lines[("b", "c", "1", "d")] == 3


def test_values_are_those_of_omegaconf() -> None:
    content, _ = source.read_yaml("a: 1e-3\nb: 2020-01-01\nc: 012\nd: yes\ne: ~\nf: 1_000\n", "f")
    assert content == {"a": 0.001, "b": "2020-01-01", "c": 10, "d": True, "e": None, "f": 1000}


def test_aliases_repeat_data() -> None:
    assert source.read_yaml("a: &x [1, 2]\nb: *x\n", "f")[0] == {"a": [1, 2], "b": [1, 2]}


def test_everything_refused_is_named_with_its_line_and_the_rest_kept() -> None:
    text = (
        "a: !!python/name:os.system\nb: 1\nc: ${oc.env:HOME}\n_target_: x\nd: [1, !x 2, 3]\nb: 2\n"
    )
    document = source.parse(text, "f.yaml")
    assert [problem.where for problem in document.problems] == [
        "f.yaml:1", "f.yaml:3", "f.yaml:4", "f.yaml:5", "f.yaml:6",
    ]  # fmt: skip
    assert document.content == {"b": 1, "d": [1, None, 3]}
    with pytest.raises(RecipeError) as caught:
        source.read_yaml(text, "f.yaml")
    assert caught.value.problems == list(document.problems)


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("# @package _global_\na: 1\n", "_global_"),
        ("# what it is\n\n#  @package  decode\na: 1\n", "decode"),
        ("a: 1\n# @package decode\n", None),
        ("a: 1\n", None),
    ],
)
def test_the_header_is_read_from_the_comments_at_the_top(text: str, header: str | None) -> None:
    assert source.parse(text, "f").header == header


@pytest.mark.parametrize(
    "text", ["${seed}", "a ${model.path} b", "$", "{a: b}", "a:b", "\\${seed}"]
)
def test_plain_text_and_plain_references_are_data(text: str) -> None:
    assert source.refuse_text(text) is None


@pytest.mark.parametrize(
    "text", ["${a:b}", "x${${a}:b}", "${a${b:c}}", "${a", "${ a : b }", "\0", "\ud800", "${a}" * 17]
)
def test_resolvers_and_what_is_no_text_are_refused(text: str) -> None:
    refused = source.refuse_text(text)
    assert (refused is None) == (text == "${a")


@pytest.mark.parametrize("key", ["_target_", "_args_", "a._target_", "a/_partial_", " _convert_ "])
def test_keys_that_name_code_are_refused(key: str) -> None:
    assert source.refuse_key(key, top=False) is not None


def test_keys_of_hydra_are_refused_at_the_top_only() -> None:
    assert source.refuse_key("hydra.run.dir", top=True) is not None
    assert source.refuse_key("hydra/launcher", top=True) is not None
    assert source.refuse_key("hydra", top=False) is None
    assert source.refuse_key("hydrant", top=True) is None


def test_only_regular_files_are_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\n")
    (tmp_path / "b.yaml").mkdir()
    os.mkfifo(tmp_path / "c.yaml")
    (tmp_path / "d.yaml").symlink_to("/dev/zero")
    (tmp_path / "e.yaml").symlink_to("nowhere")
    (tmp_path / "f.yml").write_text("a: 1\n")
    assert source.yaml_files(tmp_path) == [tmp_path / "a.yaml"]
    assert source.yaml_files(tmp_path / "nowhere") == []
    assert not source.is_file(Path("a\0b"))
    assert not source.is_file(Path("x" * 5000))


def test_reading_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (problem,) = source.read_file(tmp_path / "pipe.yaml").problems
    assert "not a regular file" in problem.message


def test_what_is_shown_is_short_and_printable() -> None:
    assert source.show("a\x1b[31m\n\ud800") == "'a\\x1b[31m\\n\\ud800'"
    assert len(source.show("x" * 1000)) < 100

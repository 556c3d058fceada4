"""Recipes compose: every form of override, every place to look, every kind of file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from engine import recipe, registry
from engine.errors import EngineError, PluginError, RecipeError
from engine.hookspecs import SLOTS
from engine.recipe import Dtype, Recipe, compose

MODEL = "model: {path: x}\n"
Write = Callable[..., Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, with an empty folder of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


@pytest.fixture
def write(here: Path) -> Write:
    def written(name: str, text: str = MODEL) -> Path:
        file = here / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return written


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution that has one module and some entry points."""
    site = tmp_path / "site"

    def installed(code: str, points: str) -> None:
        info = site / "acme-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
        (site / "acme_plugin.py").write_text("from dataclasses import dataclass\n" + code)
        monkeypatch.syspath_prepend(str(site))
        registry.installed.cache_clear()

    yield installed
    monkeypatch.undo()
    sys.modules.pop("acme_plugin", None)
    registry.installed.cache_clear()


def value(composed: Recipe, path: str) -> Any:
    found: Any = composed
    for key in path.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    return found


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("seed=5", "seed", 5),
        ("seed='5'", "seed", 5),
        ("++seed=5", "seed", 5),
        ("model.path=a\\ b", "model.path", "a b"),
        ("model.path='a, b'", "model.path", "a, b"),
        ('model.path="it\'s"', "model.path", "it's"),
        ("model.path=a:b", "model.path", "a:b"),
        ("model.path=\\${seed}", "model.path", "${seed}"),
        ("model.path=str(5)", "model.path", "5"),
        ("model.path=${target.name}", "model.path", "auto"),
        ("model.revision=null", "model.revision", None),
        ("model.dtype=bfloat16", "model.dtype", Dtype.bfloat16),
        ("model.trust_remote_code=yes", "model.trust_remote_code", True),
        ("model={path: y, dtype: float16}", "model.path", "y"),
        ("decode.stop=[a,'b, c']", "decode.stop", ["a", "b, c"]),
        ("decode.stop=[]", "decode.stop", []),
        ("decode.temperature=1e-3", "decode.temperature", 0.001),
        ("decode.max_new_tokens=${seed}", "decode.max_new_tokens", 0),
        ("decode={top_k: 3, stop: [x]}", "decode.top_k", 3),
        ("++decode={top_k: 3}", "decode.top_k", 3),
        ("target.tflops.int8=5", "target.tflops.int8", 5.0),
        ("+target.tflops.int8=5", "target.tflops.int8", 5.0),
        ("++target.tflops={int8: 5}", "target.tflops.int8", 5.0),
        ("target=cpu", "target.kind", "cpu"),
        ("~observe", "observe", None),
        ("observe=null", "observe", None),
        ("attention=eager", "choices", None),
    ],
)
def test_every_form_of_override(override: str, path: str, expected: Any) -> None:
    composed = compose("tiny", [override])
    if path == "choices":
        assert composed.choices["attention"] == "eager"
        assert type(composed.attention).__name__ == "Eager"
    else:
        assert value(composed, path) == expected


def test_the_last_override_counts() -> None:
    words = ["seed=1", "cache=static", "seed=2", "cache=none"]
    composed = compose("tiny", words)
    assert (composed.seed, composed.choices["cache"]) == (2, "none")


def test_deleted_keys_of_mappings_are_gone() -> None:
    composed = compose("tiny", ["target=cpu", "+target.tflops={int8: 5, float32: 1}"])
    assert composed.target.tflops == {"int8": 5.0, "float32": 1.0}
    gone = compose("tiny", ["target=h100", "~target.tflops.int8"])
    assert "int8" not in gone.target.tflops
    assert "float16" in gone.target.tflops


def test_a_recipe_without_defaults_starts_from_base(write: Write) -> None:
    composed = compose(write("mine", MODEL + "seed: 3\n"))
    assert (composed.seed, composed.model.path) == (3, "x")
    assert composed.choices == compose("base", ["model.path=x"]).choices


@pytest.mark.parametrize(
    ("defaults", "seed"),
    [("[base]", 3), ("[base, _self_]", 3), ("[other]", 3),
     ("[_self_, other]", 9), ("[other, _self_]", 3)],
)  # fmt: skip
def test_the_order_of_the_defaults_list_counts(write: Write, defaults: str, seed: int) -> None:
    write("other", MODEL + "seed: 9\n")
    assert compose(write("mine", f"defaults: {defaults}\n{MODEL}seed: 3\n")).seed == seed


def test_choices_of_a_recipe_and_of_overrides(write: Write) -> None:
    text = "defaults:\n- base\n- override attention: eager\n- override cache: static\n" + MODEL
    composed = compose(write("mine", text + "cache: {max_tokens: 64}\n"), ["attention=sdpa"])
    assert composed.choices["attention"] == "sdpa"
    assert composed.choices["cache"] == "static"
    assert composed.cache.max_tokens == 64


def test_a_choice_may_follow_another(write: Write) -> None:
    write("quantize/none-too", "defaults: [none]\n")
    text = "defaults:\n- base\n- override quantize: ${attention}\n" + MODEL
    with pytest.raises(RecipeError, match="'native' is no choice for quantize"):
        compose(write("mine", text))


def test_an_optional_choice_may_be_missing(write: Write) -> None:
    base = (recipe.shipped_folder() / "base.yaml").read_text(encoding="utf-8")
    text = base.replace("- model: null", "- optional model: not-there") + MODEL
    assert compose(write("mine", text)).model.path == "x"


def test_presets_stack_on_plugins(write: Write) -> None:
    composed = compose("tiny", ["quantize=nf4", "quantize.double_quant=true"])
    assert composed.choices["quantize"] == "nf4"
    assert composed.quantize.bits == 4
    assert composed.quantize.double_quant is True
    write("quantize/mine", "defaults: [nf4]\ndouble_quant: true\n")
    deeper = compose(write("r"), ["quantize=mine"])
    assert deeper.choices["quantize"] == "mine"
    assert (deeper.quantize.bits, deeper.quantize.double_quant) == (4, True)


@pytest.mark.parametrize(
    ("header", "body", "path"),
    [
        ("", "path: y", "model.path"),
        ("# @package _group_\n", "path: y", "model.path"),
        ("# @package _global_\n", "seed: y", "seed"),
        ("# @package decode\n", "top_k: y", "decode.top_k"),
    ],
)
def test_headers_say_where_a_preset_belongs(
    write: Write, header: str, body: str, path: str
) -> None:
    write("model/other", header + body.replace("y", "7") + "\n")
    text = "defaults:\n- base\n- override model: other\n" + MODEL.replace("path: x", "revision: r")
    composed = compose(write("mine", text), [] if path == "model.path" else ["model.path=x"])
    assert str(value(composed, path)) == "7"
    file = write("model/other", header + body.replace(": y", ": [y]") + "\n")
    with pytest.raises(RecipeError) as caught:
        compose(write("mine", text), [] if path == "model.path" else ["model.path=x"])
    assert caught.value.problems[0].where == f"{file}:{2 if header else 1}"


def test_the_search_order(write: Write, here: Path) -> None:
    def found() -> str:
        return str(compose("tiny", ["model.path=x"]).file)

    assert Path(found()) == recipe.shipped_folder() / "tiny.yaml"
    user = write("config/engine/recipes/tiny")
    assert Path(found()) == user
    local = write("recipes/tiny")
    assert Path(found()) == local
    mine = write("elsewhere/tiny")
    assert compose(mine).file == str(mine)
    assert compose("elsewhere/tiny").file == str(mine)
    assert compose("./elsewhere/tiny.yaml").file == str(mine)
    assert recipe.recipe_names()["tiny"] == local
    assert recipe.search_folders()[:2] == (local.parent, user.parent)


def test_a_recipe_by_path_brings_its_siblings(write: Write) -> None:
    write("far/quantize/mine", "defaults: [bitsandbytes]\nbits: 8\n")
    write("far/parent", MODEL + "seed: 4\n")
    file = write("far/child", "defaults:\n- parent\n- override quantize: mine\n")
    composed = compose(file)
    assert (composed.seed, composed.quantize.bits) == (4, 8)
    with pytest.raises(RecipeError, match="'mine' is no choice"):
        compose("tiny", ["quantize=mine"])


def test_a_folder_beside_a_recipe_is_no_group(write: Write) -> None:
    write("seed/5")
    assert compose(write("mine"), ["seed=5"]).seed == 5


def test_links_within_the_folder_are_followed(write: Write, here: Path) -> None:
    real = write("recipes/real", MODEL + "seed: 8\n")
    (here / "recipes" / "link.yaml").symlink_to(real)
    assert compose("link").seed == 8


def test_equal_recipes_have_equal_digests(write: Write) -> None:
    tiny = compose("tiny")
    assert tiny.digest == compose("tiny", ["seed=0", "++decode.top_k=null"]).digest
    assert tiny.digest != compose("tiny", ["seed=1"]).digest
    assert tiny.digest != compose("tiny", ["cache=static"]).digest
    assert len(tiny.digest) == 12


def test_the_text_holds_everything_resolved(write: Write) -> None:
    composed = compose("tiny", ["decode.max_new_tokens=${seed}", "seed=7", "model.dtype=float16"])
    shown = yaml.safe_load(composed.text)
    assert shown["decode"]["max_new_tokens"] == 7
    assert shown["model"] == {
        "path": "recipes://embedded", "revision": None, "dtype": "float16",
        "trust_remote_code": False, "config": {}, "note": "", "source": "",
        "checked": "",
    }  # fmt: skip
    assert "hydra" not in shown
    assert "defaults" not in shown


def test_slots_are_the_filled_ones() -> None:
    assert "observe" not in recipe.slots(compose("tiny"))
    filled = recipe.slots(compose("tiny", ["observe=trace"]))
    assert set(filled) == set(SLOTS)
    assert type(filled["observe"]).__name__ == "Trace"


def test_recipes_of_other_packages_are_found(
    install: Callable[..., None], here: Path, tmp_path: Path
) -> None:
    install("", "[engine.recipes]\nacme = acme_folder.recipes\n")
    folder = tmp_path / "site" / "acme_folder" / "recipes"
    (folder / "target").mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "acme.yaml").write_text("defaults: [base, {override target: toaster}]\n" + MODEL)
    (folder / "target" / "toaster.yaml").write_text("name: toaster\nkind: cpu\n")
    assert compose("acme").target.name == "toaster"
    assert recipe.recipe_names()["acme"] == folder / "acme.yaml"
    assert "acme_folder" not in sys.modules


PLUGIN = """
@dataclass
class Picky:
    size: int
    names: dict[str, int] | None = None

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("size must be above 0")
        if self.size == 13:
            raise KeyError("unlucky")
"""


def test_options_of_other_plugins(install: Callable[..., None]) -> None:
    install(PLUGIN, "[engine.attention]\npicky = acme_plugin:Picky\n")
    good = compose("tiny", ["attention=picky", "attention.size=5"])
    assert good.attention.size == 5
    with pytest.raises(RecipeError) as caught:
        compose("tiny", ["attention=picky"])
    (problem,) = caught.value.problems
    assert (problem.code, problem.slot) == ("value-missing", "attention")
    assert problem.hint == "attention.size=…"


def test_a_value_error_of_a_plugin_is_a_problem_of_its_slot(install: Callable[..., None]) -> None:
    install(PLUGIN, "[engine.attention]\npicky = acme_plugin:Picky\n")
    with pytest.raises(RecipeError) as caught:
        compose("tiny", ["attention=picky", "attention.size=0"])
    (problem,) = caught.value.problems
    assert problem.slot == "attention"
    assert "size must be above 0" in problem.message
    with pytest.raises(PluginError, match="unlucky"):
        compose("tiny", ["attention=picky", "attention.size=13"])


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise RuntimeError('boom')", "boom"),
        ("def Picky(): ...", "not a dataclass"),
        ("import torch_that_is_not_there", "torch_that_is_not_there"),
        ("class Odd: ...\n@dataclass\nclass Picky:\n    odd: Odd = None", "cannot hold"),
    ],
)
def test_a_broken_plugin_hurts_only_who_chooses_it(
    install: Callable[..., None], code: str, says: str
) -> None:
    install(code, "[engine.attention]\npicky = acme_plugin:Picky\n")
    assert compose("tiny").choices["attention"] == "native"
    with pytest.raises(PluginError, match=says):
        compose("tiny", ["attention=picky"])
    # The recipe's own mistakes come first, but the plugin's is told too.
    with pytest.raises(RecipeError) as caught:
        compose("tiny", ["attention=picky", "seed=abc", "attention.size=3"])
    assert len(caught.value.problems) == 2


def test_who_has_an_option_is_told_in_spite_of_broken_plugins(
    install: Callable[..., None],
) -> None:
    points = "[engine.attention]\nbroken = acme_plugin:Nothing\npicky = acme_plugin:Picky\n"
    install(PLUGIN, points)
    with pytest.raises(RecipeError) as caught:
        compose("tiny", ["attention.size=5", "heads.size=5"])
    first, second = caught.value.problems
    assert first.hint.startswith("attention=picky has it (as has attention=window): ")
    assert "attention=picky attention.size=5; " in first.hint
    assert "has it" not in second.hint


def test_a_preset_may_not_take_a_plugins_name(write: Write) -> None:
    write("attention/eager", "defaults: [native]\n")
    with pytest.raises(RecipeError) as caught:
        compose(write("mine"), ["attention=eager"])
    assert caught.value.problems[0].code == "shadowed-plugin"


def test_threads_do_not_disturb_each_other(write: Write) -> None:
    for index in range(8):
        write(f"folder{index}/mine", f"{MODEL}seed: {index}\n")

    def one(index: int) -> tuple[int, str, int]:
        composed = compose(f"folder{index % 8}/mine.yaml", [f"decode.max_new_tokens={index}"])
        with pytest.raises(EngineError) as caught:
            compose(f"folder{index % 8}/mine.yaml", [f"sed{index}=1", "cache=x"])
        return composed.seed, caught.value.problems[0].where, composed.decode.max_new_tokens

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(48)))
    for index, (seed, where, tokens) in enumerate(found):
        assert (seed, tokens) == (index % 8, index)
        assert where in (f"sed{index}=1", "cache=x")


def test_a_process_that_uses_hydra_is_left_alone(here: Path) -> None:
    (here / "conf").mkdir()
    (here / "conf" / "theirs.yaml").write_text("theirs: 1\n")
    ConfigStore.instance().store(name="tiny", node={"seed": 99})
    ConfigStore.instance().store(group="cache", name="dynamic", node={"theirs": 1})
    try:
        with initialize_config_dir(str(here / "conf"), version_base="1.3"):
            before = GlobalHydra.instance().hydra
            assert compose("tiny").seed == 0
            assert GlobalHydra.instance().hydra is before
            assert hydra_compose("theirs").theirs == 1
        assert not GlobalHydra.instance().is_initialized()
        assert compose("tiny").seed == 0
    finally:
        ConfigStore.instance().repo.pop("tiny.yaml")
        ConfigStore.instance().repo.pop("cache")


def test_composing_loads_no_heavy_library() -> None:
    code = (
        "import sys, engine; engine.compose('tiny', ['quantize=nf4', 'cache=static'])\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- text stays text ------------------------------------------------------------------------------

LOOKS_LIKE = [
    "no",
    "on",
    "Yes",
    "true",
    "1.0",
    "1.10",
    "007",
    "1e3",
    "0x10",
    "1_000",
    "-1.50",
    "12:30",
]
"""What YAML or Hydra takes for another type."""


@pytest.mark.parametrize("word", LOOKS_LIKE)
def test_text_is_what_was_written(tmp_path: Path, word: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"defaults:\n  - tiny\n  - _self_\nmodel:\n  revision: {word}\n"
        f"decode:\n  stop: [{word}, 'a', {word}]\ntask:\n  prefix: {word}\n"
    )
    for made in (
        compose(file),
        compose("tiny", [f"task.prefix={word}", f"decode.stop=[{word},'a',{word}]",
                         f"model.revision={word}"]),
    ):  # fmt: skip
        plugins: Any = made
        assert (plugins.task.prefix, plugins.decode.stop) == (word, [word, "a", word])
        assert made.model.revision == word
        assert made.seed == 0


@pytest.mark.parametrize("text", ["Answer in French. ", " lead", "a b  ", "Q: ", "say $x "])
def test_text_of_the_command_line_stays_as_it_was_typed(text: str) -> None:
    made: Any = compose("tiny", [f"task.prefix={text}"])
    assert made.task.prefix == text
    made = compose("tiny", [f"task.prefix='{text}'", "decode.stop=[' a ',no,b]"])
    assert (made.task.prefix, made.decode.stop) == (text, [" a ", "no", "b"])


def test_the_last_word_counts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - tiny\n  - _self_\ndecode:\n  stop: [no, 1.0, on]\n")
    found: Any = compose(file, ["decode.stop=[a,2.50]"])
    assert found.decode.stop == ["a", "2.50"]
    found = compose(
        file, ["decode.stop=[False]", "decode.stop=[x]", "task.prefix=1.0", "task.prefix=y"]
    )
    assert (found.decode.stop, found.task.prefix) == (["x"], "y")


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults:\n  - tiny\n  - _self_\nseed: 007\ndecode:\n  temperature: 1e-1\n")
    found: Any = compose(file, ["decode.max_new_tokens=10"])
    assert (found.seed, found.decode.temperature, found.decode.max_new_tokens) == (7, 0.1, 10)


@pytest.mark.parametrize("value", ["[[a]]", "[null]", "[a,[1.0]]", "{a: 1}", "1.0"])
def test_what_is_no_list_of_texts_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults:\n  - tiny\n  - _self_\ndecode:\n  stop: {value}\n")
    with pytest.raises(RecipeError, match=r"decode\.stop[\s\S]* \[.*mine\.yaml:5\]"):
        compose(file)
    with pytest.raises(RecipeError, match=r"decode\.stop"):
        compose("tiny", [f"decode.stop={value}"])

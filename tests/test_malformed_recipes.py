"""What is wrong with a recipe is said, whatever it is; what is hostile in it does not happen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.errors import EngineError, Problem, RecipeError
from engine.recipe import recipe_names, shipped_folder

MODEL = "model: {path: x}\n"
BASE = "defaults:\n- base\n"
SECRET = "canary-4711"


@dataclass(frozen=True)
class Case:
    """One mistake: where it stands, and what has to be said about it."""

    name: str
    text: str | None = None
    """The recipe; `tiny` if there is none."""
    overrides: tuple[str, ...] = ()
    code: str = ""
    says: str = ""
    hint: str = ""
    line: int | None = None


def yaml(
    name: str, text: str, code: str, says: str, hint: str = "", *, line: int | None = None
) -> Case:
    return Case(name, text, (), code, says, hint, line)


def typed(name: str, override: str, code: str, says: str, hint: str = "") -> Case:
    return Case(name, None, (override,), code, says, hint)


MALFORMED = [
    # Text that is no recipe.
    yaml("empty", "", "model-missing", "the recipe is empty: no model is named", "model.path="),
    yaml("only a comment", "# nothing\n", "model-missing", "no model is named", "model.path="),
    yaml("a list", "- a\n", "recipe", "a recipe is a mapping", "defaults:\n  - base", line=1),
    yaml("a word", "tiny\n", "recipe", "a recipe is a mapping", "path: ./my-model", line=1),
    yaml("two colons", "seed: 1: 2\n", "yaml", "not valid YAML", "quote", line=1),
    yaml("unclosed bracket", "seed: [1\n", "yaml", "not valid YAML", "quote"),
    yaml("unclosed quote", MODEL + "seed: 'a\n", "yaml", "not valid YAML", "quote"),
    yaml("tab", "model:\n\tpath: x\n", "yaml", "'\\t'", "spaces", line=2),
    yaml("two documents", "seed: 1\n---\nseed: 2\n", "yaml", "another document", line=2),
    yaml("undefined alias", "seed: *a\n", "yaml", "undefined alias", line=1),
    yaml("YAML of the future", "%YAML 3.0\n---\nseed: 1\n", "yaml", "incompatible", line=1),
    yaml("key twice", MODEL + "seed: 1\nseed: 2\n", "recipe", "in line 2", "keep one", line=3),
    yaml("key on", MODEL + "on: 1\n", "recipe", "'on' is read as bool", "quote", line=2),
    yaml("key null", MODEL + "~: 1\n", "recipe", "'~' is read as null", "quote", line=2),
    yaml("key list", MODEL + "? [a]\n: 1\n", "recipe", "list or mapping is read", line=2),
    yaml("key 5", MODEL + "5: 1\n", "unknown-key", "no key '5'", "there are:", line=2),
    yaml("merged keys", "model:\n  <<: {path: x}\n", "recipe", "'<<'", "write the keys", line=2),
    # Keys that do not exist.
    yaml(
        "misspelt slot", MODEL + "atention: {}\n", "unknown-key", "'atention'", "attention?", line=2
    ),
    yaml(
        "misspelt option",
        MODEL + "decode:\n  top_q: 1\n",
        "unknown-key",
        "decode=generate has no option 'top_q'",
        "did you mean decode.top_",
        line=3,
    ),
    yaml(
        "misspelt model key",
        "model:\n  pth: x\n",
        "unknown-key",
        "model has no option 'pth'",
        "did you mean model.path?",
        line=2,
    ),
    yaml("dots", "model.path: x\n", "unknown-key", "'model.path'", "nesting: model: {path", line=1),
    yaml(
        "option of no option",
        MODEL + "attention: {size: 5}\n",
        "unknown-key",
        "attention=native has no option 'size'",
        "no options at all",
        line=2,
    ),
    yaml(
        "misspelt target key",
        MODEL + "target: {knd: cpu}\n",
        "unknown-key",
        "'knd'",
        "did you mean target.kind?",
        line=2,
    ),
    # Values of the wrong type.
    yaml(
        "text for int",
        MODEL + "seed: abc\n",
        "value",
        "seed is 'abc', where int is due",
        "seed=0",
        line=2,
    ),
    yaml("float for int", MODEL + "seed: 1.5\n", "value", "'1.5', where int", "seed=0", line=2),
    yaml("list for text", "model:\n  path: [x]\n", "value", "where str is due", line=2),
    yaml("mapping for text", "model:\n  path: {a: b}\n", "value", "where str is due", line=2),
    yaml(
        "text for list",
        MODEL + "decode:\n  stop: x\n",
        "value",
        "decode.stop is 'x', where List[str] is due",
        "decode.stop=[a,b]",
        line=3,
    ),
    yaml("text for float", MODEL + "decode:\n  temperature: hot\n", "value", "where float", line=3),
    yaml(
        "text for bool",
        "model:\n  path: x\n  trust_remote_code: maybe\n",
        "value",
        "'maybe', where bool is due",
        "trust_remote_code=false",
        line=3,
    ),
    yaml(
        "no such member",
        "model:\n  path: x\n  dtype: fp16\n",
        "value",
        "'fp16', which is none of auto, float32, bfloat16, float16",
        "did you mean model.dtype=float16?",
        line=3,
    ),
    yaml("null for int", MODEL + "seed: null\n", "value", "seed is 'null'", "seed=0", line=2),
    yaml(
        "text for mapping",
        "model: x\n",
        "choice-as-value",
        "'x' is a value where a choice is due",
        "model.path=x",
        line=1,
    ),
    yaml("date", MODEL + "seed: 2020-01-01\n", "value", "'2020-01-01', where int", line=2),
    yaml("infinity", MODEL + "seed: 1e400\n", "value", "'inf', where int", line=2),
    yaml("text tagged int", MODEL + "seed: !!int abc\n", "recipe", "'abc' is no int", line=2),
    yaml("base 60", MODEL + "seed: =\n", "recipe", "'!!value'", line=2),
    # Choices.
    yaml(
        "misspelt choice",
        BASE + "- override attention: eagr\n" + MODEL,
        "unknown-choice",
        "'eagr' is no choice for attention",
        "did you mean attention=eager?",
        line=3,
    ),
    yaml(
        "choice as value",
        MODEL + "attention: eager\n",
        "choice-as-value",
        "'eager' is a value",
        "'- override attention: eager'",
        line=2,
    ),
    yaml(
        "misspelt choice as value",
        MODEL + "cache: statc\n",
        "choice-as-value",
        "'statc'",
        "override cache: static",
        line=2,
    ),
    yaml(
        "target as value",
        MODEL + "target: h100\n",
        "choice-as-value",
        "'h100'",
        "override target: h100",
        line=2,
    ),
    yaml("null as choice", MODEL + "cache: null\n", "choice-as-value", "'null'", "cache=", line=2),
    yaml(
        "no override",
        BASE + "- attention: eager\n" + MODEL,
        "defaults",
        "Multiple values",
        "- override attention: eager",
        line=3,
    ),
    yaml(
        "misspelt slot in defaults",
        BASE + "- override atention: eager\n" + MODEL,
        "defaults",
        "'atention' is no slot",
        "did you mean attention?",
        line=3,
    ),
    yaml(
        "override first",
        "defaults:\n- override cache: static\n- base\n" + MODEL,
        "defaults",
        "is defined before",
        "base comes first",
        line=2,
    ),
    yaml(
        "two choices",
        BASE + "- override cache: [static, none]\n" + MODEL,
        "defaults",
        "a choice is a word",
        line=3,
    ),
    yaml("number as choice", BASE + "- override cache: 5\n" + MODEL, "defaults", "a word", line=3),
    yaml(
        "empty choice",
        BASE + "- override cache: null\n" + MODEL,
        "no-choice",
        "no choice for cache",
        "dynamic, fp8",
    ),
    yaml(
        "choice elsewhere",
        BASE + "- override cache@x: static\n" + MODEL,
        "defaults",
        "places a choice elsewhere",
        line=3,
    ),
    yaml(
        "no such recipe",
        "defaults:\n- bse\n" + MODEL,
        "recipe-not-found",
        "called 'bse'",
        "did you mean base?",
        line=2,
    ),
    yaml(
        "base twice",
        BASE + "- base\n" + MODEL,
        "defaults",
        "more than once",
        "a recipe once",
        line=3,
    ),
    yaml(
        "itself",
        "defaults:\n- bad\n" + MODEL,
        "defaults",
        "in a circle",
        "name a recipe once",
        line=2,
    ),
    yaml(
        "no base", "defaults: []\n" + MODEL, "no-choice", "no choice for load, quantize", "- base"
    ),
    yaml(
        "defaults is a word", "defaults: base\n" + MODEL, "defaults", "is a list", "- base", line=1
    ),
    yaml("odd entry", "defaults:\n- base\n- [a]\n" + MODEL, "defaults", "is no entry", line=3),
    yaml(
        "entry of two",
        "defaults:\n- base\n- {a: b, c: d}\n" + MODEL,
        "defaults",
        "no entry",
        line=3,
    ),
    yaml(
        "header",
        "# @package decode\n" + MODEL,
        "header",
        "'decode' is no place",
        "leave it out",
        line=1,
    ),
    # References.
    yaml(
        "reference to nothing",
        "model:\n  path: ${nope}\n",
        "value",
        "'nope' not found",
        "another key",
        line=2,
    ),
    yaml("reference to itself", MODEL + "seed: ${seed}\n", "value", "ecursive", line=2),
    yaml("reference to text", MODEL + "seed: ${model.path}\n", "value", "seed:", line=2),
    yaml("unclosed reference", "model:\n  path: ${seed\n", "recipe", "is no reference", line=2),
    yaml(
        "reference to a mapping", MODEL + "target: ${model}\n", "choice-as-value", "choice", line=2
    ),
    yaml(
        "reference for a list", MODEL + "target: {tflops: '${model}'}\n", "value", "for one value"
    ),
    typed("reference to a mapping, typed", "workload=${target}", "value", "for one value"),
    typed("reference to another choice", "attention=${cache}", "unknown-choice", "'dynamic'"),
    # Overrides.
    typed("no value", "seed", "override", "not of the form key=value", "key=value"),
    typed("prompt's file", "p.txt", "override", "not of the form key=value", "-p @FILE"),
    typed("second recipe", "small", "override", "not of the form key=value", "takes one recipe"),
    typed("prompt with =", "def f(a=1):", "override", "not of the form key=value", "-p TEXT"),
    typed("home", "model.path=~/x", "override", "to be quoted", "'model.path=\"~/x\"'"),
    typed("semicolon", "decode.stop=a;b", "override", "to be quoted", "'decode.stop=\"a;b\"'"),
    typed("no key", "=5", "override", "no key", "key=value"),
    typed("spaces", "a b=c", "override", "not of the form", "quoted"),
    typed("unclosed list", "decode.stop=[a", "override", "not of the form", "quoted"),
    typed("index", "decode.stop[0]=a", "override", "not of the form"),
    typed("item of a list", "decode.stop.0=a", "value", "List[str]", "decode.stop=[a,b]"),
    typed("key below a value", "model.path.x=a", "value", "model.path is 'x: a'", "model.path="),
    typed("two values", "seed=1,2", "override", "names several values", "quote it"),
    typed("range", "seed=range(1,5)", "override", "names several values"),
    typed("misspelt key", "sed=1", "unknown-key", "no key 'sed'", "did you mean seed?"),
    typed("added key", "+sed=1", "unknown-key", "no key 'sed'", "did you mean seed?"),
    typed("forced key", "++decode.top_q=1", "unknown-key", "'top_q'", "did you mean decode.top_"),
    typed(
        "option of another",
        "quantize.bits=8",
        "unknown-key",
        "quantize=none has no option",
        "quantize=bitsandbytes has it (as has quantize=quanto): quantize=bitsandbytes quant",
    ),
    typed(
        "max_tokens of another",
        "cache.max_tokens=5",
        "unknown-key",
        "cache=dynamic has no option",
        "cache=static has it: cache=static cache.max_tokens=5;",
    ),
    typed("misspelt override", "attention=eagr", "unknown-choice", "'eagr'", "attention=eager?"),
    typed("number for a slot", "cache=5", "unknown-choice", "'5' is no choice", "dynamic"),
    typed("null for a slot", "cache=null", "unknown-choice", "'null' is no choice", "dynamic"),
    typed("list for a slot", "cache=[static]", "override", "takes one choice", "cache=static"),
    typed("added choice", "+cache=static", "defaults", "Multiple values", "cache=static"),
    typed("forced choice", "++cache=static", "override", "by force", "cache=static"),
    typed("deleted slot", "~cache", "no-choice", "no choice for cache", "dynamic"),
    typed("deleted other choice", "~cache=static", "defaults", "Could not delete", "list cache"),
    typed("deleted key", "~seed", "value", "seed can be changed, not left out", "seed="),
    typed("deleted nothing", "~sed", "unknown-key", "no key 'sed'", "did you mean seed?"),
    typed("added again", "+seed=5", "value", "seed is there already", "seed=5"),
    typed("text typed for int", "seed=abc", "value", "'abc', where int is due", "seed=0"),
    typed("bool typed for int", "seed=true", "value", "'true', where int is due", "seed=0"),
    typed("null typed for int", "seed=null", "value", "'null', where int is due", "seed=0"),
    typed("infinity typed", "seed=1e400", "value", "'inf', where int is due"),
    typed("empty path", "model.path=", "model-missing", "no model is named", "model.path="),
    typed(
        "member typed", "model.dtype=bf16", "value", "none of auto", "mean model.dtype=bfloat16?"
    ),
    typed("model as a word", "model=x", "unknown-choice", "no choice for model", "model.path=x"),
    typed("prompt as key", "prompt=hello", "override", "no key of a recipe", "-p TEXT"),
    typed("slashes", "decode/top_k=5", "override", "dots, not slashes", "decode.top_k="),
    typed("defaults typed", "defaults=[base]", "override", "defaults list", "attention=sdpa"),
    typed("package typed", "cache@x=static", "override", "elsewhere", "cache="),
]

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
ENVIRONMENT = "${oc.env:RECIPE_CANARY}"

HOSTILE = [
    yaml("_target_", "model:\n  path: x\n  _target_: os.system\n", "recipe", "names code", line=3),
    yaml("_partial_", MODEL + "load:\n  _partial_: true\n", "recipe", "names code", line=3),
    yaml("_args_ in a list", MODEL + "decode:\n  stop: [{_args_: [id]}]\n", "recipe", "names code"),
    yaml("dotted _target_", MODEL + "model._target_: os.system\n", "recipe", "names code", line=2),
    yaml("environment", f"model:\n  path: {ENVIRONMENT}\n", "recipe", "calls a resolver", line=2),
    yaml("environment in a key", f"{ENVIRONMENT}: 1\n" + MODEL, "recipe", "calls a resolver"),
    yaml("environment in defaults", f"defaults:\n- {ENVIRONMENT}\n", "recipe", "calls a resolver"),
    yaml(
        "environment as a choice", BASE + f"- override cache: {ENVIRONMENT}\n", "recipe", "resolver"
    ),
    yaml("nested resolver", "model:\n  path: ${${seed}:x}\n", "recipe", "calls a resolver", line=2),
    yaml("spaced resolver", 'model:\n  path: "${ oc.env : HOME }"\n', "recipe", "resolver", line=2),
    yaml("decode resolver", "model:\n  path: ${oc.decode:'1'}\n", "recipe", "resolver", line=2),
    yaml("create resolver", "model: ${oc.create:{path:x}}\n", "recipe", "resolver", line=1),
    yaml("hydra resolver", "model:\n  path: ${hydra:runtime.cwd}\n", "recipe", "resolver", line=2),
    yaml(
        "python call",
        "seed: !!python/object/apply:os.system [id]\n" + MODEL,
        "recipe",
        "asks for more than data",
        line=1,
    ),
    yaml(
        "python name", "seed: !!python/name:os.system\n" + MODEL, "recipe", "more than data", line=1
    ),
    yaml(
        "python path",
        "model:\n  path: !!python/object/apply:pathlib.Path [/etc]\n",
        "recipe",
        "more than data",
        line=2,
    ),
    yaml("python path as key", "? !!python/object/apply:pathlib.Path [/etc]\n: 1\n", "recipe", ""),
    yaml("include", "seed: !include canary.txt\n" + MODEL, "recipe", "'!include'", line=1),
    yaml("binary", "seed: !!binary aGk=\n" + MODEL, "recipe", "'!!binary'", line=1),
    yaml(
        "search path", "hydra: {searchpath: [file:///etc]}\n" + MODEL, "recipe", "of Hydra", line=1
    ),
    yaml("run folder", "hydra: {run: {dir: canary.txt}}\n" + MODEL, "recipe", "of Hydra", line=1),
    yaml("hydra package", "# @package hydra.job\nname: x\n", "header", "hydra.job", line=1),
    yaml(
        "hydra launcher", BASE + "- override hydra/launcher: basic\n" + MODEL, "defaults", "no slot"
    ),
    yaml("parent folder", "defaults:\n- ../canary\n", "defaults", "leaves the folders", line=2),
    yaml("parent as choice", BASE + "- override cache: ../canary\n", "defaults", "leaves", line=3),
    yaml("whole path", "defaults:\n- /etc/passwd\n", "defaults", "'etc' is no slot", line=2),
    yaml("backslashes", "defaults:\n- ..\\canary\n", "defaults", "leaves the folders", line=2),
    yaml("file URL", "defaults:\n- file:///etc/passwd\n", "defaults", "leaves the folders", line=2),
    yaml(
        "package URL", "defaults:\n- pkg://hydra.conf\n", "defaults", "leaves the folders", line=2
    ),
    yaml("NUL", 'defaults:\n- "base\\0"\n', "recipe", "not text", line=2),
    yaml("half a character", 'model:\n  path: "\\ud800"\n', "recipe", "not text", line=2),
    yaml("aliases that explode", BOMB, "too-large", "more than 10,000 values"),
    yaml("alias of itself", "a: &a [*a]\n", "too-large", "nested more than", line=1),
    yaml("deep", "seed: " + "[" * 200 + "]" * 200, "too-large", "nested more than", line=1),
    yaml("very deep", "[" * 5000, "too-large", "nested more than"),
    yaml("large", "seed: " + "x" * 200_000, "too-large", "larger than"),
    yaml("large integer", "seed: " + "9" * 10_000 + "\n" + MODEL, "recipe", "is no int", line=1),
    yaml("many entries", "defaults:\n" + "- base\n" * 500, "defaults", "at most 50", line=1),
    yaml(
        "many references",
        "decode:\n  stop: [" + "'${seed}'," * 40 + "]\n" + MODEL,
        "value",
        "more than 16 references",
    ),
    yaml(
        "references in one value", "model:\n  path: " + "${seed}" * 5000, "recipe", "more than 16"
    ),
    typed("_target_ typed", "+model._target_=os.system", "override", "names code"),
    typed("_target_ in a mapping", "+model={_target_: os.system}", "override", "names code"),
    typed("environment typed", f"model.path={ENVIRONMENT}", "override", "calls a resolver"),
    typed(
        "environment, escaped", "model.path=$\\{oc.env\\:RECIPE_CANARY\\}", "override", "resolver"
    ),
    typed("environment, quoted", f"model.path='{ENVIRONMENT}'", "override", "resolver"),
    typed("environment in a list", f"decode.stop=[a,'{ENVIRONMENT}']", "override", "resolver"),
    typed("environment as a choice typed", f"cache={ENVIRONMENT}", "override", "resolver"),
    typed("hydra typed", "hydra.run.dir=canary.txt", "override", "of Hydra"),
    typed("hydra added", "+hydra.searchpath=[file:///etc]", "override", "of Hydra"),
    typed("hydra group", "hydra/launcher=basic", "override", "of Hydra"),
    typed("hydra deleted", "~hydra", "override", "of Hydra"),
    typed("path as choice", "cache=../../canary", "override", "leaves the folders"),
    typed("whole path as choice", "cache=/etc/passwd", "override", "leaves the folders"),
    typed("deep typed", "seed=" + "[" * 3000, "override", "nested more than"),
    typed("long typed", "seed=" + "x" * 20_000, "override", "longer than"),
    typed("large integer typed", "seed=" + "9" * 5000, "override", "limit"),
    typed("not text typed", "model.path=\udcff", "override", "not text"),
]


def named(case: Case) -> str:
    return case.name


def composed(case: Case, folder: Path) -> list[Problem]:
    """Return what is wrong with a case; something has to be."""
    with pytest.raises(RecipeError) as caught:
        engine.compose(written(case.text, folder), case.overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def written(text: str | None, folder: Path) -> str:
    if text is None:
        return "tiny"
    file = folder / "bad.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def expected(case: Case, problems: list[Problem], folder: Path) -> Problem:
    """Return the one problem that the case is about."""
    found = [one for one in problems if one.code == case.code and case.says in one.message]
    assert found, problems
    problem = found[0]
    assert problem.message
    assert problem.hint
    assert case.hint in problem.hint, problem
    if case.text is None:
        assert problem.where
    elif case.line is not None:
        assert problem.where == f"{folder / 'bad.yaml'}:{case.line}"
    return problem


def test_the_corpus_is_large_enough() -> None:
    assert len(MALFORMED) >= 60
    assert len(HOSTILE) >= 20
    assert len({case.name for case in MALFORMED + HOSTILE}) == len(MALFORMED + HOSTILE)


@pytest.mark.parametrize("case", MALFORMED, ids=named)
def test_a_malformed_recipe_is_refused_with_reason_and_remedy(case: Case, tmp_path: Path) -> None:
    problems = composed(case, tmp_path)
    expected(case, problems, tmp_path)
    assert len(problems) == 1, "one mistake, one problem: nothing that only follows from it"


@pytest.mark.parametrize("case", HOSTILE, ids=named)
def test_a_hostile_recipe_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPE_CANARY", SECRET)
    problems = composed(case, tmp_path)
    expected(case, problems, tmp_path)
    assert SECRET not in repr(problems)
    assert all(len(str(problem)) < 2000 for problem in problems)


WATCHED = r"""
import json, os, sys
import engine
from engine.errors import RecipeError

cases, canary = json.load(sys.stdin)
refused = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.Popen",
           "socket.connect", "socket.getaddrinfo", "os.mkdir", "os.rename", "os.remove",
           "shutil.rmtree")
seen, usual, learning = [], set(), True

def watch(event, arguments):
    if event in refused:
        seen.append(event)
    elif event == "exec":
        code = (arguments[0].co_filename, arguments[0].co_code, arguments[0].co_names)
        if learning:
            usual.add(code)  # annotations of plugins are evaluated, each time
        elif code not in usual and not os.path.exists(code[0]):
            seen.append(f"exec {code}")
    elif event == "open":
        path, flags = str(arguments[0]), arguments[2]
        if "canary" in path or "passwd" in path or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"open {path}")

sys.addaudithook(watch)
for words in ([], ["seed=abc"], ["sed=1"], ["model.path=x", "seed=abc"], ["cache=static"],
              ["+cache=static"], ["target=x"]):
    try:
        engine.compose("tiny", words)
    except RecipeError:
        pass
seen, learning = [], False
for name, file, overrides in cases:
    try:
        engine.compose(file or "tiny", overrides)
        seen.append("composed")
    except RecipeError:
        pass
    if seen:
        sys.exit(f"{name}: {seen}")
os.system("true")
assert seen == ["os.system"], "the watch does not work"
"""


def test_nothing_is_executed_read_or_written(tmp_path: Path) -> None:
    recipes = tmp_path / "inside"
    recipes.mkdir()
    (tmp_path / "canary.yaml").write_text(MODEL)
    cases = []
    for index, case in enumerate(HOSTILE):
        file = recipes / f"case{index}.yaml"
        if case.text is not None:
            file.write_text(case.text, encoding="utf-8")
        cases.append((case.name, str(file) if case.text is not None else None, case.overrides))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        input=json.dumps([cases, "canary"]),
        cwd=recipes,
        env={**os.environ, "RECIPE_CANARY": SECRET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["canary.yaml", "inside"]
    assert {file.stem[:4] for file in recipes.iterdir()} == {"case"}


def test_only_regular_files_inside_the_folder_are_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside.yaml"
    outside.write_text(f"model: {{path: x}}\nsecret: {SECRET}\n")
    recipes = tmp_path / "recipes"
    (recipes / "quantize").mkdir(parents=True)
    os.mkfifo(recipes / "pipe.yaml")
    (recipes / "folder.yaml").mkdir()
    (recipes / "device.yaml").symlink_to("/dev/zero")
    (recipes / "link.yaml").symlink_to(outside)
    os.mkfifo(recipes / "quantize" / "pipe.yaml")
    (recipes / "quantize" / "link.yaml").symlink_to(outside)
    (recipes / "good.yaml").write_text(MODEL)
    for name in ("pipe", "folder", "device", "link"):
        with pytest.raises(RecipeError) as caught:
            engine.compose(recipes / f"{name}.yaml")
        assert SECRET not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.problems[0].code == ("link" if name == "link" else "recipe-not-found")
    for name, code in (("pipe", "unknown-choice"), ("link", "link")):
        with pytest.raises(RecipeError) as caught:
            engine.compose(recipes / "good.yaml", [f"quantize={name}"])
        assert [problem.code for problem in caught.value.problems] == [code]
    assert engine.compose(recipes / "good.yaml").model.path == "x"


@pytest.mark.parametrize(
    ("raw", "code"),
    [(b"seed: \xff\n", "unreadable"), (b"seed: \x00\n", "yaml"), (b"\xff\xfes\x00", "unreadable")],
)
def test_bytes_that_are_no_text(raw: bytes, code: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        engine.compose(file)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert problem.where.startswith(str(file))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nope",
        "tinny",
        "config",
        "hydra/config",
        "../tiny",
        "/etc/passwd",
        "a\0b/c.yaml",
        "x.yml",
        "y" * 5000,
        "/" + "y" * 5000,
        "~nobody-at-all/x.yaml",
        "\udcff",
        "schema",
    ],
)
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        engine.compose(name)
    (problem,) = caught.value.problems
    assert problem.code in ("recipe-not-found", "recipe-name")
    assert problem.hint
    assert len(problem.message) < 200


def test_a_tree_of_recipes_that_explodes(tmp_path: Path) -> None:
    for level in range(30):
        text = "defaults:\n" + f"- r{level + 1}\n" * 5 + MODEL
        (tmp_path / f"r{level}.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        engine.compose(tmp_path / "r0.yaml")
    assert [problem.code for problem in caught.value.problems] == ["too-large"]


def test_all_mistakes_come_at_once_in_order(tmp_path: Path) -> None:
    text = (
        "defaults:\n- base\n- override attention: eagr\n- override cash: none\n"
        "model:\n  path: ${nope}\n  dtype: fp16\n  _target_: os.system\n"
        "attention: {size: 5}\ncache: static\ndecode:\n  top_q: 1\n  temperature: hot\nsed: 1\n"
    )
    words = [
        "seed=abc",
        "quantize=nf5",
        "quantize.bits=3",
        "decode.top_p=x",
        "hydra.run.dir=x",
        "?",
    ]
    problems = composed(Case("many", text, tuple(words)), tmp_path)
    file = tmp_path / "bad.yaml"
    lines = [problem.where for problem in problems if problem.where.startswith(str(file))]
    assert lines == [f"{file}:{line}" for line in (3, 4, 6, 7, 8, 10, 12, 13, 14)]
    typed_words = {problem.where for problem in problems} - set(lines)
    # Which options nf5 has nobody knows, and neither those of eagr.
    assert typed_words == {"seed=abc", "quantize=nf5", "decode.top_p=x", "hydra.run.dir=x", "?"}


def told(*words: str, recipe: str | Path = "tiny") -> list[str]:
    """Return what is said of a recipe with these overrides."""
    with pytest.raises(RecipeError) as caught:
        engine.compose(recipe, words)
    return [problem.message for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("decode.temperature=-1", "decode.top_k=2.5", "cach=static", "quantize.bits=4"),
            ("decode.temperature=-1.0 must", "a recipe has no key 'cach'",
             "decode.top_k is '2.5'", "quantize=none has no option 'bits'"),
        ),
        (
            ("quantize=nf4", "quantize.compute_dtype=foo", "position_encoding=yarn",
             "position_encoding.factor=1", "heads=grouped", "heads.num_key_value_heads=2"),
            ("heads.num_key_value_heads=2 is what", "position_encoding.factor=1.0 must",
             "quantize.compute_dtype is 'foo', which is none of auto, float32,"),
        ),
        (
            ("target.kind=foo", "seed=x", "decode.temperature=-1"),
            ("decode.temperature=-1.0 must", "seed is 'x'", "target.kind is 'foo'"),
        ),
        (("model.path=/not/there", "seed=x"), ("/not/there is not there", "seed is 'x'")),
    ],
)  # fmt: skip
def test_what_check_finds_comes_with_the_mistakes(
    words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    found = sorted(told(*words))
    assert len(found) == len(says), found
    for message, start in zip(found, sorted(says), strict=True):
        assert message.startswith(start)


@pytest.mark.parametrize(
    "words",
    [
        ("decode.temperature=hot", "decode.top_k=5"),  # top_k needs a temperature
        ("decode.temprature=0.7", "decode.top_k=5"),
        ("quantize=nf5", "quantize.bits=3"),
        ("model.path=~/x", "heads=grouped", "heads.num_key_value_heads=2"),  # of which model?
        ("target=t44", "model.dtype=bfloat16"),
        ("target=t4", "target.capability=[7]", "model.dtype=bfloat16"),
        ("target=cpu", "target.usable_gib=0.001", "seed=x"),  # memory is for recipes that stand
        ("position_encoding.factor=1",),
    ],
)
def test_what_only_follows_from_a_mistake_is_not_told(words: tuple[str, ...]) -> None:
    assert len(told(*words)) == 1


def test_a_judgement_that_fails_hides_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.verdict.check", lambda recipe: 1 / 0)
    assert told("seed=x") == ["seed is 'x', where int is due"]


def test_a_path_that_has_to_be_quoted_is_one_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(told("model.path=~/model", recipe="base")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    composed = engine.compose("base", ['model.path="~/model"'])
    assert engine.check(composed).problems[0].where != "model.path=~/model"


@pytest.mark.parametrize("name", ["def add(a, b):", "hello there", "x\n", "f(a/b)", "l " * 500])
def test_a_prompt_in_the_place_of_a_recipe(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        engine.compose(name)
    (problem,) = caught.value.problems
    assert problem.hint.startswith("a prompt is given with -p '")
    assert (name in problem.hint) == (len(name) < 60 and "\n" not in name)


SAMPLE = [*MALFORMED[4:60:9], *MALFORMED[62::9], *HOSTILE[0:30:7], *HOSTILE[40::5]]


@pytest.mark.parametrize("case", SAMPLE, ids=named)
def test_the_command_says_the_same(
    case: Case, engine: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    if any("\udcff" in word for word in case.overrides):
        pytest.skip("cannot be passed as an argument")
    done = engine(
        "check", written(case.text, tmp_path), *case.overrides, "--json",
        env={"RECIPE_CANARY": SECRET}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    assert said["ok"] is False
    assert set(said["problems"][0]) == set(asdict(Problem(message="")))
    expected(case, [Problem(**problem) for problem in said["problems"]], tmp_path)
    assert SECRET not in done.stdout + done.stderr


def test_the_command_prints_place_and_remedy(
    engine: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    file = written(MODEL + "sed: 1\nattention: eager\n", tmp_path)
    done = engine("check", file)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"{file}:2" in done.stderr
    assert "did you mean seed?" in done.stderr
    assert "- override attention: eager" in done.stderr


# Mutations of what is right.

SHIPPED = [
    file.read_text(encoding="utf-8")
    for file in sorted(
        [*shipped_folder().glob("*.yaml"), *shipped_folder().glob("quantize/*.yaml")]
    )
]
OVERRIDES = [
    "seed=5",
    "attention=eager",
    "decode.max_new_tokens=64",
    "decode.stop=['a, b',\"c\"]",
    "~observe",
    "+target.tflops.int8=5",
    "++seed=6",
    "model.path=${target.name}",
    "decode={top_k: 5, stop: [x]}",
    "quantize=nf4",
    "target=h100",
    "model.dtype=bfloat16",
    "cache=static",
    "cache.max_tokens=512",
]
WORDS = [
    "_target_",
    "os.system",
    ENVIRONMENT,
    "${seed}",
    "${",
    "}",
    "!!python/name:os.system ",
    "!x ",
    "&a ",
    "*a",
    "<<: ",
    "hydra",
    "hydra/launcher",
    "../",
    "/etc/passwd",
    "\\",
    "null",
    "~",
    "[]",
    "{}",
    "- ",
    ": ",
    "'",
    '"',
    "#",
    "\t",
    "\n",
    "\r",
    "%",
    "@",
    "|",
    ">",
    "? ",
    "---\n",
    "...",
    "1e400",
    "-1",
    "0x1F",
    "true",
    "9" * 50,
    "é",
    "\u2028",
    "\ufeff",
    "\x1b[31m",
    "defaults",
    "_self_",
    "override ",
    "optional ",
    "# @package _global_\n",
    "model",
    "cache",
    "=",
    ",",
    "(",
    ")",
    "choice(",
    "range(",
    "glob(*)",
]


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> str:
    """Return a text with a few characters, words or lines changed."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["word", "character", "delete", "repeat", "swap", "line"])):
            case "word":
                text = text[:start] + draw(st.sampled_from(WORDS)) + text[end:]
            case "character":
                text = text[:start] + draw(st.characters(exclude_categories=["Cs"])) + text[start:]
            case "delete":
                text = text[:start] + text[end:]
            case "repeat":
                text = text[:end] + text[start:end] * draw(st.integers(1, 3)) + text[end:]
            case "swap":
                text = text[:start] + text[end : end + 6] + text[start:end] + text[end + 6 :]
            case "line":
                lines = text.splitlines(keepends=True) or [""]
                line = draw(st.sampled_from(lines))
                lines.insert(draw(st.integers(0, len(lines))), line)
                text = "".join(lines)
    return text


def survives(text: str, words: list[str], folder: Path) -> None:
    file = folder / "mutant.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    try:
        recipe = engine.compose(file, words)
    except EngineError as error:
        problems = error.problems
        said = json.dumps([problem.as_dict() for problem in problems], ensure_ascii=False)
    else:
        problems = [Problem(message=recipe.digest)]
        said = recipe.text
    assert problems
    assert all(problem.message.strip() for problem in problems)
    assert SECRET.encode() not in said.encode()


RECIPES = mutated(SHIPPED)
LINES = st.lists(mutated(OVERRIDES), max_size=2)
OFTEN = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPE_CANARY", SECRET)


@pytest.mark.usefixtures("canary")
@OFTEN
@given(text=RECIPES)
def test_a_mutated_recipe_composes_or_is_refused(text: str, tmp_path: Path) -> None:
    survives(text, ["model.path=x"], tmp_path)


@pytest.mark.usefixtures("canary")
@OFTEN
@given(words=LINES)
def test_mutated_overrides_compose_or_are_refused(words: list[str], tmp_path: Path) -> None:
    survives(MODEL, words, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("canary")
@settings(parent=OFTEN, max_examples=5000)
@given(text=RECIPES, words=LINES)
def test_many_mutations_compose_or_are_refused(text: str, words: list[str], tmp_path: Path) -> None:
    survives(text, words, tmp_path)


def test_what_is_shipped_is_not_malformed() -> None:
    for name in recipe_names():
        engine.compose(name, ["model.path=x"])


def test_a_circle_is_told_whatever_the_limit_of_recursion(tmp_path: Path) -> None:
    """Libraries raise that limit, and the number of configs is reached first."""
    (tmp_path / "bad.yaml").write_text("defaults:\n- bad\n" + MODEL)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        with pytest.raises(RecipeError, match="in a circle"):
            engine.compose(tmp_path / "bad.yaml")
    finally:
        sys.setrecursionlimit(before)

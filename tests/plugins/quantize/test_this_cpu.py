"""Packed layers that this CPU does not multiply rightly are refused, or computed otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import engine as package
from engine import verdict
from engine.errors import Problem, RecipeError
from engine.loading.converting import convert
from engine.planning.planner import plan
from engine.planning.suggesting import suggest
from engine.quantizing import pricing, remembered, trial
from engine.quantizing.trial import Case
from engine.recipe import compose
from engine.session import Session
from engine.target import GIB, Target
from tests.conftest import Build, Run
from tests.plugins.helpers import logits, plain, receipt, relative

Model = Callable[[str], Path]
CRASH = "the product of 8 rows of inputs ends the process (SIGSEGV)"
FAULTY = Path(__file__).parents[2] / "faulty_cpu"
BFLOAT16 = "model.dtype=bfloat16"


@dataclass
class Cpu:
    """What trials show, and what was tried."""

    wrong: Callable[[Case], bool] = lambda case: False
    asked: list[Case] = field(default_factory=list)

    def attempt(self, cases: Sequence[Case]) -> tuple[dict[Case, str], Sequence[Case]]:
        self.asked += cases
        return {case: CRASH if self.wrong(case) else "" for case in cases}, ()


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cpu:
    """Return a CPU of which nothing is known, to be made wrong."""
    found = Cpu()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial, "_attempt", found.attempt)
    return found


def of_inputs(*inputs: int) -> Callable[[Case], bool]:
    return lambda case: case.inputs in inputs


def check(folder: Path, *words: str) -> list[Problem]:
    return verdict.check(compose("base", [f"model.path={folder}", *words])).problems


CHOICES = {
    "nf4": ("quantize=nf4", "quantize=bitsandbytes in 4 bits", "quantize=none"),
    "int8": ("quantize=int8", "quantize=bitsandbytes in 8 bits", "quantize=none"),
    "torchao": ("quantize=torchao", "quantize=torchao with quantize.kind=int8", "quantize=none"),
    "float8": ("quantize=torchao-float8", "quantize.kind=float8", "quantize=none"),
    "quanto": ("quantize=quanto-int4", "quantize=quanto in 4 bits", "quantize.bits=8"),
}
REFUSED = pytest.mark.parametrize("name", CHOICES)


@REFUSED
def test_check_refuses_and_its_hint_works(cpu: Cpu, model: Model, build: Build, name: str) -> None:
    choice, who, instead = CHOICES[name]
    cpu.wrong = of_inputs(128)
    (problem,) = check(model("llama"), choice)
    assert (problem.code, problem.slot) == ("fails-on-this-cpu", "quantize")
    assert who in problem.message
    assert f"does not work on this CPU in down_proj (128 inputs): tried here, {CRASH}" in str(
        problem
    )
    assert problem.hint == "quantize.skip_modules=[down_proj]"
    assert "a trial on this machine (" in problem.source
    assert f", torch {torch.__version__}" in problem.source
    assert check(model("llama"), choice, problem.hint) == []
    skipped = "quantize.skip_modules=[model.layers.0]"
    (again,) = check(model("llama"), choice, skipped)
    assert again.hint == "quantize.skip_modules=[model.layers.0,down_proj]"
    assert check(model("llama"), choice, again.hint) == []
    session = build(choice, problem.hint)
    assert receipt(session, "quantize").evidence["layers packed"] == 12
    assert not session.notes
    cpu.wrong = of_inputs(64, 128)
    for options in ([], [skipped]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ONEDNN_MAX_CPU_ISA", "another")  # so that all is tried again
            (problem,) = check(model("llama"), choice, *options)
            assert problem.hint == instead
            assert check(model("llama"), choice, problem.hint, *options[:0]) == []


def test_layers_are_tried_as_the_other_choices_leave_them(cpu: Cpu, model: Model) -> None:
    check(model("llama"), "quantize=nf4")
    before = {(case.outputs, case.inputs) for case in cpu.asked}
    check(model("llama"), "quantize=nf4", "heads=grouped", "heads.num_key_value_heads=1")
    assert {(case.outputs, case.inputs) for case in cpu.asked} == before | {(16, 64)}


def test_names_tell_right_layers_from_wrong_ones(cpu: Cpu, model: Model) -> None:
    cpu.wrong = of_inputs(16, 32)
    (problem,) = check(model("deepseek_v3"), "quantize=nf4")
    assert "in kv_b_proj (16 inputs), shared_experts.down_proj (32 inputs)" in problem.message
    assert problem.hint == "quantize.skip_modules=[kv_b_proj,shared_experts.down_proj]"
    assert check(model("deepseek_v3"), "quantize=nf4", problem.hint) == []


def test_a_right_cpu_refuses_nothing_and_is_asked_once(
    cpu: Cpu, model: Model, build: Build
) -> None:
    for choice, *_ in CHOICES.values():
        assert check(model("llama"), choice, "model.dtype=float32") == []
    asked = len(cpu.asked)
    assert asked == len(set(cpu.asked)) > 10
    for choice, *_ in CHOICES.values():
        assert build(choice).notes == []
    assert len(cpu.asked) == asked


@pytest.mark.parametrize("choice", ["quantize=quanto", "quantize=none"])
def test_nothing_is_tried_for_what_is_not_refused_before(
    cpu: Cpu, model: Model, choice: str
) -> None:
    assert check(model("llama"), choice) == []
    assert not cpu.asked


@REFUSED
def test_layers_that_are_not_known_before_are_refused_once_loaded(
    cpu: Cpu, build: Build, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    choice, who, _ = CHOICES[name]
    monkeypatch.setattr(pricing, "to_pack", lambda *given, **more: {})
    cpu.wrong = of_inputs(128)
    with pytest.raises(RecipeError, match=r"down_proj \(128 inputs\)") as caught:
        build(choice)
    assert who in str(caught.value)
    assert caught.value.problems[0].hint == "quantize.skip_modules=[down_proj]"
    build(choice, caught.value.problems[0].hint)


def test_what_cannot_be_tried_is_told(
    cpu: Cpu, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_attempt", lambda cases: ({}, ()))
    for choice in ("quantize=nf4", "quantize=quanto"):
        (note,) = build(choice).notes
        assert "multiplies rightly in " in note
        assert "down_proj (128 inputs)" in note
        assert "could not be tried" in note


# -- computed otherwise ----------------------------------------------------------------------


def dequantized(session: Session) -> Any:
    """Return plain transformers with the values that the packed weights stand for."""
    reference = plain(Path(session.recipe.model.path))
    with torch.no_grad():
        for name, module in session.model.named_modules():
            if hasattr(getattr(module, "weight", None), "__tensor_flatten__"):
                weight: Any = module.weight
                reference.get_submodule(name).weight.copy_(weight.dequantize())
    return reference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quanto_in_8_bits_unpacks_for_each_product(cpu: Cpu, build: Build, dtype: str) -> None:
    cpu.wrong = of_inputs(24, 64)
    session = build(
        "quantize=quanto", f"model.dtype={dtype}", "attention=eager", family="deepseek_v3"
    )
    evidence = receipt(session, "quantize").evidence
    assert (evidence["layers packed"], evidence["layers unpacked for each product"]) == (16, 12)
    assert "UnpackedQLinear" in str(evidence["classes"])
    # A pass for the prompt and one for a token, of the layers that are left.
    assert evidence["operators"] == "quanto::qbytes_mm: 8"
    (note,) = session.notes
    assert "q_b_proj (24 inputs)" in note
    assert CRASH in note
    assert "kv_b_proj" not in note
    away = relative(logits(session.model).float(), logits(dequantized(session)))
    assert away < (1e-4 if dtype == "float32" else 0.1)
    assert session.generate("def add").token_ids


def test_unpacked_layers_compile(cpu: Cpu, build: Build) -> None:
    cpu.wrong = of_inputs(128)
    session = build("quantize=quanto")
    torch._dynamo.reset()
    compiled: Any = torch.compile(session.model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=torch.tensor([[3, 14, 15]]), use_cache=False).logits
    assert relative(found, logits(session.model, torch.tensor([[3, 14, 15]]))) < 1e-5


def test_an_unpacked_layer_that_computes_otherwise_is_no_proof(
    cpu: Cpu, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.quantizing.libraries import unpacked_linear

    cpu.wrong = lambda case: True
    session = build("quantize=quanto")
    assert receipt(session, "quantize").evidence["operators"] == ""
    plugin: Any = session.recipe.quantize
    assert all(each.ok for each in plugin.receipts(session))
    zeros = lambda self, inputs: inputs.new_zeros(4, self.out_features)  # noqa: E731
    monkeypatch.setattr(unpacked_linear(), "forward", zeros)
    assert not all(each.ok for each in plugin.receipts(session))


def test_a_broken_cpu_runs_what_it_can(engine: Run, model: Model, tmp_path: Path) -> None:
    """From end to end, in processes in which torch's operator is broken for 24 inputs."""
    folder = model("deepseek_v3")
    words = (f"model.path={folder}", "quantize=quanto", BFLOAT16, "decode.max_new_tokens=8")
    env = {"PYTHONPATH": str(FAULTY), "XDG_CACHE_HOME": str(tmp_path)}
    done = engine("run", "base", *words, "-p", "def add", "--json", env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (quantized,) = [each for each in told["receipts"] if each["slot"] == "quantize"]
    assert quantized["evidence"]["layers unpacked for each product"] == 2
    with pytest.MonkeyPatch.context() as patch:
        found = Cpu(of_inputs(24))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        patch.setattr(trial, "_attempt", found.attempt)
        with package.build(compose("base", list(words))) as session:
            assert session.generate("def add").token_ids == told["token_ids"]


# -- by the compiler -------------------------------------------------------------------------

COMPILED = ("decode=compiled", "cache=static", "quantize=torchao", BFLOAT16)


def by_compiler(case: Case) -> bool:
    return case.make.endswith(":torchao_compiled")


def test_what_the_compiler_multiplies_by_is_tried_too(cpu: Cpu, model: Model) -> None:
    cpu.wrong = by_compiler
    (problem,) = check(model("llama"), *COMPILED)
    assert problem.code == "fails-on-this-cpu"
    assert problem.hint == "decode=generate"
    assert check(model("llama"), *COMPILED, problem.hint) == []
    cpu.wrong = lambda case: by_compiler(case) and case.inputs == 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "another")
        (problem,) = check(model("llama"), *COMPILED)
        assert "in down_proj (128 inputs)" in problem.message
        assert problem.hint == "decode=generate"
        skipped = "quantize.skip_modules=[down_proj]"
        assert check(model("llama"), *COMPILED, skipped) == []


@pytest.mark.parametrize("other", ["model.dtype=float32", "quantize.kind=float8"])
def test_it_has_such_an_operator_for_bfloat16_and_integers_only(
    cpu: Cpu, model: Model, other: str
) -> None:
    cpu.wrong = by_compiler
    assert check(model("llama"), *COMPILED, other) == []
    assert not [case for case in cpu.asked if by_compiler(case)]


def test_compiled_steps_are_tried_where_no_layer_was_known(
    cpu: Cpu, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pricing, "to_pack", lambda *given, **more: {})
    cpu.wrong = by_compiler
    with pytest.raises(RecipeError) as caught:
        build(*COMPILED)
    assert caught.value.problems[0].hint == "decode=generate"


# -- checkpoints that come packed --------------------------------------------------------------


@pytest.mark.parametrize("choice", ["nf4", "int8", "torchao"])
def test_packed_checkpoints_are_refused_by_check_and_once_loaded(
    cpu: Cpu, build: Build, model: Model, tmp_path: Path, choice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = [f"model.path={model('llama')}", "model.dtype=float32", f"quantize={choice}"]
    convert(compose("base", words), tmp_path / "packed")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "another")
    build(f"model.path={tmp_path / 'packed'}")
    asked = len(cpu.asked)
    build(f"model.path={tmp_path / 'packed'}")
    assert len(cpu.asked) == asked, "check and the loaded model name the same"
    cpu.wrong = of_inputs(128)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "a third")
    bare = Path(shutil.copytree(tmp_path / "packed", tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    for folder in (tmp_path / "packed", bare):
        (problem,) = [each for each in check(folder) if each.slot == "quantize"]
        assert problem.code == "fails-on-this-cpu"
        assert problem.message.startswith("the checkpoint, which came packed, does not work")
        assert problem.hint == (
            "the original checkpoint: model.path=FOLDER_OR_HUB_ID quantize.skip_modules=[down_proj]"
        )
    monkeypatch.setattr(pricing, "to_pack", lambda *given, **more: {})
    with pytest.raises(RecipeError, match="which came packed") as caught:
        build(f"model.path={tmp_path / 'packed'}")
    assert caught.value.problems == [replace(problem)]


# -- when nothing is tried ---------------------------------------------------------------------


def test_a_hint_that_this_cpu_would_refuse_is_left_out(cpu: Cpu, model: Model) -> None:
    words = ["model.dtype=float32", "quantize=int8", "decode=prompt-lookup"]
    (problem,) = check(model("llama"), *words)
    assert problem.hint == "decode=generate, or quantize.bits=4"
    cpu.wrong = lambda case: "nf4" in str(case)
    remembered.file().unlink()
    (problem,) = check(model("llama"), *words)
    assert problem.hint == "decode=generate"


def test_nothing_is_tried_to_find_out_that_it_does_not_fit(cpu: Cpu) -> None:
    made = compose("base", ["model=llama-3.1-70b", "target.usable_gib=16"])
    found = plan(made)
    assert found.fits is False
    suggest(found)
    assert not verdict.check(made).ok
    assert not cpu.asked


@pytest.mark.parametrize(
    "target", ["target=rtx3090", "target=apple-m3-max", "target.name=another target.kind=cpu"]
)
def test_nothing_is_tried_for_another_machine(cpu: Cpu, model: Model, target: str) -> None:
    cpu.wrong = lambda case: True
    for choice, *_ in CHOICES.values():
        words = [f"model.path={model('llama')}", choice, BFLOAT16, *target.split()]
        assert "fails-on-this-cpu" not in {
            each.code for each in plan(compose("base", words)).verdict.problems
        }
    assert not cpu.asked


def test_a_target_elsewhere_is_tried_where_it_is_run(cpu: Cpu, build: Build) -> None:
    cpu.wrong = of_inputs(128)
    for target in (["target=rtx3090"], ["target.name=another", "target.kind=cpu"]):
        with pytest.raises(RecipeError, match="does not work on this CPU"):
            build("quantize=nf4", *target)


def test_nothing_is_tried_for_recipes_with_mistakes(cpu: Cpu, model: Model) -> None:
    with pytest.raises(RecipeError, match="statik"):
        compose("base", [f"model.path={model('llama')}", "quantize=nf4", "cache=statik"])
    assert not cpu.asked


def test_suggestions_are_tried_where_they_fit(cpu: Cpu, model: Model) -> None:
    words = [f"model.path={model('llama')}", "quantize=none", "model.dtype=float32"]
    recipe = compose("base", words)
    needed = plan(recipe).peak_bytes
    small = Target(name="auto", kind="cpu", usable_gib=(needed - 1000) / GIB)
    cpu.wrong = lambda case: "bitsandbytes" in case.make
    found = [each.overrides for each in suggest(plan(recipe, target=small))]
    assert found
    assert not [words for words in found if "bitsandbytes" in str(words)]
    assert {case.library for case in cpu.asked} > {"bitsandbytes"}
    cpu.asked.clear()
    tiny = Target(name="auto", kind="cpu", usable_gib=1e-5)
    suggest(plan(recipe, target=tiny))
    assert not cpu.asked

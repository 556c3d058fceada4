"""What is packed, what it takes to the byte, and what is refused: for all choices and families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from transformers.quantizers.quantizers_utils import should_convert_module

from engine import receipts, verdict
from engine.contexts import Quantization
from engine.errors import RecipeError
from engine.plugins.quantize import bitsandbytes, quanto
from engine.quantizing import packing
from engine.recipe import compose
from engine.session import Session
from tests.conftest import Build
from tests.models import FAMILIES, tiny_model
from tests.plugins.helpers import (
    allocated,
    altered,
    hints,
    logits,
    packed_parts,
    plain,
    receipt,
    relative,
    shape_of,
    terms,
)

CHOICES: dict[str, tuple[str, ...]] = {
    "none": ("quantize=none",),
    "int8": ("quantize=bitsandbytes", "quantize.bits=8"),
    "nf4": ("quantize=bitsandbytes",),
    "nf4-double": ("quantize=bitsandbytes", "quantize.double_quant=true"),
    "torchao-int8": ("quantize=torchao",),
    "torchao-float8": ("quantize=torchao", "quantize.kind=float8"),
    "torchao-int8-dynamic": ("quantize=torchao", "quantize.kind=int8_dynamic"),
    "quanto-int8": ("quantize=quanto",),
    "quanto-int4": ("quantize=quanto", "quantize.bits=4"),
}
REFUSED = {
    "gpt2": ("torchao", "quanto"),
    "falcon": ("torchao", "int8", "nf4"),
    "falcon-rotary": ("torchao", "int8", "nf4"),
    "deepseek_v3": ("int8",),
}
"""Families whose layers a library cannot pack, by the beginning of the choice's name."""

ERRORS = {
    "torchao-int8": 0.06,
    "torchao-float8": 0.2,
    "torchao-int8-dynamic": 0.08,
    "quanto-int8": 0.06,
    "quanto-int4": 0.65,
}
"""Of logits, on random models 64 wide: far above what a trained model of real width shows."""


def priced(session: Session) -> dict[str, int]:
    """Return the bytes that config.json alone tells."""
    shape = replace(session.shape, tensors={})
    found = terms(session.recipe.quantize, shape, 1, dtype=session.recipe.model.dtype.value)
    return {"scales": 0, "packed weights": 0} | {term.name: term.bytes for term in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_works_or_is_refused_before_loading(
    build: Build, model: Callable[[str], Path], family: str
) -> None:
    for name in ("none", "int8", "torchao-int8", "quanto-int8", "quanto-int4"):
        recipe = compose("base", [f"model.path={model(family)}", *CHOICES[name]])
        problems = [each for each in verdict.check(recipe).problems if each.slot == "quantize"]
        refused = name.startswith(REFUSED.get(family, ("nothing",)))
        assert bool(problems) == refused, name
        if not refused:
            session = build(*CHOICES[name], family=family)
            assert priced(session) == allocated(session), name


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("qwen3", "bfloat16"),
        ("gpt2", "float16"),
        ("bloom", "bfloat16"),
        ("mixtral", "bfloat16"),
        ("gpt_oss", "float16"),
    ],
)
def test_it_is_as_large_as_estimated(build: Build, family: str, name: str, dtype: str) -> None:
    if not name.startswith(REFUSED.get(family, ("nothing",))):
        session = build(*CHOICES[name], f"model.dtype={dtype}", family=family)
        assert priced(session) == allocated(session)


@pytest.mark.parametrize("name", ["none", "nf4", "torchao-int8"])
def test_pooled_heads_are_priced_as_pooled(build: Build, name: str) -> None:
    session = build(*CHOICES[name], "heads=grouped", "heads.num_key_value_heads=1")
    assert priced(session) == allocated(session)
    assert sum(priced(session).values()) < sum(priced(build(*CHOICES[name])).values())


@pytest.mark.parametrize("columns", [160, 192, 256, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_of_4_bits_are_priced_as_they_are(
    build: Build, tmp_path: Path, columns: int, dtype: str
) -> None:
    folder = tiny_model("llama", tmp_path, intermediate_size=columns, num_hidden_layers=1)
    words = [*CHOICES["quanto-int4"], f"model.path={folder}", f"model.dtype={dtype}"]
    session = build(*words)
    assert priced(session) == allocated(session)
    group = {160: 32, 192: 96, 256: 128, 200: 200}[columns]
    told = receipt(session, "quantize").evidence["layers by inputs per scale"]
    assert f"{group}: 1" in str(told).split(", ")


def test_of_unknown_code_the_files_tell(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("llama"))
    unknown = replace(shape, config={**shape.config, "model_type": "never_heard"})
    assert unknown.blueprint is None
    for plugin in (quanto.Quanto(), bitsandbytes.BitsAndBytes()):
        assert terms(plugin, unknown, 1) == terms(plugin, shape, 1)
        assert terms(plugin, replace(unknown, tensors={}), 1) == []


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "bloom"])
def test_the_error_is_that_of_the_values(build: Build, family: str, name: str) -> None:
    session = build(*CHOICES[name], "attention=eager", family=family)
    reference = plain(Path(session.recipe.model.path))
    found = logits(session.model)
    assert 0.001 < relative(found, logits(reference)) < ERRORS[name]
    with torch.no_grad():
        for path, module in session.model.named_modules():
            if hasattr(getattr(module, "weight", None), "dequantize") and path != "":
                weight: Any = module.weight
                if type(weight.data) is not torch.Tensor:
                    reference.get_submodule(path).weight.copy_(weight.dequantize())
    exact = 0.08 if name == "torchao-int8-dynamic" else 1e-4
    assert relative(found, logits(reference)) < exact


@pytest.mark.parametrize("name", [*ERRORS, "nf4", "int8"])
def test_layers_can_be_left_alone(build: Build, name: str) -> None:
    left = "quantize.skip_modules=[down_proj,model.layers.1]"
    session = build(*CHOICES[name], left)
    packed = {id(module) for module, _ in packed_parts(session)}
    names = [name for name, module in session.model.named_modules() if id(module) in packed]
    assert len(names) == 6
    assert not [each for each in names if "down_proj" in each or "layers.1" in each]
    assert priced(session) == allocated(session)
    assert receipt(session, "quantize").evidence["neither packed nor to be left alone"] == 0


@pytest.mark.parametrize("name", ["torchao-int8", "quanto-int8", "int8"])
def test_a_pattern_that_matches_nothing_is_refused_by_check(
    model: Callable[[str], Path], name: str
) -> None:
    words = [f"model.path={model('llama')}", *CHOICES[name]]
    recipe = compose("base", [*words, "quantize.skip_modules=[down_proj,fc1]"])
    (problem,) = verdict.check(recipe).problems
    assert problem.code == "matches-nothing"
    assert "matches fc1" in problem.message
    assert "up_proj" in problem.hint
    recipe = compose("base", [*words, "quantize.skip_modules=['(']"])
    (problem,) = verdict.check(recipe).problems
    assert "no regular expression" in problem.message


@pytest.mark.parametrize("name", ["torchao-int8", "quanto-int8", "int8", "nf4"])
@pytest.mark.parametrize(
    ("skip", "codes"),
    [
        (".*", ["nothing-to-pack"]),
        ("model.layers.0,model.layers.1", ["nothing-to-pack"]),
        ("model.layers.0", []),
    ],
)
def test_leaving_everything_alone_is_refused_by_check(
    model: Callable[[str], Path], name: str, skip: str, codes: list[str]
) -> None:
    words = [f"model.path={model('llama')}", *CHOICES[name], f"quantize.skip_modules=[{skip}]"]
    problems = verdict.check(compose("base", words)).problems
    assert [each.code for each in problems] == codes
    assert all("fewer of quantize.skip_modules" in each.hint for each in problems)


def test_a_pattern_is_refused_in_the_build_where_no_headers_tell(build: Build) -> None:
    config = build().source_config
    with pytest.raises(RecipeError, match="matches fc1") as caught:
        packing.left_alone(config, "x", kinds=["Linear"], skip=["down_proj", "fc1"])
    assert "up_proj" in caught.value.problems[0].hint
    with pytest.raises(RecipeError, match="nothing to pack in llama: its layers are Linear"):
        packing.left_alone(config, "x", kinds=["Conv1D"], skip=[])


def test_patterns_are_read_as_transformers_does() -> None:
    names = ["model.layers.1.mlp", "model.layers.11.mlp.fc1", "lm_head", "model.h.1"]
    for pattern in ("model.layers.1", "fc1", "lm_head", r"model\.layers\..*", "mlp", "h.1", "m"):
        for name in names:
            assert packing.matches(name, [pattern]) != should_convert_module(name, [pattern])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_told_from_the_config(model: Callable[[str], Path], family: str) -> None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    reference = plain(model(family))
    matrices = [weight for weight in shape_of(model(family)).weights if weight.matrix]
    told = {weight.module: weight.kind for weight in matrices if not weight.head}
    head = reference.get_output_embeddings()
    real = {
        name: type(module).__name__
        for name, module in reference.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    assert told == real


@pytest.mark.parametrize("name", list(CHOICES)[1:])
def test_a_layer_that_computes_otherwise_is_no_proof(
    build: Build, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(*CHOICES[name])
    plugin: Any = session.recipe.quantize
    assert all(each.ok for each in plugin.receipts(session))
    for module, _ in packed_parts(session):
        monkeypatch.setattr(module, "forward", lambda inputs: inputs.new_zeros(4, 1))
        break
    smallest: Any = min(
        (module for module, _ in packed_parts(session)),
        key=lambda each: each.in_features * each.out_features,
    )
    zeros = smallest.out_features
    monkeypatch.setattr(smallest, "forward", lambda inputs: inputs.new_zeros(4, zeros))
    assert not all(each.ok for each in plugin.receipts(session))


def test_a_layer_that_was_forgotten_is_no_proof(build: Build) -> None:
    session = build(*CHOICES["torchao-int8"])
    plugin: Any = session.recipe.quantize
    none_left: Any = type("Config", (), {"modules_to_not_convert": []})()
    built = {**session.built, "quantize": Quantization(config=none_left)}
    assert not all(each.ok for each in plugin.receipts(altered(session, built=built)))
    assert not all(each.ok for each in plugin.receipts(build(*CHOICES["quanto-int8"])))
    assert not all(each.ok for each in plugin.receipts(build()))


def test_the_core_believes_nobody_who_packed_nothing(build: Build) -> None:
    session = build()
    one = session.hooks.slot("quantize")
    bare = type("Bare", (), {})()

    def told(finish: Any, model: Any = session.model) -> list[Any]:
        hooks: Any = type("H", (), {"slot": lambda self, name: replace(one, plugin=bare)})()
        built = {**session.built, "quantize": Quantization(finish=finish)}
        known = altered(session, built=built, model=model)
        known.hooks = hooks
        return list(receipts._quantize(known, known.probe))

    assert told(None)
    assert told(lambda model: None)
    assert not told(lambda model: None, build(*CHOICES["torchao-int8"]).model)
    assert not told(lambda model: None, build("model.dtype=bfloat16").model)


def test_a_quantizer_is_registered_and_taken_back() -> None:
    from transformers.quantizers import base
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin

    quantizer: Any = base.HfQuantizer
    other: Any = type("Other", (quantizer,), {})
    register: Any = packing.register  # mypy wants a concrete class
    forget = register(QuantizationConfigMixin, quantizer, "of-ours")
    assert AUTO_QUANTIZER_MAPPING["of-ours"] is quantizer
    register(QuantizationConfigMixin, quantizer, "of-ours")  # after a failed load
    with pytest.raises(ValueError, match="has the quant_method of-ours already"):
        register(QuantizationConfigMixin, other, "of-ours")
    forget()
    assert "of-ours" not in AUTO_QUANTIZER_MAPPING
    with pytest.raises(ValueError, match="quanto"):
        register(QuantizationConfigMixin, quantizer, "quanto")


def test_missing_libraries_and_packed_checkpoints_are_refused(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(model("llama"))
    assert hints(quanto.Quanto(), replace(shape, quantization="awq")) == ["quantize=none"]
    assert hints(quanto.Quanto(bits=3), shape) == ["quantize.bits=8"]
    monkeypatch.setattr(packing, "find_spec", lambda name: None)
    assert hints(quanto.Quanto()) == ['pip install "recipe-engine[quanto]"']


@pytest.mark.parametrize("name", [name for name in CHOICES if name.startswith("torchao")])
def test_the_compiler_keeps_its_options(build: Build, name: str) -> None:
    """They are the process's, and would change what the next session compiles."""
    before = torch._inductor.config.get_config_copy()
    with torch._inductor.config.patch(coordinate_descent_tuning=False):
        build(*CHOICES[name])
        assert not torch._inductor.config.coordinate_descent_tuning
    assert torch._inductor.config.get_config_copy() == before

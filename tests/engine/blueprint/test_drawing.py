"""A blueprint has the parameters that transformers makes on the meta device: all, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.blueprint import drawing
from engine.recipe import shipped_folder
from engine.shape import read_shape
from tests.models import FAMILIES, tiny_config

RENAMED = ("camembert", "xlm-roberta")
"""Of two tied weights, transformers keeps the name of the other one here."""

UNKNOWN = ("gpt-sw3",)
"""A model type that stands in no config.json: theirs say gpt2."""

SHIPPED = sorted(file.stem for file in Path(shipped_folder() / "model").glob("*.yaml"))


def on_meta(config: Any) -> dict[str, tuple[int, ...]]:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return {name: tuple(each.shape) for name, each in model.named_parameters()}


def drawn(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    found = drawing.draw(config)
    assert found is not None
    return {weight.name: weight.shape for weight in found.weights if weight.trained}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_has_the_parameters_of_the_model(family: str) -> None:
    config = tiny_config(family)
    saved = json.loads(config.to_json_string())
    assert drawn(saved) == on_meta(config)
    shape = read_shape(saved)
    assert shape.parameters == sum(torch.Size(size).numel() for size in on_meta(config).values())


@pytest.mark.parametrize("name", SHIPPED)
def test_known_models_have_the_parameters_that_are_stated_and_that_transformers_makes(
    name: str,
) -> None:
    text = (shipped_folder() / "model" / f"{name}.yaml").read_text("utf-8")
    config = yaml.safe_load(text)["config"]
    parameters = read_shape(config).parameters
    reference = on_meta(AutoConfig.for_model(**config))
    assert parameters == sum(torch.Size(size).numel() for size in reference.values())
    stated = re.match(r"# .*, (\d+)(\.\d+)? billion weights", text)
    assert stated is not None
    billions, decimals = "".join(filter(None, stated.groups())), len(stated[2] or ".") - 1
    assert round(parameters / 1e9, decimals) == float(billions)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_it_has_those_of_every_type_that_transformers_knows(model_type: str) -> None:
    try:
        reference = on_meta(AutoConfig.for_model(model_type))
    except Exception as error:
        pytest.skip(f"transformers makes no {model_type} by default: {error}")
    if model_type in UNKNOWN:
        assert drawing.draw({"model_type": model_type}) is None
        return
    found = drawn({"model_type": model_type})
    if model_type in RENAMED:
        assert sorted(found.values()) == sorted(reference.values())
    else:
        assert found == reference


def test_it_tells_matrices_from_what_is_left_alone() -> None:
    found = drawing.draw(json.loads(tiny_config("gpt2").to_json_string()))
    assert found is not None
    (fused,) = [weight for weight in found.weights if "h.0.attn.c_attn.weight" in weight.name]
    assert (fused.kind, fused.rows, fused.columns) == ("Conv1D", 192, 64)
    assert not any(weight.matrix for weight in found.weights if "wte" in weight.name)
    untied = drawing.draw(json.loads(tiny_config("llama").to_json_string()))
    assert untied is not None
    assert [weight.name for weight in untied.weights if weight.head] == ["lm_head.weight"]


def test_what_transformers_does_not_know_has_no_blueprint() -> None:
    assert drawing.draw({"model_type": "never_heard"}) is None
    assert drawing.draw({}) is None
    assert drawing.draw({"model_type": "llama", "hidden_size": "wide"}) is None
    assert drawing.draw({"model_type": "llama", "hidden_size": object()}) is None


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from engine.blueprint import drawing;"
        "assert drawing.draw({'model_type': 'llama'}).parameters == 6738415616;"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

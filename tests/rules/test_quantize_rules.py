"""What the rules of `quantize` forbid still fails, and what they no longer forbid works.

A test that fails here says that a library has learned, and that a rule can go.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from engine.loading.common import quiet
from engine.quantizing.libraries import unpack_in_torch
from tests.models import tiny_model
from tests.plugins.helpers import IDS, logits, plain, relative


def _packed(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    auto: Any = AutoModelForCausalLM
    on_cpu = {"": torch.device("cpu")}
    return auto.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map=on_cpu)


def _torchao(name: str) -> Any:
    with quiet():
        library: Any = importlib.import_module("torchao.quantization")
    make: Any = TorchAoConfig
    return make(getattr(library, name)())


def _quanto(weights: str) -> Any:
    unpack_in_torch()
    make: Any = QuantoConfig
    return make(weights=weights)


def _bitsandbytes(**options: Any) -> Any:
    make: Any = BitsAndBytesConfig
    return make(**options)


def test_quanto_converted_weights() -> None:
    from optimum.quanto import QLinear, qint8
    from transformers.integrations import quanto

    make: Any = quanto.QuantoQuantize
    model: Any = torch.nn.Module()
    model.layer = QLinear(8, 4, bias=False, weights=qint8)
    known = {"model": model, "full_layer_name": "layer.weight", "missing_keys": set()}
    make(None).convert({"layer.weight": [torch.randn(4, 8)]}, **known)
    assert model.layer.weight.shape == (4, 8)
    model.layer = QLinear(8, 4, bias=False, weights=qint8)
    with pytest.raises(ValueError, match="1D Tensors"):
        make(None).convert({"layer.weight": torch.randn(4, 8)}, **known)


def test_quanto_int4_compiled(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, hidden_size=256, num_hidden_layers=1)
    model = _packed(folder, _quanto("int4"), torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__.startswith("TinyGemm")
    logits(model)
    compiled: Any = torch.compile(model.forward, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"_scale|scalar type"), torch.no_grad():
        compiled(IDS, use_cache=False)


def test_int8_latent_kv() -> None:
    importlib.import_module("bitsandbytes")
    quantize: Any = torch.ops.bitsandbytes.int8_vectorwise_quant.default
    inputs = torch.randn(8, 16, dtype=torch.float16)
    codes, scales, _ = quantize(inputs, 6.0)
    assert (codes.shape, scales.shape) == ((8, 16), (8,))
    with pytest.raises(RuntimeError, match="must match the size"):
        quantize(inputs[None, None], 6.0)
    assert quantize(inputs[None, None, :1], 6.0)[0].shape != (1, 1, 1, 16)


def test_nothing_to_pack(model: Callable[[str], Path]) -> None:
    with pytest.raises(NotImplementedError, match="permute"):
        logits(_packed(model("falcon"), _torchao("Int8WeightOnlyConfig")))
    falcon = _packed(model("falcon"), _bitsandbytes(load_in_8bit=True))
    assert not [each for each in falcon.modules() if "8bit" in type(each).__name__]
    for config in (_torchao("Int8WeightOnlyConfig"), _quanto("int8")):
        gpt2 = _packed(model("gpt2"), config)
        assert logits(gpt2).equal(logits(plain(model("gpt2"), attn_implementation=None)))


def test_torchao_has_no_4_bits_on_a_cpu() -> None:
    """In none of its packings: each wants a library that is not there, or a GPU."""
    with quiet():
        library: Any = importlib.import_module("torchao.quantization")
        workflows: Any = importlib.import_module("torchao.quantization.quantize_.workflows")
    why: dict[str, tuple[Any, str]] = {
        "plain": (ImportError, "mslk"),
        "preshuffled": (ImportError, "mslk"),
        "plain_int32": (NotImplementedError, "'cpu'"),
        "tile_packed_to_4d": ((AssertionError, RuntimeError), "CUDA|NVIDIA"),
    }
    formats = {each.value: each for each in workflows.Int4PackingFormat}
    assert formats.keys() == why.keys()
    for name, (error, match) in why.items():
        config = library.Int4WeightOnlyConfig(int4_packing_format=formats[name])
        with pytest.raises(error, match=match):
            library.quantize_(torch.nn.Linear(128, 128, dtype=torch.bfloat16), config)


@pytest.mark.parametrize("choice", ["torchao", "quanto", "int8", "nf4"])
def test_packed_models_compile_as_one_graph(model: Callable[[str], Path], choice: str) -> None:
    """They once did not (pruna issues 45 and 51, optimum-quanto issue 221): no rule forbids it."""
    config = {
        "torchao": lambda: _torchao("Int8WeightOnlyConfig"),
        "quanto": lambda: _quanto("int8"),
        "int8": lambda: _bitsandbytes(load_in_8bit=True),
        "nf4": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    }[choice]()
    packed = _packed(model("llama"), config)
    for module in packed.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, not all have it
    expected = logits(packed)
    torch._dynamo.reset()
    compiled: Any = torch.compile(packed.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=IDS, use_cache=False).logits
    assert relative(found, expected) < 1e-5

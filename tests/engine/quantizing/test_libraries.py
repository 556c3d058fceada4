"""Layers are tried as each library packs them: the right ones pass, and no fault does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.quantizing import libraries, trial
from tests import trials


def test_what_bitsandbytes_misreads_is_found_and_nothing_else() -> None:
    """On CPUs with AVX-512 it looks scales up as if a row were whole blocks of 64."""
    from bitsandbytes import functional

    columns = (2, 6, 16, 24, 32, 48, 62, 64, 80, 96, 112, 128, 144, 160, 192, 208, 256)
    sizes = {f"{r} x {c}": (r, c) for r in (1, 2, 7, 128) for c in columns}
    options = {"quant_type": "nf4", "double_quant": False, "compute_dtype": "float32"}
    asked = trial.cases(sizes, "float32", libraries.bitsandbytes_4_bits, "bitsandbytes", **options)
    found = trial.faults(asked.values())
    for name, (rows, width) in sizes.items():
        # Each block is its own scale, and nothing else: a wrong one is seen at once.
        weight = (1.0 + torch.arange(rows * width) // 64).view(rows, width)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        right = torch.allclose(functional.dequantize_4bit(codes, state), weight)
        assert (found[asked[name]] == "") == right, (name, found[asked[name]])


def healthy() -> Iterator[trial.Case]:
    """Yield layers of sizes that no library has trouble with."""
    for case in trials.usual():
        if case.inputs % 64 == 0:
            yield case


def test_right_layers_pass_and_each_kind_can_be_tried() -> None:
    asked = list(healthy())
    found = trial.faults(asked)
    assert {case.make for case in asked if case not in found} == set()
    assert {case: fault for case, fault in found.items() if fault} == {}


def test_the_product_of_the_compiler_is_that_of_its_operator() -> None:
    packed = libraries.torchao_compiled()
    weight = torch.randn(32, 64).to(torch.bfloat16)
    inputs = torch.randn(1, 3, 64).to(torch.bfloat16)
    found, expected = packed.pack(weight)(inputs), inputs.float() @ weight.float().T
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
def test_the_compiler_multiplies_by_that_operator() -> None:
    """When this fails, compiled layers of torchao need no trial of their own."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    layer = libraries.torchao(config="Int8WeightOnlyConfig").pack(
        torch.randn(32, 64, dtype=torch.bfloat16)
    )
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(force_disable_caches=True):
        compiled = torch.compile(layer.forward, fullgraph=True)
        _, code = run_and_get_code(compiled, torch.randn(1, 1, 64, dtype=torch.bfloat16))
    assert "_weight_int8pack_mm" in "\n".join(code)


def test_packed_layers_are_told_from_a_checkpoint() -> None:
    sizes = {"up_proj": (128, 64)}
    for quantization, make, options in (
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
             "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True},
            "bitsandbytes_4_bits",
            {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
        ),
        (
            {"load_in_4bit": True},
            "bitsandbytes_4_bits",
            {"quant_type": "fp4", "double_quant": False, "compute_dtype": "float32"},
        ),
        (
            {"load_in_8bit": True, "llm_int8_threshold": 0.0},
            "bitsandbytes_8_bits",
            {"threshold": 0.0},
        ),
    ):  # fmt: skip
        (case,) = libraries.stated(quantization, sizes, "float16").values()
        assert case.make == f"engine.quantizing.libraries:{make}"
        assert dict(case.options) == options
        assert (case.outputs, case.inputs, case.dtype) == (128, 64, "float16")
    assert libraries.stated({"quant_method": "awq", "bits": 4}, sizes, "float16") == {}
    assert libraries.stated({"quant_method": "torchao", "quant_type": "?"}, sizes, "float16") == {}

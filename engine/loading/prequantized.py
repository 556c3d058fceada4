"""What a checkpoint that comes quantized needs, told from config.json before anything loads.

As the quantizers of transformers demand it (`quantizers/quantizer_*.py`, `validate_environment`),
which find out when the weights are about to load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from engine.errors import CheckpointError, Problem
from engine.loading.model_json import some
from engine.loading.safetensors_header import FLOATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.shape import ModelShape
    from engine.target import Target

SEEN = "transformers 5.23.0, 2026-11-22"
KERNELS = "kernels>=0.18.2,<0.19"


@dataclass(frozen=True)
class Needs:
    """What transformers demands before it loads a packing."""

    packages: tuple[str, ...] = ()
    """Requirements that must be installed."""
    capability: str = ""
    """Least CUDA compute capability; '' where a CPU will do."""
    never: str = ""
    """Why transformers cannot load it at all."""


METHODS = {
    "aqlm": Needs(("aqlm",)),
    "auto-round": Needs(("auto-round>=0.5",)),
    "awq": Needs(("gptqmodel",)),
    "bitnet": Needs(),
    "bitsandbytes": Needs(("bitsandbytes>=0.46.1",)),
    "bitsandbytes_4bit": Needs(("bitsandbytes>=0.46.1",)),
    "bitsandbytes_8bit": Needs(("bitsandbytes>=0.46.1",)),
    "compressed-tensors": Needs(("compressed-tensors>=0.15",)),
    "eetq": Needs((KERNELS,), "7.0"),
    "fbgemm_fp8": Needs(("fbgemm-gpu",), "9.0"),
    "fouroversix": Needs(("fouroversix",)),
    "fp8": Needs((KERNELS,), "8.9"),
    "fp_quant": Needs(("fp_quant",), "7.0"),
    "gemma": Needs(),
    "gguf": Needs(never="its weights are in a .gguf file, which load=gguf reads"),
    "gptq": Needs(("optimum>=1.24", "gptqmodel>=1.4.3")),
    "higgs": Needs(("flute-kernel>=0.3", "fast_hadamard_transform"), "7.0"),
    "hqq": Needs(never="its quantizer says that HQQ is not available yet"),
    "metal": Needs(never="it needs an Apple GPU and kernels that are not on the package index"),
    "mxfp4": Needs((KERNELS,), "7.5"),
    "mxfp8": Needs((KERNELS,), "8.9"),
    "nvfp4": Needs(never="its quantizer loads no checkpoint that is packed already"),
    "quanto": Needs(never="its quantizer saves nothing, so there is no form that it could read"),
    "quark": Needs(("amd-quark>=0.8",)),
    "sinq": Needs(("sinq",)),
    "spqr": Needs(("spqr_quant",), "7.0"),
    "torchao": Needs(("torchao>=0.15",)),
    "vptq": Needs(("vptq>=0.0.4",), "7.0"),
}
"""By `quant_method` of config.json."""

SIGNS = {
    r"\.quant_state\.bitsandbytes__": (("bitsandbytes",), "load_in_4bit"),
    r"\.SCB$": (("bitsandbytes",), "load_in_8bit"),
    r"\._weight_qdata$": (("torchao",), ""),
    r"\.qweight$": (("gptq", "awq", "auto-round"), ""),
    r"\.weight_packed$": (("compressed-tensors",), ""),
    r"\.weight_scale_inv$": (("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors"), ""),
    r"_proj_blocks$": (("mxfp4",), ""),
    r"\.W_q$": (("hqq",), ""),
}
"""Ends of names that only packed weights have → who writes them, and what of theirs then is set."""

ONLY_CODES = (
    "aqlm", "auto-round", "awq", "bitsandbytes", "eetq", "fbgemm_fp8", "fp8", "gptq", "mxfp4",
    "torchao",
)  # fmt: skip
"""Methods that leave no checkpoint all of whose tensors are plain numbers."""

FOREIGN = {
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "modelopt": "NVIDIA's Model Optimizer, for TensorRT-LLM and vLLM",
    "modelopt_fp4": "NVIDIA's Model Optimizer, for TensorRT-LLM and vLLM",
    "mlx": "MLX, for the GPUs of Apple",
    "marlin": "Marlin, for vLLM",
    "squeezellm": "SqueezeLLM, for vLLM",
    "deepspeedfp": "DeepSpeed, for vLLM",
    "neuron_quant": "AWS Neuron",
}
"""Other values of `quant_method` → whose they are."""


def problems(
    shape: ModelShape, target: Target, traits: Iterable[str] = (), dtype: str | None = None
) -> Iterator[Problem]:
    """Yield why a checkpoint's packing cannot be read; nothing where it is plain, or can be.

    A plugin that registers a quantizer of its own provides the trait `quantize.reads.<method>`.
    `dtype` is the number format to compute in, where that is known.
    Raises CheckpointError for a packing that transformers does not know: it would take the codes
    for weights.
    """
    method = shape.quantization
    if not method or f"quantize.reads.{method}" in traits:
        return
    needs = METHODS.get(method)
    if needs is None:
        raise CheckpointError(
            Problem(
                message=f"config.json says quantization_config.quant_method={method}, which "
                + (
                    f"is that of {FOREIGN[method]}, and none of transformers'"
                    if method in FOREIGN
                    else "transformers does not know"
                ),
                hint=f"the original checkpoint as model.path; known are {', '.join(METHODS)}",
                where="config.json",
                code="quantization",
            )
        )
    what = f"the checkpoint is packed by {method}"
    why, hint = _unmet(needs, target)
    if why:
        yield Problem(
            slot="load",
            code="packing-unreadable",
            message=f"{what}, and {why}",
            hint=f"{hint}, or the original checkpoint as model.path",
            source=f"transformers quantizers/quantizer_{_module(method)}.py ({SEEN})",
        )
    elif dtype and shape.dtype and dtype != shape.dtype and _fixed_format(shape):
        yield Problem(
            slot="load",
            code="packing-dtype",
            message=f"model.dtype={dtype}: {what} as 8-bit floats, and their products stay in the "
            f"format that they were packed in, {shape.dtype}",
            hint="model.dtype=auto",
            source="Float8Tensor.dequantize of torchao (torchao 0.18.0, 2026-11-28)",
        )


def _fixed_format(shape: ModelShape) -> bool:
    """Tell whether packed weights answer in the number format that they were packed in."""
    packed = shape.config.get("quantization_config")
    return shape.quantization == "torchao" and "Float8" in json.dumps(packed, default=str)


def verify_signs(shape: ModelShape) -> None:
    """Raise CheckpointError where the tensors were packed otherwise than config.json says."""
    stated = shape.config.get("quantization_config")
    for pattern, (methods, flag) in SIGNS.items():
        name = next((name for name in shape.tensors if re.search(pattern, name)), "")
        if not name or (shape.quantization and shape.quantization not in METHODS):
            continue
        says = f"quant_method={shape.quantization}" if shape.quantization else "nothing of it"
        if shape.quantization in methods:
            if not flag or (isinstance(stated, Mapping) and stated.get(flag)):
                continue
            says = f"{flag}=false"
        raise _mistaken(
            f"the weights are packed by {' or '.join(methods)}, as their names tell ({name}), and "
            f"the quantization_config of config.json says {says}",
            "fetch config.json and the weights again, from one source",
        )
    kinds = {tensor.dtype for tensor in shape.tensors.values()}
    if kinds and shape.quantization in ONLY_CODES and kinds <= set(FLOATS):
        raise _mistaken(
            f"config.json says that the weights are packed by {shape.quantization}; "
            f"all of them are plain numbers: {', '.join(sorted(kinds))}",
            "remove quantization_config from it; to pack them now: quantize=bitsandbytes",
        )


def verify_packed(folder: Path, tensors: Iterable[str], model: PreTrainedModel) -> None:
    """Raise CheckpointError where bitsandbytes packed other layers than config.json names.

    transformers makes a packed layer of plain numbers, or the other way round, and fails when it
    first runs.
    """
    signs = [pattern for pattern, (methods, _) in SIGNS.items() if methods == ("bitsandbytes",)]
    stored = {re.split("|".join(signs), name)[0].removesuffix(".weight") for name in tensors
              if re.search("|".join(signs), name)}  # fmt: skip
    made = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    ends, there = ({_end(name) for name in names} for names in (stored, made))
    others = {_end(name) for name, _ in model.named_modules()} - there
    # Names may change while loading: then the model has none of the stored ones, packed or not.
    if len(stored) != len(made) or ends & others:
        differing = sorted(ends ^ there)
        raise CheckpointError(
            Problem(
                message=f"bitsandbytes packed {len(stored)} layers of the checkpoint, and by "
                f"config.json it would be {len(made)}; they differ in: {some(differing)}",
                hint="llm_int8_skip_modules of config.json is another checkpoint's: fetch it again",
                where=str(folder / "config.json"),
                code="quantization",
            )
        )


def _end(name: str) -> str:
    """Return a layer's name from its number on."""
    return re.sub(r"^.*?(?=\d+\.|$)", "", name) or name


def _mistaken(message: str, hint: str) -> CheckpointError:
    return CheckpointError(
        Problem(message=message, hint=hint, where="config.json", code="quantization")
    )


def _unmet(needs: Needs, target: Target) -> tuple[str, str]:
    """Return what is missing, and how to get it."""
    if needs.never:
        hint = "load=gguf" if ".gguf" in needs.never else "quantize=bitsandbytes"
        return f"transformers cannot load that: {needs.never}", hint
    if needs.capability and not _reaches(target, needs.capability):
        has = f"has {target.capability}" if target.capability else "is none"
        return (
            f"that needs a CUDA GPU of compute capability {needs.capability} or more; "
            f"{target.name} {has}",
            "another target: engine list target",
        )
    if missing := [each for each in needs.packages if not installed(each)]:
        names = " and ".join(missing)
        quoted = " ".join(f"'{each}'" for each in missing)
        return f"that needs {names}, which is not installed", f"pip install {quoted}"
    return "", ""


def _reaches(target: Target, capability: str) -> bool:
    if "target.cuda" not in target.traits:
        return False
    # A GPU of which nothing more is said is taken to be new enough.
    return _numbers(target.capability or capability) >= _numbers(capability)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def installed(requirement: str) -> bool:
    """Tell whether a package is there in a version that will do."""
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _module(method: str) -> str:
    renamed = {
        "bitsandbytes": "bnb_4bit",
        "bitsandbytes_4bit": "bnb_4bit",
        "bitsandbytes_8bit": "bnb_8bit",
        "fp8": "finegrained_fp8",
        "mxfp8": "finegrained_fp8",
    }
    return renamed.get(method, method.replace("-", "_"))

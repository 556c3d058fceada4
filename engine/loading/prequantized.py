"""What a checkpoint that comes quantized needs, told from config.json before anything loads.

As the quantizers of transformers demand it (`quantizers/quantizer_*.py`, `validate_environment`),
which find out when the weights are about to load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from engine.errors import CheckpointError, Problem

if TYPE_CHECKING:
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


def problems(shape: ModelShape, target: Target, traits: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield why a checkpoint's packing cannot be read; nothing where it is plain, or can be.

    A plugin that registers a quantizer of its own provides the trait `quantize.reads.<method>`.
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
                "transformers does not know",
                hint=f"it knows: {', '.join(METHODS)}; or the original checkpoint",
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

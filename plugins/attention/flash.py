"""attention=flash: the kernels of the flash-attn packages, on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import distributions
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.contexts import (
    Attention,
    AttentionContext,
    CheckContext,
    EstimateContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.rules import Rule
from engine.target import detect

if TYPE_CHECKING:
    from engine.session import Session

PACKAGES = {2: "flash-attn", 3: "flash-attn-3", 4: "flash-attn-4"}
"""Version → the distribution that transformers looks for."""
LEAST = {2: 8, 3: 8, 4: 9}
"""Version → the oldest major compute capability."""
LARGEST_HEAD = 256
"""Numbers per head that the kernels take."""
SEEN = "transformers 5.23.0, 2026-11-22"
SINKS = Rule(
    code="flash-sinks",
    why="only version 4 takes a model's learned sinks into the softmax",
    hint="attention.version=v4 on Hopper or newer, or attention=eager",
    source="transformers, _compatible_flash_implementations of the model's class",
    seen=SEEN,
)


class Version(Enum):
    """A generation of the kernels."""

    v2 = 2
    v3 = 3
    v4 = 4


@dataclass
class Flash:
    """Compute attention with the flash-attn package: scores never are in memory, padding is cut.

    `version` v2 is Dao 2023, arXiv 2307.08691; v3 Shah et al. 2024, arXiv 2407.08608, made for
    Hopper; v4 is for Hopper and Blackwell (github.com/Dao-AILab/flash-attention). float16 and
    bfloat16 only, on CUDA only; transformers takes the kernels from the package, or from the hub
    where `kernels` is installed.
    """

    version: Version = Version.v2
    provides: ClassVar[tuple[str, ...]] = ("attention.flash",)
    needs: ClassVar[Mapping[str, Rule]] = {
        "target.cuda": Rule(
            code="flash-cuda",
            why="the kernels are written for NVIDIA GPUs",
            hint="attention=sdpa, or a target with CUDA: engine list target",
            source="transformers, modeling_flash_attention_utils.py",
            seen=SEEN,
        ),
        "model.flash": Rule(
            code="flash-model",
            why="transformers has not wired its code to the kernels",
            hint="attention=native",
            source="transformers, _supports_flash_attn of the model's class",
            seen=SEEN,
        ),
    }

    @property
    def excludes(self) -> Mapping[str, Rule]:
        """Name what older kernels would leave out without a word."""
        return {} if self.version is Version.v4 else {"model.sinks": SINKS}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse number formats, heads and GPUs that the kernels do not take."""
        shape, version = context.shape, self.version.value

        def problem(code: str, message: str, hint: str) -> Problem:
            message = f"attention=flash {message}"
            return Problem(slot="attention", code=code, message=message, hint=hint)

        if context.dtype in ("float32", "float64"):
            yield problem(
                "flash-dtype",
                f"computes in float16 or bfloat16, and the model is to run in {context.dtype}",
                "model.dtype=bfloat16, or attention=sdpa",
            )
        if shape is not None and shape.head_dim > LARGEST_HEAD:
            yield problem(
                "flash-head-dim",
                f"takes heads of up to {LARGEST_HEAD} numbers, and {shape.model_type} has "
                f"{shape.head_dim}",
                "attention=sdpa",
            )
        capability = context.target.capability or ""
        major = capability.partition(".")[0]
        if major.isdigit() and int(major) < LEAST[version]:
            yield problem(
                "flash-capability",
                f"version {version} runs on compute capability {LEAST[version]}.0 and newer, and "
                f"{context.target.name} has {capability}",
                "attention=sdpa" if version == 2 else "attention.version=v2",
            )
        # Where no GPU is, `target.cuda` says all; where one is, the kernels must be here.
        packages = (PACKAGES[version], "kernels")
        if detect().kind == "cuda" and not any(map(_installed, packages)):
            yield problem(
                "flash-package",
                f"version {version} needs the package {packages[0]}, which is not installed",
                f"pip install {packages[0]} --no-build-isolation, or attention=sdpa",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a fused kernel."""
        yield from costs.fused(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name transformers' implementation, which brings its own masks."""
        return Attention(implementation=f"flash_attention_{self.version.value}")

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the kernels that ran in the probe, and that no other attention did."""
        operators = session.probe.operators
        flash = {
            name: n for name, n in operators.items() if "flash" in name and "aten::" not in name
        }
        others = session.probe.calls("scaled_dot_product", "::_softmax", "::_safe_softmax")
        implementation = str(session.model.config._attn_implementation)
        yield Receipt(
            slot="attention",
            claim="attention is computed by the flash kernels",
            evidence={
                "implementation": implementation,
                "kernels": ", ".join(sorted(flash)) or "not visible to torch's dispatcher",
                "calls": sum(flash.values()),
                "calls of other attention": others,
            },
            ok="flash" in implementation and others == 0,
        )


def _installed(name: str) -> bool:
    """Tell whether a distribution is installed, without importing it."""
    return any(True for _ in distributions(name=name))

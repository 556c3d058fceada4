"""attention=sdpa: torch's fused scaled dot product attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.contexts import (
    Attention,
    AttentionContext,
    CheckContext,
    EstimateContext,
    PrepareContext,
    Receipt,
    Term,
)
from engine.errors import Problem, RuntimeFailure
from engine.rules import Rule
from engine.shape import WITHOUT_ATTENTION

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.session import Session

LARGEST_HEAD = 256
"""Numbers per head that CUDA's flash kernel takes."""
TORCH = "pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp"
SEEN = "torch 2.13.0, 2026-11-22"


class Kernel(Enum):
    """What computes it; `auto` lets torch choose for each call."""

    auto = "auto"
    flash = "FLASH_ATTENTION"
    efficient = "EFFICIENT_ATTENTION"
    cudnn = "CUDNN_ATTENTION"
    math = "MATH"


@dataclass
class Sdpa:
    """Compute attention with `torch.nn.functional.scaled_dot_product_attention`.

    Torch picks the kernel: flash attention (Dao et al. 2022, arXiv 2205.14135) where it can, so
    the scores never are in memory; its 'math' fallback, in plain operators, where it cannot.
    `kernel` allows one only. On CUDA, flash takes no mask, so passes that need one (padding, a
    static cache, biases) fall to the memory-efficient kernel (Rabe and Staats 2021, arXiv
    2112.05682). Key/value heads are shared without copies, but for masked passes of several tokens.
    """

    kernel: Kernel = Kernel.auto
    provides: ClassVar[tuple[str, ...]] = ("attention.bias", "attention.rotation")

    @property
    def needs(self) -> Mapping[str, Rule]:
        """Name what the kernel runs on."""
        if self.kernel not in (Kernel.efficient, Kernel.cudnn):
            return {}
        rule = Rule(
            code="sdpa-kernel-cuda",
            why=f"torch has its {self.kernel.name} kernel for NVIDIA GPUs only",
            hint="attention.kernel=auto",
            source="torch.nn.attention.SDPBackend",
            seen=SEEN,
        )
        return {"target.cuda": rule}

    @property
    def excludes(self) -> Mapping[str, Rule]:
        """Name where the kernel cannot run."""
        found = {}
        if self.kernel is Kernel.flash:
            found["model.latent_kv"] = Rule(
                code="sdpa-flash-latent",
                why="the flash kernel wants values as wide as keys, and those of latent attention "
                "are not",
                hint="attention.kernel=auto",
                source=TORCH,
                seen=SEEN,
            )
        if self.kernel is not Kernel.auto:
            found["target.mps"] = Rule(
                code="sdpa-kernel-mps",
                why="torch has a single kernel for Apple's GPUs, and nothing to choose from",
                hint="attention.kernel=auto",
                source="torch.nn.attention.SDPBackend",
                seen=SEEN,
            )
        return found

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models that transformers has no SDPA for, and kernels that cannot run them."""
        shape = context.shape
        if shape is not None and "model.sdpa" not in shape.traits:
            why = (
                "it caps attention scores, which torch's SDPA cannot"
                if "model.softcap" in shape.traits
                else "transformers computes its attention in plain torch only"
            )
            yield Problem(
                slot="attention",
                code="attention-unsupported",
                message=f"attention=sdpa does not run {shape.model_type}: {why}",
                hint="attention=eager",
            )
        elif shape is not None and context.reshaped and "target.cuda" in context.traits:
            for code, why in self._beyond(context):
                yield Problem(
                    slot="attention",
                    code=code,
                    message=f"attention.kernel={self.kernel.name} does not run "
                    f"{shape.model_type} on {context.target.name}: {why}",
                    hint="attention.kernel=auto",
                    source=f"{TORCH} ({SEEN})",
                )

    def _beyond(self, context: CheckContext) -> Iterator[tuple[str, str]]:
        """Yield the limits of CUDA's kernels that a model is beyond."""
        shape: Any = context.reshaped
        if self.kernel in (Kernel.flash, Kernel.cudnn):
            if context.dtype in ("float32", "float64"):
                why = f"it computes in float16 and bfloat16, not in {context.dtype}"
                yield "sdpa-kernel-dtype", why
            if "target.bfloat16" not in context.traits:
                yield "sdpa-kernel-capability", "it needs compute capability 8.0"
        if self.kernel is Kernel.flash and shape.head_dim > LARGEST_HEAD:
            yield "sdpa-kernel-head-dim", f"heads of {shape.head_dim} numbers; {LARGEST_HEAD} fit"
        if self.kernel is Kernel.efficient and shape.kv_heads < shape.heads:
            yield "sdpa-kernel-gqa", "it shares no key/value heads among query heads"

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a fused kernel, or the fallback."""
        if self.kernel is Kernel.math:
            yield from costs.written_out(context)
        else:
            yield from costs.fused(context)
            yield from costs.biases(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Name transformers' implementation, which brings its own masks."""
        return Attention(implementation="sdpa")

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel | None:
        """Allow one kernel only, while the model runs."""
        if self.kernel is Kernel.auto:
            return None
        _restrict(context.model, self.kernel)
        return context.model

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Name the kernels that ran in the probe, and count them against the layers."""
        operators = session.probe.operators
        kernels = {name: count for name, count in operators.items() if "scaled_dot_product" in name}
        # Torch's fallback shows as _safe_softmax, an operator that nothing but SDPA calls.
        fallback = operators["aten::_safe_softmax"]
        calls = sum(kernels.values()) + (
            0 if "aten::scaled_dot_product_attention" in kernels else fallback
        )
        layers = sum(kind not in WITHOUT_ATTENTION for kind in session.shape.layer_types)
        implementation = str(session.model.config._attn_implementation)
        allowed = self._allowed(kernels, fallback)
        yield Receipt(
            slot="attention",
            claim="every layer's attention is one fused operator"
            if self.kernel is not Kernel.math
            else "every layer's attention is SDPA's fallback in plain operators",
            evidence={
                "implementation": implementation,
                "kernels": ", ".join(sorted(kernels)) or "math fallback",
                "calls": calls,
                "calls of the math fallback": fallback,
                "layers": layers,
                "forward passes": len(session.probe.tokens),
                **(_heads_given(session, self.kernel) if allowed else {}),
            },
            # With a position bias it goes by a name of the session's own.
            ok=(implementation == "sdpa" or session.built["attention"].forward is not None)
            and allowed
            and calls >= layers * len(session.probe.tokens) > 0,
        )

    def _allowed(self, kernels: Mapping[str, int], fallback: int) -> bool:
        """Tell whether nothing ran but what the option allows."""
        if self.kernel is Kernel.auto:
            return True
        if self.kernel is Kernel.math:
            return not kernels and fallback > 0
        names = {"flash": ("flash", "efficient")}.get(self.kernel.name, (self.kernel.name,))
        return not fallback and all(any(part in name for part in names) for name in kernels)


def _only(kernel: Kernel, device: torch.device) -> AbstractContextManager[None]:
    """Allow one kernel of SDPA, for as long as the context lasts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if kernel is Kernel.auto:
        return nullcontext()
    backends = [getattr(SDPBackend, kernel.value)]
    if kernel is Kernel.flash and device.type == "cuda":
        backends.append(SDPBackend.EFFICIENT_ATTENTION)
    return sdpa_kernel(backends)


def _restrict(model: PreTrainedModel, kernel: Kernel) -> None:
    """Let a model's passes use one kernel of SDPA."""
    forward: Any = model.forward

    @functools.wraps(forward)
    def restricted(*args: Any, **kwargs: Any) -> Any:
        try:
            with _only(kernel, model.device):
                return forward(*args, **kwargs)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise RuntimeFailure(
                f"attention.kernel={kernel.name} cannot compute this pass: torch says, {error}",
                hint="attention.kernel=auto",
            ) from error

    model.forward = restricted


def _heads_given(session: Session, kernel: Kernel) -> dict[str, str]:
    """Say how many key/value heads the kernels get, by a call of the first layer's own sharing.

    Nothing where every query head has its own, or no fused kernel runs.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, device = session.model, session.device
    layers = (m for m in model.modules() if getattr(m, "num_key_value_groups", 1) > 1)
    layer: Any = next(layers, None)
    text = model.config.get_text_config()
    if layer is None or getattr(layer, "head_dim", None) is None:
        return {}
    shared, given = int(layer.num_key_value_groups), list[int]()
    heads = text.num_attention_heads

    class Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in func._schema.name:
                given.append(int(args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    def made(count: int) -> torch.Tensor:
        return torch.zeros(1, count, 2, layer.head_dim, dtype=model.dtype, device=device)

    key = made(heads // shared)
    masks = (None, torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device))
    with torch.no_grad(), _only(kernel, device), Look():  # type: ignore[no-untyped-call]
        for mask in masks:
            sdpa_attention_forward(layer, made(heads), key, key, mask)
    names = ("key/value heads given to the kernel", "under a mask of several queries")
    return {name: f"{got} of {heads}" for name, got in zip(names, given, strict=False)}

"""What the choices of `quantize` share: which layers they pack, what that costs, what took effect.

Layers are packed or left alone by their full names, which each library is told. By patterns they
would differ: torchao matches names of weights, the others names of modules.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING, Any, cast

from engine.contexts import CheckContext, EstimateContext, Receipt, Term
from engine.errors import Problem, RecipeError
from engine.quantizing.layers import Place, source

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from engine.session import Session
    from engine.shape import ModelShape, TensorSize

FLOATS = ("F64", "F32", "F16", "BF16")
RELICS = re.compile(r"\.attn(\.attention)?\.bias$|\.masked_bias$|rotary_emb\.inv_freq$")
"""Buffers in old checkpoints that models compute by themselves."""

UNQUANTIZED = re.compile(r"embed|\.wte\.|\.wpe\.|lm_head|output_layer|experts|norm|ln_|vision")
"""What is no linear layer, or the last one, in models whose code is not known."""

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that tell, when a library is imported, of kernels that nobody asked for."""

Refuse = Callable[[str, str, str], Problem]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a module is meant: by its name, its beginning or end, or an expression for it.

    As `should_convert_module` of transformers does, which cannot be imported in time.
    """
    ends = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){ends}", name) or name.endswith(p) for p in patterns)


# Before anything loads.


def refusals(
    context: CheckContext,
    *,
    choice: str,
    library: str,
    extra: str,
    kinds: Collection[str],
    skip: Sequence[str],
) -> Iterator[Problem]:
    """Refuse a missing library, quantizing twice, having nothing to pack, and idle patterns.

    Args:
        library: the module that must be there.
        kinds: classes of layers that are packed.
        skip: patterns of layers to leave alone.
    """

    def problem(code: str, message: str, hint: str) -> Problem:
        return Problem(slot="quantize", code=code, message=message, hint=hint)

    if find_spec(library) is None:
        message = f"quantize={choice} needs {library}, which is not installed"
        yield problem("not-installed", message, f'pip install "recipe-engine[{extra}]"')
    broken = [pattern for pattern in skip if not _is_expression(pattern)]
    for pattern in broken:
        message = f"quantize.skip_modules: {pattern!r} is no regular expression"
        yield problem("value", message, "a name, the end of a name, or an expression such as h.0.*")
    shape = context.shape
    if shape is None:
        return
    if shape.quantization:
        message = f"the checkpoint is quantized already ({shape.quantization})"
        yield problem("checkpoint-quantized", message, "quantize=none")
        return
    there = source(shape.model_type).kinds
    if there and not there & set(kinds):
        yield nothing_to_pack(choice, shape.model_type, there)
    elif not broken:
        yield from _idle_patterns(shape, kinds, skip, problem)


def nothing_to_pack(choice: str, model_type: str, there: Collection[str]) -> Problem:
    """Refuse a model whose layers are of kinds that the library does not pack."""
    return Problem(
        slot="quantize",
        code="nothing-to-pack",
        message=f"quantize={choice} finds nothing to pack in {model_type}: its layers are "
        f"{', '.join(sorted(there)) or 'all left alone'}",
        hint="quantize=none, or another: engine list quantize",
    )


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


def _idle_patterns(
    shape: ModelShape, kinds: Collection[str], skip: Sequence[str], problem: Refuse
) -> Iterator[Problem]:
    """Refuse patterns that match no layer, where all names are known; the build tells otherwise."""
    places = [source(shape.model_type).place(name) for name in shape.tensors]
    linear = [place for place in places if place and place.linear]
    if not linear or not all(place.exact for place in linear):
        return
    names = sorted({place.module for place in linear if place.kind in kinds})
    for pattern in skip:
        if not any(matches(name, [pattern]) for name in names):
            yield problem("matches-nothing", *_no_match(pattern, shape.model_type, names))


def _no_match(pattern: str, model_type: str, names: Sequence[str]) -> tuple[str, str]:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"quantize.skip_modules: no linear layer of {model_type} matches {pattern}",
        f"their names end in: {', '.join(ends)}; the first is {names[0]}",
    )


# What it costs.


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the checkpoint, as it will be in memory before it is packed."""

    name: str
    shape: tuple[int, ...]
    value_bytes: int
    place: Place | None

    @property
    def rows(self) -> int:
        """Return the outputs of a linear layer."""
        return self.shape[1 if self.place and self.place.kind == "Conv1D" else 0]

    @property
    def columns(self) -> int:
        """Return the inputs of a linear layer."""
        return self.shape[0 if self.place and self.place.kind == "Conv1D" else 1]


Packed = Callable[[int, int, int], tuple[int, int]]
"""(rows, columns, bytes of a plain value) → bytes of the codes, and of all scales beside them."""


def terms(
    context: EstimateContext,
    pack: Packed,
    *,
    kinds: Collection[str],
    skip: Sequence[str],
    bias_bytes: int | None = None,
) -> Iterator[Term]:
    """Price every tensor where the checkpoint's are known: the weights, and the scales apart.

    Args:
        bias_bytes: what a number in a bias of a packed layer takes, where a library casts it.
    """
    if not context.shape.tensors:
        return
    weights, scales = 0, 0
    for weight in in_memory(context):
        numbers = prod(weight.shape)
        packed = _is_packed(context.shape.model_type, weight, kinds, skip)
        if packed and len(weight.shape) == 2:
            codes, beside = pack(weight.rows, weight.columns, weight.value_bytes)
            weights, scales = weights + codes, scales + beside
        elif packed and bias_bytes and weight.name.endswith(".bias"):
            weights += numbers * bias_bytes
        else:
            weights += numbers * weight.value_bytes
    yield Term(name="weights", bytes=weights)
    yield Term(name="scales", bytes=scales)


def in_memory(context: EstimateContext) -> Iterator[Weight]:
    """Yield the checkpoint's tensors as the model will hold them.

    Without what it ignores and the second of two tied ones, with pooled heads, in its number
    format.
    """
    shape = context.shape
    pooling = _pooling(shape)
    for name, tensor, place in _read(shape):
        sizes = tensor.shape
        if pooling > 1 and _is_key_or_value(name):
            sizes = (sizes[0] // pooling, *sizes[1:])
        size = _value_bytes(context, name, tensor.dtype, tensor.nbytes // (prod(sizes) or 1))
        yield Weight(name=name, shape=tuple(sizes), value_bytes=size, place=place)


def to_pack(
    shape: ModelShape, *, kinds: Collection[str], skip: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return the layers that will be packed, each with its rows and columns, as far as known."""
    found = {}
    for name, tensor, place in _read(shape):
        weight = Weight(name=name, shape=tuple(tensor.shape), value_bytes=0, place=place)
        if len(weight.shape) == 2 and _is_packed(shape.model_type, weight, kinds, skip):
            module = place.module if place else name.removesuffix(".weight")
            found[module] = (weight.rows, weight.columns)
    return found


def _read(shape: ModelShape) -> Iterator[tuple[str, TensorSize, Place | None]]:
    """Yield the tensors of the checkpoint that the model reads, and where they belong."""
    code = source(shape.model_type)
    ignored = [re.compile(each) for each in code.listed("_keys_to_ignore_on_load_unexpected")]
    for name, tensor in shape.tensors.items():
        place = code.place(name)
        beyond = place is None or not place.exact or _layer(name) >= shape.layers
        if RELICS.search(name) or (beyond and any(each.search(name) for each in ignored)):
            continue
        if not (shape.tied and place and place.head):
            yield name, tensor, place


def _is_packed(
    model_type: str, weight: Weight, kinds: Collection[str], skip: Sequence[str]
) -> bool:
    place = weight.place
    if not source(model_type).classes:  # the code comes with the checkpoint, or is not known
        plain = weight.name.endswith(".weight") and not UNQUANTIZED.search(weight.name)
        return plain and not matches(weight.name.removesuffix(".weight"), skip)
    if place is None or place.head or place.kind not in kinds:
        return False
    kept = source(model_type).listed("_keep_in_fp32_modules")
    return not matches(place.module, [*skip, *kept])


def _value_bytes(context: EstimateContext, name: str, stored: str, stored_bytes: int) -> int:
    """Return the bytes of a number: of the model's format, or of what its class keeps in float32.

    Integers, and all of a checkpoint that comes quantized, stay as they are stored.
    """
    if stored not in FLOATS or context.shape.quantization:
        return stored_bytes
    size, code = context.value_bytes, source(context.shape.model_type)
    strict = code.listed("_keep_in_fp32_modules_strict")
    if context.dtype == "float16":
        strict |= code.listed("_keep_in_fp32_modules")
    if size == 2 and any(re.search(each.replace("*", ".*"), name) for each in strict):
        return 4
    return size


def _layer(name: str) -> int:
    """Return which layer a tensor is of; -1 for none."""
    return int(next((part for part in name.split(".") if part.isdigit()), -1))


def _is_key_or_value(name: str) -> bool:
    return bool(re.search(r"\.[kv]_proj\.(weight|bias)$", name)) and "vision" not in name


def _pooling(shape: ModelShape) -> int:
    """Return how many key/value heads of the checkpoint become one."""
    rows = [tensor.shape[0] for name, tensor in shape.tensors.items() if _is_key_or_value(name)]
    kept = shape.kv_heads * shape.head_dim
    return min(rows) // kept if rows and kept and min(rows) % kept == 0 else 1


# Building.


def left_alone(
    config: PretrainedConfig, choice: str, *, kinds: Collection[str], skip: Sequence[str]
) -> list[str]:
    """Return the full names of all layers that are not to be packed.

    These are the head, what transformers never packs, layers of other kinds than the library can
    do, and those that `skip` names. Raises RecipeError where nothing remains, or a pattern matches
    nothing.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    # A config class that came with the checkpoint was allowed by the recipe, and so is its model.
    trusted = type(config).__module__.startswith("transformers_modules.")
    with torch.device("meta"):
        model = cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=trusted)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    able = [name for name, module in linear.items() if type(module).__name__ in kinds]
    for pattern in skip:
        if able and not any(matches(name, [pattern]) for name in able):
            message, hint = _no_match(pattern, config.model_type, able)
            problem = Problem(slot="quantize", code="matches-nothing", message=message, hint=hint)
            raise RecipeError(problem)
    usual: Any = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    left = [name for name in linear if name not in able or matches(name, [*usual, *skip])]
    if len(left) == len(linear):
        there = {type(linear[name]).__name__ for name in left if not matches(name, usual)}
        raise RecipeError(nothing_to_pack(choice, config.model_type, there - set(kinds)))
    return sorted({*usual, *left})


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from telling of kernels that they miss while they are imported."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def register(
    config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer], name: str
) -> Callable[[], None]:
    """Have transformers use a quantizer of one's own, and return what takes that back.

    Call that in `Quantization.finish`; after a failed load the next build replaces what is left.

    Args:
        name: the config's `quant_method`, which no library may have taken.

    Raises:
        ValueError: when another quantizer has the name.
    """
    from transformers.quantizers import auto

    mappings: tuple[dict[str, Any], ...] = (
        cast(Any, auto).AUTO_QUANTIZATION_CONFIG_MAPPING,
        cast(Any, auto).AUTO_QUANTIZER_MAPPING,
    )
    for mapping, ours in zip(mappings, (config, quantizer), strict=True):
        if mapping.get(name, ours) is not ours:
            raise ValueError(f"{mapping[name].__name__} has the quant_method {name} already")
        mapping[name] = ours

    def forget() -> None:
        for mapping in mappings:
            mapping.pop(name, None)

    return forget


# Proof.


def receipt(
    session: Session,
    *,
    claim: str,
    packed: Mapping[str, Any],
    parts: Callable[[Any], Iterable[torch.Tensor]],
    plain: Callable[[Any], torch.Tensor],
    operators: Callable[[str], bool],
    left: Collection[str],
    bits: int,
    tolerance: float,
    more: Mapping[str, str | int | float | bool] | None = None,
    holds: bool = True,
) -> Receipt:
    """Count packed layers and their real bytes, and the operators that used them.

    Args:
        packed: layers by name.
        parts: all tensors that stand for the weight of one, scales included.
        plain: gives `[rows, columns]`, the values that the weight of one stands for.
        operators: tells those that work on packed weights from others.
        left: names of layers, and ends of names, that were to be left alone.
        bits: what a weight should take, scales apart.
        tolerance: how far a layer's answer may be from that with plain values, of its size.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = {n: m for n, m in session.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    forgotten = [name for name in linear if name not in packed and not matches(name, left)]
    size = sum(part.nbytes for module in packed.values() for part in parts(module))
    weights = sum(module.in_features * module.out_features for module in packed.values())
    ran = {n: c for n, c in session.probe.operators.items() if operators(n)}
    error = _error(packed.values(), plain, session.model.dtype) if packed else 1.0
    evidence: dict[str, str | int | float | bool] = {
        "layers packed": len(packed),
        "linear layers": len(linear),
        "neither packed nor to be left alone": len(forgotten),
        "classes": ", ".join(sorted({_class(module) for module in packed.values()})),
        "bytes before": weights * session.model.dtype.itemsize,
        "bytes after": size,
        "bits per weight": round(8 * size / weights, 3) if weights else 0.0,
        "operators": ", ".join(f"{name}: {count}" for name, count in sorted(ran.items())),
        "error of a layer against its unpacked weight": float(f"{error:.2g}"),
    }
    if experts := _fused_experts(session.model):
        evidence["bytes of fused experts, which stay as they are"] = experts
    return Receipt(
        slot="quantize",
        claim=claim,
        evidence=evidence | dict(more or {}),
        ok=holds
        and bool(packed)
        and not forgotten
        and error <= tolerance
        and bits <= 8 * size / weights < 2 * bits,
    )


def _error(
    modules: Iterable[Any], plain: Callable[[Any], torch.Tensor], dtype: torch.dtype
) -> float:
    """Return how far the smallest layer's answer is from that of the values it stands for."""
    import torch

    module = min(modules, key=lambda each: each.in_features * each.out_features)
    inputs = torch.arange(4 * module.in_features, device=module.weight.device).sin()
    inputs = inputs.view(4, -1).to(dtype)
    with torch.no_grad():
        expected = inputs.float() @ plain(module).float().T
        found = module(inputs).float() - (0.0 if module.bias is None else module.bias.float())
    return float((found - expected).norm() / expected.norm())


def _class(module: Any) -> str:
    import torch

    kind, tensor = type(module).__name__, type(module.weight.data)
    return kind if tensor is torch.Tensor else f"{kind} of {tensor.__name__}"


def _fused_experts(model: PreTrainedModel) -> int:
    """Return the bytes of experts that are one tensor together, which no library here packs."""
    return sum(
        tensor.nbytes
        for name, tensor in model.named_parameters()
        if tensor.dim() == 3 and ".experts." in name
    )

"""What the choices of `quantize` share: which layers they pack, and which they leave alone.

Layers are packed or left alone by their full names, which each library is told. By patterns they
would differ: torchao matches names of weights, the others names of modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from engine.contexts import CheckContext
from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

Refuse = Callable[[str, str, str], Problem]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a module is meant: by its name, its beginning or end, or an expression for it.

    As `should_convert_module` of transformers does, which cannot be imported in time.
    """
    ends = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){ends}", name) or name.endswith(p) for p in patterns)


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
    linear = [weight for weight in shape.weights if weight.matrix and not weight.head]
    there = {weight.kind for weight in linear if shape.blueprint}
    if there and not there & set(kinds):
        yield nothing_to_pack(choice, shape.model_type, there)
    elif there and not broken:
        names = sorted({weight.module for weight in linear if weight.kind in kinds})
        yield from _idle_patterns(choice, shape.model_type, names, skip, problem)


def nothing_to_pack(choice: str, model_type: str, there: Collection[str]) -> Problem:
    """Refuse a model whose layers are of kinds that the library does not pack."""
    return Problem(
        slot="quantize",
        code="nothing-to-pack",
        message=f"quantize={choice} finds nothing to pack in {model_type}: its layers are "
        f"{', '.join(sorted(there)) or 'all left alone'}",
        hint="quantize=none, or another: engine list quantize"
        if there
        else "quantize=none, or fewer of quantize.skip_modules",
    )


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


def _idle_patterns(
    choice: str, model_type: str, names: Sequence[str], skip: Sequence[str], problem: Refuse
) -> Iterator[Problem]:
    """Refuse patterns that match none of the layers, or together all of them."""
    for pattern in skip:
        if not any(matches(name, [pattern]) for name in names):
            yield problem("matches-nothing", *_no_match(pattern, model_type, names))
    if all(matches(name, skip) for name in names):
        yield nothing_to_pack(choice, model_type, ())


def _no_match(pattern: str, model_type: str, names: Sequence[str]) -> tuple[str, str]:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"quantize.skip_modules: no linear layer of {model_type} matches {pattern}",
        f"their names end in: {', '.join(ends)}; the first is {names[0]}",
    )


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

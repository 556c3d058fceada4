"""What the choices share that change rotary positions: judge a config, edit it, measure the model.

Judging works on what config.json says, without torch, and editing judges once more by the same
rules: what `check` lets pass is built, and what it refuses is not.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.contexts import Receipt
from engine.errors import Problem, RecipeError
from engine.families import family
from engine.shape import LONGEST, WINDOWED, ModelShape, read_shape

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.session import Session

SLOT = "position_encoding"

Parameters = Mapping[str, Any]

UNROTATED = "engine_unrotated"
"""The rope type of ours, for models whose queries and keys are rotated outside of their code; its
name holds none of those that transformers treats otherwise."""
FORMER = "rope_type_of_the_checkpoint"

SOURCE = "https://github.com/huggingface/transformers, src/transformers/modeling_rope_utils.py"


def by_label(given: Parameters) -> dict[str, Parameters | None]:
    """Return the parameters per type of layer; under '' where there is one set for all.

    None stands for layers without positions.
    """
    if any(isinstance(value, Mapping) for value in given.values()):
        return {
            label: value
            for label, value in given.items()
            if value is None or isinstance(value, Mapping)
        }
    return {"": given}


def kind_of(parameters: Parameters) -> str:
    """Return how rotary positions are scaled: 'linear', 'yarn', …; 'default' for not at all."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def far_sighted(given: Parameters) -> dict[str, Parameters]:
    """Return the parameters of those layers that see the whole context, by label.

    Layers with a window see too little to need more than they were trained with.
    """
    return {
        label: parameters
        for label, parameters in by_label(given).items()
        if parameters is not None and label not in WINDOWED
    }


def refusals(choice: str, kind: str, shape: ModelShape) -> Iterator[Problem]:
    """Yield why the rotary positions of a model cannot become of another kind."""
    name, given = shape.model_type, shape.rope_parameters
    code = _config_code(name)
    there = far_sighted(given)
    scaled = sorted({kind_of(each) for each in there.values()} - {"default"})
    accepted = _accepted(code)
    why = ""
    if shape.position != "rope":
        why = f"it scales rotary positions, and {name} has {shape.position} positions"
    elif "model.rope" not in shape.traits:
        why = f"the code of {name} computes its rotary positions by no rope_parameters"
    elif not there:
        why = f"those layers of {name} that see the whole context have no positions"
    elif [*there] == ["full_attention"] and "full_attention" not in shape.layer_types:
        why = f"all layers of {name} have a window, and see no further than they were trained to"
    elif scaled:
        why = f"the checkpoint already scales its positions ({', '.join(scaled)}), "
        why += "and was trained so"
    elif accepted and kind not in accepted:
        why = f"transformers accepts only {', '.join(accepted)} for {name}"
    elif "short_mscale" in code:
        why = f"the config of {name} asks for a short_mscale and a long_mscale with any kind"
    elif kind == "longrope" and "per_layer_config" in code:
        why = f"transformers counts the factors by one head size for all layers of {name}"
    elif there == {"": {}} and _must_be_stated(code):
        why = f"the config of {name} must state rope_parameters for each type of layer"
    elif shape.max_positions is None:
        why = f"the config of {name} states no context that could be made longer"
    if why:
        yield _refusal(choice, why)


def slowest(shape: ModelShape) -> float | None:
    """Return the tokens in which the slowest frequency turns once; None where it is not known."""
    there = [*far_sighted(shape.rope_parameters).values()]
    if not there or not shape.rotary_dim:
        return None
    usual = re.search(r"\bdefault_theta = ([\d._]+)", _config_code(shape.model_type))
    theta = there[0].get("rope_theta") or float(usual[1] if usual else 10_000)
    power: float = theta ** ((shape.rotary_dim - 2) / shape.rotary_dim)
    return 2 * math.pi * power


def stretch(factor: float, usual: str) -> tuple[str, bool, str, str]:
    """Return the rule for an option `factor`, for `outside`."""
    why = "must be a number above 1, or nothing is stretched"
    return ("factor", 1 < factor < math.inf, why, usual)


def outside(plugin: object, *rules: tuple[str, bool, str, str]) -> Iterator[Problem]:
    """Yield a problem for each option at fault: (name, whether it is fine, why not, a fine one)."""
    for name, fine, why, hint in rules:
        if not fine:
            yield Problem(
                slot=SLOT,
                code="value",
                message=f"{SLOT}.{name}={getattr(plugin, name)} {why}",
                hint=f"{SLOT}.{name}={hint}",
            )


def longer(shape: ModelShape, factor: float, original: int | None = None) -> ModelShape | None:
    """Return the shape with a context of `factor` times the original."""
    original = original or shape.max_positions
    if original is None or original < 1 or not 1 < factor < math.inf:
        return None
    return replace(shape, max_positions=int(original * factor))


def context_of(config: PretrainedConfig) -> int:
    """Return the context that a config states, stretched as it says; 0 where it states none."""
    return read_shape(config.to_dict()).max_positions or 0


def edited(
    choice: str,
    config: PretrainedConfig,
    parameters: Parameters,
    *,
    max_positions: int | None = None,
    original: int | None = None,
) -> PretrainedConfig:
    """Return a copy whose layers with full attention have these rotary parameters.

    Args:
        parameters: with their rope_type; what else was there, as rope_theta, stays.
        max_positions: the context from now on; None leaves it.
        original: the context that was trained, where the kind asks for it.

    Raises:
        RecipeError: where the model cannot be scaled so.
    """
    kind = str(parameters["rope_type"])
    shape = read_shape(config.to_dict())
    if found := list(refusals(choice, kind, shape)):
        raise RecipeError(found)
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    given = text.rope_parameters
    if shape.max_positions != shape.stated_positions:
        # Command R and others say elsewhere how far they were trained: formulas read it here.
        text.max_position_embeddings = shape.max_positions
        for name in {*LONGEST} & vars(text).keys():
            delattr(text, name)
    if getattr(text, "head_dim", 0) is None:
        # Mixtral and others: some kinds read it, and do not make it up as the model does.
        text.head_dim = text.hidden_size // text.num_attention_heads
    told = dict(parameters)
    if original is not None:
        told["original_max_position_embeddings"] = original
        if hasattr(text, "original_max_position_embeddings"):
            # Phi-3 keeps it here as well, and this one wins.
            text.original_max_position_embeddings = original
    new = {label: {**old, **told} for label, old in far_sighted(given).items()}
    text.rope_parameters = new.get("", {**given, **new})
    if max_positions is not None:
        text.max_position_embeddings = max_positions
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except (ValueError, KeyError, TypeError) as error:
        why = f"transformers refuses it for {text.model_type}: {error}"
        raise RecipeError(_refusal(choice, why)) from error
    return config


def _config_code(model_type: str) -> str:
    """Return the source of a config class; of its text part as well, where there are parts."""
    return family(model_type).config_code + family(f"{model_type}_text").config_code


def _accepted(config_code: str) -> list[str]:
    """Return what kinds a config class accepts, where it names them; Phi-3 and its kin do."""
    found = re.search(r"rope_parameters_type not in (\[[^\]]*\])", config_code)
    accepted: list[str] = ast.literal_eval(found[1]) if found else []
    return accepted


def _must_be_stated(config_code: str) -> bool:
    """Tell whether a config class makes up no rotary parameters where it is given none."""
    own = config_code.partition("def convert_rope_params_to_dict")[2].partition("\n    def ")[0]
    made_up = "super()" in own or 'rope_theta"' in own.replace('pop("rope_theta"', "")
    return bool(own) and not made_up


def _refusal(choice: str, why: str) -> Problem:
    return Problem(
        slot=SLOT,
        code="position-unsupported",
        message=f"{SLOT}={choice}: {why}",
        hint=f"{SLOT}=native",
    )


def unknown_kinds(shape: ModelShape) -> list[str]:
    """Return the kinds of scaling in config.json that neither transformers nor the model knows."""
    one = family(shape.model_type)
    code = f"{one.config_code}{one.model_code}"
    stated = [each for each in by_label(shape.rope_parameters).values() if each is not None]
    asked = {kind_of(each) for each in stated} - {"default", *kinds()}
    return sorted(kind for kind in asked if one.known and kinds() and f'"{kind}"' not in code)


@cache
def kinds() -> frozenset[str]:
    """Return the kinds of scaling that the installed transformers knows, read from its source."""
    with suppress(OSError, LookupError):
        spec = importlib.util.find_spec("transformers")
        folder = Path(next(iter((spec and spec.submodule_search_locations) or [""])))
        code = (folder / "modeling_rope_utils.py").read_text("utf-8")
        table = code.partition("ROPE_INIT_FUNCTIONS: ")[2].partition("\n}")[0]
        return frozenset(re.findall(r'^    "(\w+)":', table, re.MULTILINE))
    return frozenset()


@dataclass(frozen=True)
class Measured:
    """What the rotary embeddings of a model work with."""

    total: int
    """Inverse frequencies."""
    changed: int
    """Of them not as the checkpoint's config makes them."""
    scaling: float
    """What queries and keys are multiplied by; the largest, where there are several."""


def measure(model: PreTrainedModel, source: PretrainedConfig, tokens: int = 1) -> Measured:
    """Compare a model's frequencies with those that `source` makes, for so many tokens of text."""
    import torch

    decoder = cast(Any, model).get_decoder()
    found: list[Any] = [module for module in decoder.modules() if _frequencies(module)]
    changed = total = 0
    scalings = [] if found else [1.0]
    for rotary in found:
        _run(rotary, tokens)
        with torch.device("cpu"):
            fresh = _frequencies(type(rotary)(config=source))
        # Not bit by bit: a GPU's power function differs from a CPU's in the last place.
        for name, real in _frequencies(rotary).items():
            same = torch.isclose(real.cpu(), fresh[name], rtol=1e-5, atol=0)
            changed, total = changed + int((~same).sum()), total + same.numel()
        scalings += [
            float(value)
            for name, value in vars(rotary).items()
            if name.endswith("attention_scaling")
        ]
        _run(rotary, 1)
    return Measured(total=total, changed=changed, scaling=max(scalings))


def receipt(session: Session, claim: str, *, context: int | None = None) -> Receipt:
    """Show the frequencies, the scaling and the context that the model works with.

    Args:
        context: what it is from now on, where the model's config does not say so.
    """
    before = context_of(session.source_config)
    after = context or context_of(session.model.config)
    found = measure(session.model, session.source_config.get_text_config(), tokens=after)
    return Receipt(
        slot=SLOT,
        claim=claim,
        evidence={
            "inverse frequencies": found.total,
            "of them changed": found.changed,
            "attention scaling": found.scaling,
            "context before": before,
            "context after": after,
        },
        ok=found.changed > 0 and after > before,
    )


def _run(rotary: Any, tokens: int) -> None:
    """Let an embedding whose frequencies depend on the length compute those for `tokens` tokens."""
    import torch

    for label, kind in _scaled_by(rotary).items():
        if kind == "longrope" or "dynamic" in kind:
            device = next(iter(_frequencies(rotary).values())).device
            with torch.no_grad():
                rotary(
                    torch.zeros(1, device=device),
                    torch.tensor([[tokens - 1]], device=device),
                    **({"layer_type": label} if label else {}),
                )


def forget_lengths(model: PreTrainedModel) -> None:
    """Let each pass compute its own frequencies, where they depend on the length of the text.

    transformers keeps those of the longest text so far until one is shorter than the trained
    context, so that an answer would depend on what was asked before.
    """
    for module in model.modules():
        if any("dynamic" in kind for kind in _scaled_by(module).values()):
            module.register_forward_pre_hook(_forget)


def _forget(rotary: Any, inputs: Any) -> None:
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        setattr(rotary, name, 0)


def _scaled_by(module: Any) -> dict[str, str]:
    """Return how a rotary embedding scales, by type of layer; under '' where there is one kind."""
    kind = getattr(module, "rope_type", "")
    return dict(kind) if isinstance(kind, Mapping) else {"": kind}


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the inverse frequencies that a rotary embedding works with, by buffer."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }


def frequency_set(config: PretrainedConfig, tokens: int, *, of_pass: bool = False) -> int:
    """Tell rotary frequencies apart that change with the length of a text: equal, or not.

    Keys are rotated when they are written. Those of a shorter text do not fit a longer one whose
    frequencies are others (transformers' `dynamic_rope_update`). Keys that are cached unrotated fit
    any; but what a pass makes of its tokens depends on its frequencies still.

    Args:
        of_pass: tell apart those that a pass computes with, whether or not keys are cached rotated.
    """
    text: Any = config.get_text_config()
    found = 0
    for each in by_label(getattr(text, "rope_parameters", None) or {}).values():
        if each is None:
            continue
        kind = str((of_pass and each.get(FORMER)) or kind_of(each))
        if kind not in ("dynamic", "longrope"):
            continue
        usual = each.get("original_max_position_embeddings") or text.max_position_embeddings
        if tokens > usual:
            found += tokens if kind == "dynamic" else 1
    return found

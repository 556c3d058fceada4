"""Rotary positions taken out of a model, to be put back where its scores are made, or not at all.

Its keys are then cached unrotated, and may be turned to other positions, or by other frequencies,
later.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from engine.attending.scores import true_positions
from engine.errors import RecipeError
from engine.families import family
from engine.positions.rotary import FORMER, UNROTATED, far_sighted

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.shape import ModelShape

SIGNATURE = (
    r"def apply_rotary_pos_emb\(\s*q(: torch\.Tensor)?, k(: torch\.Tensor)?, "
    r"cos(: torch\.Tensor)?, sin(: torch\.Tensor)?, unsqueeze_dim"
)
CONDITIONAL = r"\n( +)if [^\n]*:\n(?:\1    [^\n]*\n){0,4}?\1    [^\n]*apply_rotary"
NORM_AFTER = (
    r"= apply_rotary_pos_emb\((?:(?!ALL_ATTENTION_FUNCTIONS|\n    def )[\s\S])*?"
    r"self\.\w*norm\w*\("
)
INDEXER = r"\nclass \w*Indexer\("
ATTENTION = r"\nclass \w*Attention\((?:(?!\nclass )[\s\S])*"
BY_TYPE = "full_attention"
"""The one type of layers that may rotate late while others do not: those with a window."""


def unsuitable(shape: ModelShape, *, by_type: bool = False) -> str:
    """Return why a model's queries and keys cannot be rotated outside of its code; '' if they can.

    Args:
        by_type: what rotates them can leave out layers with a window, which rotate otherwise.
    """
    code = family(shape.model_type).model_code
    nested = any(isinstance(kind, Mapping) for kind in shape.rope_parameters.values())
    if nested and not (by_type and [*far_sighted(shape.rope_parameters)] == [BY_TYPE]):
        return "its types of layers rotate differently"
    if shape.rope_type in ("dynamic", "longrope"):
        return f"its frequencies ({shape.rope_type}) change with the length of the text"
    if re.search(CONDITIONAL, code):
        return "not all of its layers rotate"
    if re.search(NORM_AFTER, code):
        return "it normalizes queries and keys after rotating them, so they cannot be turned later"
    if re.search(INDEXER, code):
        return "it rotates once more to pick the keys that attention sees"
    if not re.search(SIGNATURE, code):
        return "it rotates by code of its own kind"
    if any(map(_withholds_positions, re.findall(ATTENTION, code))):
        return "its code does not tell its attention the positions of the tokens"
    return ""


def _withholds_positions(attention: str) -> bool:
    """Tell whether a class takes positions by name, and does not pass them on to its attention."""
    taken = re.search(r"def forward\([^)]*\bposition_ids\b", attention)
    called = re.search(r"= attention_interface\([\s\S]*?\n        \)", attention)
    return bool(taken and called and "position_ids" not in called[0])


def unrotated(config: PretrainedConfig, label: str = "") -> PretrainedConfig:
    """Return a copy of a config whose model turns neither queries nor keys.

    Args:
        label: the type of layers that this is for, where others go on to rotate.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS[UNROTATED] = _no_frequencies
    made = copy.deepcopy(config)
    text = made.get_text_config()

    def still(kind: Mapping[str, Any]) -> dict[str, Any]:
        # DeepSeek's code asks every type but 'default' for its factor.
        former = kind.get("rope_type", "default")
        return {"factor": 1.0, **kind, "rope_type": UNROTATED, FORMER: former}

    text.rope_parameters = _each_kind(text.rope_parameters, still, label)
    return made


def still_turning(model: PreTrainedModel, label: str = "") -> int:
    """Return how many frequencies turn queries and keys in a built model's own code.

    Args:
        label: the type of layers to look at; all where it is ''.
    """
    buffers = model.named_buffers()
    frequencies = (each for name, each in buffers if re.search(rf"{label}\w*inv_freq$", name))
    return sum(int(each.count_nonzero()) for each in frequencies)


def number_tokens(model: PreTrainedModel) -> None:
    """Have a model number the tokens behind the padding from 0, where the decoder does not."""
    model.register_forward_pre_hook(_number, with_kwargs=True)


def rotary_embedding(config: PretrainedConfig) -> Any:
    """Return a rotary embedding of a model as its checkpoint has it, on the CPU."""
    import torch

    text = config.get_text_config()
    with torch.device("cpu"):
        return _embedding(text)(config=text)


def rotate(config: PretrainedConfig, rotary_dim: int) -> Callable[..., torch.Tensor]:
    """Return the function by which the model's code turns `[batch, heads, tokens, head_dim]`.

    It takes the states, and what the rotary embedding gives: cosines and sines. Of each head, the
    first `rotary_dim` numbers turn; the last ones in latent attention (DeepSeek).
    """
    import torch

    text = config.get_text_config()
    apply: Any = _code(text).apply_rotary_pos_emb
    at_the_end = getattr(text, "qk_rope_head_dim", None) is not None

    def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rest = states.shape[-1] - rotary_dim
        sizes = [rest, rotary_dim] if at_the_end else [rotary_dim, rest]
        parts = list(torch.split(states, sizes, dim=-1))
        moving = parts[at_the_end]
        # It turns two at a time: the second is empty here.
        parts[at_the_end], _ = apply(moving, moving[:, :0], cos, sin)
        return torch.cat(parts, dim=-1)

    return turn


def _each_kind(
    parameters: Mapping[str, Any],
    change: Callable[[Mapping[str, Any]], dict[str, Any]],
    label: str = "",
) -> dict[str, Any]:
    """Change rotary parameters: one mapping, or one for each type of layer, or that of `label`."""
    if not any(isinstance(kind, Mapping) for kind in parameters.values()):
        return change(parameters)
    return {
        name: change(kind) if isinstance(kind, Mapping) and label in ("", name) else kind
        for name, kind in parameters.items()
    }


def _no_frequencies(
    config: PretrainedConfig, device: Any = None, layer_type: str | None = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """Return as many zeros as the model would have frequencies, as a rope type of transformers."""
    former = copy.deepcopy(config)
    former.rope_parameters = _each_kind(
        former.rope_parameters,
        lambda kind: {**kind, "rope_type": kind.get(FORMER, kind.get("rope_type"))},
    )
    made = _embedding(former)(config=former)
    found: torch.Tensor = getattr(made, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    return found.new_zeros(found.shape, device=device or found.device), 1.0


def _number(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids: Any = args[0] if args else kwargs.get("input_ids")
    mask: Any = kwargs.get("attention_mask")
    if getattr(mask, "ndim", 0) != 2 or ids is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    return args, {**kwargs, "position_ids": true_positions(mask, ids.shape[1])}


def _code(text: PretrainedConfig) -> Any:
    """Return the module that holds the model's code."""
    return importlib.import_module(type(text).__module__.replace(".configuration_", ".modeling_"))


def _embedding(text: PretrainedConfig) -> Any:
    """Return the class of the language model's rotary embedding."""
    code = _code(text)
    found = [
        value
        for name, value in vars(code).items()
        if name.endswith("RotaryEmbedding")
        and not any(other in name for other in ("Vision", "Audio"))
        and getattr(value, "__module__", "") == code.__name__
    ]
    if len(found) != 1:
        raise RecipeError(
            f"{text.model_type} has {len(found)} kinds of rotary embeddings, and one is due",
            hint="position_encoding=native",
        )
    return found[0]

"""Rotary positions taken out of a model, to be put back where its scores are made, or not at all.

Its keys are then cached unrotated, and may be turned to other positions later.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

UNROTATED = "engine_unrotated"
"""The rope type of ours; its name holds none of those that transformers treats otherwise."""
FORMER = "rope_type_of_the_checkpoint"


def unrotated(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config whose model turns neither queries nor keys."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ROPE_INIT_FUNCTIONS[UNROTATED] = _no_frequencies
    made = copy.deepcopy(config)
    text = made.get_text_config()

    def still(kind: Mapping[str, Any]) -> dict[str, Any]:
        # DeepSeek's code asks every type but 'default' for its factor.
        former = kind.get("rope_type", "default")
        return {"factor": 1.0, **kind, "rope_type": UNROTATED, FORMER: former}

    text.rope_parameters = _each_kind(text.rope_parameters, still)
    return made


def still_turning(model: PreTrainedModel) -> int:
    """Return how many frequencies turn queries and keys in a built model's own code."""
    frequencies = (each for name, each in model.named_buffers() if name.endswith("inv_freq"))
    return sum(int(each.count_nonzero()) for each in frequencies)


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
    parameters: Mapping[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Change rotary parameters: one mapping, or one for each type of layer."""
    if not any(isinstance(kind, Mapping) for kind in parameters.values()):
        return change(parameters)
    return {
        name: change(kind) if isinstance(kind, Mapping) else kind
        for name, kind in parameters.items()
    }


def _no_frequencies(
    config: PretrainedConfig, device: Any = None, layer_type: str | None = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """Return as many zeros as the model would have frequencies, as a rope type of transformers."""
    former = copy.deepcopy(config)
    former.rope_parameters = _each_kind(
        former.rope_parameters, lambda kind: {**kind, "rope_type": kind[FORMER]}
    )
    made = _embedding(former)(config=former)
    found: torch.Tensor = getattr(made, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    return found.new_zeros(found.shape, device=device or found.device), 1.0


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

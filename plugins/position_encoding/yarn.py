"""position_encoding=yarn: a longer context for a model with rotary positions."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from engine import hookimpl
from engine.contexts import CheckContext, PositionContext, PositionEncoding, Receipt, ReshapeContext
from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.session import Session
    from engine.shape import ModelShape


@dataclass
class Yarn:
    """Stretch the rotary frequencies by parts: the slow ones by `factor`, the fast ones not.

    Peng et al. 2023, arXiv 2309.00071: frequencies in section 3.2 ("NTK-by-parts"), temperature of
    the scores in section 3.4. The context becomes `factor` times `original_max_position_embeddings`
    tokens (None: the model's own context). `attention_factor` scales queries and keys; None takes
    the paper's 0.1 ln(factor) + 1. A frequency that turns more than `beta_fast` times within the
    original context stays, one that turns less than `beta_slow` times is divided by `factor`.
    """

    factor: float = 4.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and values outside the paper's ranges."""
        shape = context.shape
        if shape is not None and "model.rope" not in shape.traits:
            yield Problem(
                slot="position_encoding",
                code="position-unsupported",
                message=f"position_encoding=yarn stretches rotary positions; {shape.model_type} "
                f"has {shape.position} positions",
                hint="position_encoding=native",
            )
        elif shape is not None:
            yield from _unsuitable(shape.model_type, shape.rope_type, shape.traits)
        for name, ok, why, hint in (
            ("factor", self.factor > 1, "must be more than 1, or nothing is stretched", "4"),
            ("beta_slow", self.beta_slow > 0, "must be more than 0", "1"),
            ("beta_fast", self.beta_fast > self.beta_slow, "must be more than beta_slow", "32"),
            ("attention_factor", (self.attention_factor or 1) > 0, "must be more than 0", "null"),
            (
                "original_max_position_embeddings",
                (self.original_max_position_embeddings or 1) > 0,
                "must be more than 0",
                "null",
            ),
        ):
            if not ok:
                yield Problem(
                    slot="position_encoding",
                    code="value",
                    message=f"position_encoding.{name}={getattr(self, name)} {why}",
                    hint=f"position_encoding.{name}={hint}",
                )

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        original = self.original_max_position_embeddings or context.shape.max_positions
        if original is None or self.factor <= 1:
            return None
        return replace(context.shape, max_positions=int(original * self.factor))

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters; layers with a sliding window see too little to need it."""
        config = copy.deepcopy(context.config)
        text = config.get_text_config()
        parameters = getattr(text, "rope_parameters", None)
        if not parameters:
            raise RecipeError(
                f"position_encoding=yarn: {text.model_type} has no rotary parameters",
                hint="position_encoding=native",
            )
        nested = "full_attention" in parameters
        old = parameters["full_attention"] if nested else parameters
        if found := list(_unsuitable(text.model_type, old.get("rope_type", "default"))):
            raise RecipeError(found)
        original = (
            self.original_max_position_embeddings
            or getattr(text, "original_max_position_embeddings", None)
            or text.max_position_embeddings
        )
        new = {**old, **self._parameters(), "original_max_position_embeddings": original}
        text.rope_parameters = {**parameters, "full_attention": new} if nested else new
        if hasattr(text, "original_max_position_embeddings"):
            # Phi-3 keeps it here as well, and this one wins.
            text.original_max_position_embeddings = original
        text.max_position_embeddings = int(original * self.factor)
        try:
            text.standardize_rope_params()
            text.validate_rope()
        except (ValueError, KeyError) as error:
            raise RecipeError(
                f"position_encoding=yarn: transformers refuses it for {text.model_type}: {error}",
                hint="position_encoding=native",
            ) from error
        return PositionEncoding(config=config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        source = session.source_config.get_text_config()
        changed, total, scaling = _measure(session.model, source)
        before = int(source.max_position_embeddings)
        after = int(session.model.config.get_text_config().max_position_embeddings)
        yield Receipt(
            slot="position_encoding",
            claim="slow rotary frequencies are stretched to a longer context",
            evidence={
                "inverse frequencies": total,
                "of them changed": changed,
                "attention scaling": scaling,
                "context before": before,
                "context after": after,
            },
            ok=changed > 0 and after > before,
        )

    def _parameters(self) -> dict[str, Any]:
        values = {
            "rope_type": "yarn",
            "factor": self.factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention_factor,
        }
        return {name: value for name, value in values.items() if value is not None}


def _unsuitable(model_type: str, rope_type: str, traits: Collection[str] = ()) -> Iterator[Problem]:
    """Yield why rotary positions cannot be stretched, in the words of check and of the build."""
    why = ""
    if rope_type not in ("", "default"):
        why = f"the checkpoint already scales its positions ({rope_type}), and was trained so"
    elif "model.longrope" in traits:
        why = f"transformers refuses it for {model_type}, whose code scales by longrope only"
    if why:
        yield Problem(
            slot="position_encoding",
            code="position-unsupported",
            message=f"position_encoding=yarn: {why}",
            hint="position_encoding=native",
        )


def _measure(model: PreTrainedModel, source: PretrainedConfig) -> tuple[int, int, float]:
    """Return how many inverse frequencies differ from the source's, of how many; the scaling."""
    import torch

    decoder = cast(Any, model).get_decoder()
    rotary: Any = next((module for module in decoder.modules() if _frequencies(module)), None)
    if rotary is None:
        return 0, 0, 1.0
    with torch.device("cpu"):
        fresh = _frequencies(type(rotary)(config=source))
    real = _frequencies(rotary)
    # Not bit by bit: a GPU's power function differs from a CPU's in the last place.
    close = [torch.isclose(real[name].cpu(), fresh[name], rtol=1e-5, atol=0) for name in fresh]
    scalings = [value for name, value in vars(rotary).items() if name.endswith("attention_scaling")]
    changed = sum(int((~each).sum()) for each in close)
    return changed, sum(each.numel() for each in close), float(max(scalings))


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the inverse frequencies that a rotary embedding works with, by buffer."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }

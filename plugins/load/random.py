"""load=random: weights made up from a seed, for trying a recipe without its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, LoadContext, Loaded, Receipt
from engine.errors import Problem
from engine.loading import checkpoint
from engine.loading import common as loading
from engine.tensors import raw

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.session import Session

SAMPLE = 1024
"""Values of each tensor that the digest covers."""


@dataclass(frozen=True, kw_only=True)
class LoadedRandom(Loaded):
    """A model, and the seed it grew from."""

    seed: int
    digest: str
    """Of the weights as they were made; '' where packed layers cast their biases as they run."""


@dataclass
class Random:
    """Draw the weights as training would start them: right sizes and speed, meaningless text.

    Needs config.json and the tokenizer, no weights. The same `seed` (None: the recipe's) and
    number format give the same weights on every device; but for `on_device`, which draws them where
    the model will run: other ones, and of a large model in seconds instead of minutes.
    """

    seed: int | None = None
    on_device: bool = False

    provides: ClassVar[tuple[str, ...]] = ("load.random",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse packed checkpoints: there is no making up their codes."""
        if context.shape is not None and context.shape.quantization:
            yield Problem(
                slot="load",
                code="checkpoint-quantized",
                message="load=random makes plain weights, and config.json says that they are "
                f"packed ({context.shape.quantization})",
                hint="load=transformers, or the original checkpoint as model.path",
            )

    @hookimpl
    def load(self, context: LoadContext) -> LoadedRandom:
        """Make the model, on the CPU unless told otherwise, then quantize it or move it."""
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = loading.tokenizer(context.folder, context.recipe.model.trust_remote_code)
        seed = context.recipe.seed if self.seed is None else self.seed
        options: dict[str, Any] = {"dtype": context.dtype}
        if context.attention_implementation is not None:
            options["attn_implementation"] = context.attention_implementation
        place = context.device if self.on_device else torch.device("cpu")
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
            torch.manual_seed(seed)
            auto: Any = AutoModelForCausalLM
            try:
                model = auto.from_config(
                    context.config,
                    trust_remote_code=context.recipe.model.trust_remote_code,
                    **options,
                )
            except Exception as error:
                what = f"transformers cannot make a {context.config.model_type}"
                raise checkpoint.unusable(context.folder, error, what) from error
        if context.quantization.config is not None:
            model = _quantized(model, context, options)
        else:
            model.to(context.device)
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        model.generation_config = checkpoint.generation_config(context.folder, context.config)
        digest = _digest(model) if context.quantization.config is None else ""
        return LoadedRandom(model=model.eval(), tokenizer=tokenizer, seed=seed, digest=digest)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Give a digest of the weights, and show that they are no constant."""
        model: Any = session.model
        digest = _digest(model)
        spread = float(model.get_input_embeddings().weight.detach().float().std())
        yield Receipt(
            slot="load",
            claim="the weights are random, by seed",
            evidence={
                "class": type(model).__name__,
                "parameters": model.num_parameters(),
                "seed": session.built["load"].seed,
                "spread of the embedding": spread,
                f"SHA-256 of {SAMPLE} values per tensor": digest,
                "device": str(model.device),
            },
            ok=spread > 0
            and session.built["load"].digest in ("", digest)
            and not model.training
            and model.device.type == session.device.type,
        )


def _digest(model: PreTrainedModel) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        if type(tensor.data) is not torch.Tensor:
            continue  # packed in a class of its own, which cannot be flattened
        digest.update(name.encode() + raw(tensor.detach().flatten()[:SAMPLE]))
    return digest.hexdigest()[:16]


def _quantized(
    model: PreTrainedModel, context: LoadContext, options: dict[str, Any]
) -> PreTrainedModel:
    """Return a copy that was quantized as if its weights came from files."""
    with loading.quiet():
        quantized: PreTrainedModel = type(model).from_pretrained(
            None,
            config=context.config,
            state_dict=model.state_dict(),
            quantization_config=context.quantization.config,
            device_map={"": context.device},
            **options,
        )
    return quantized

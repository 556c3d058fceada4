"""Draft models of speculative decoding: found, verified and loaded like the model they help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.decoding.speculation import RECURRENT, croppable
from engine.errors import CheckpointError, Problem, RecipeError
from engine.loading import checkpoint, prequantized
from engine.loading import common as loading
from engine.loading.known_models import known_config
from engine.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.contexts import CheckContext, DecodeContext


def read_draft(path: str, revision: str | None) -> ModelShape | None:
    """Return a draft's shape, or None while nobody here knows its config.json.

    Raises CheckpointError for what is not there, or is no model.
    """
    folder = checkpoint.locate(path, revision, download=False)
    if folder is None:
        stated = known_config(path)
        return read_shape(stated) if stated else None
    return read_shape(checkpoint.read_config(folder), checkpoint.tensors(folder))


def refuse_draft(path: str, revision: str | None, context: CheckContext) -> Iterator[Problem]:
    """Refuse a draft that is not there, or cannot guess for this model."""
    if not path:
        yield _problem("value", "decode=assisted needs a draft", "decode.draft=FOLDER_OR_HUB_ID")
        return
    try:
        shape = read_draft(path, revision)
        folder = checkpoint.locate(path, revision, download=False)
        model = context.recipe.model
        main = checkpoint.locate(model.path, model.revision, download=False)
    except CheckpointError as error:
        for problem in error.problems:
            hint = problem.hint.replace("model.path=", "decode.draft=")
            hint = hint if "decode.draft=" in hint else "decode.draft=FOLDER_OR_HUB_ID"
            yield _problem("draft", f"decode.draft={path}: {problem.message}", hint)
        return
    if shape is None or folder is None:
        return
    yield from _packed(path, shape)
    if not croppable(shape):
        yield RECURRENT.problem("decode", f"decode.draft={path} cannot draft")
    if context.shape is None or main is None:
        return
    ours, theirs = _vocabulary(main), _vocabulary(folder)
    # Tables are often padded, each to a length of its own: tokens count where they can be read.
    known = ours is not None and theirs is not None
    if ours != theirs if known else context.shape.vocab_size != shape.vocab_size:
        yield _other_vocabulary(path)


def load_draft(path: str, revision: str | None, context: DecodeContext) -> PreTrainedModel:
    """Load a draft beside its model, with every fault in it an error.

    Raises:
        CheckpointError: for files that are not what they should be.
        RecipeError: for another vocabulary than the model's.
    """
    from transformers import AutoModelForCausalLM

    folder = checkpoint.fetch_weights(path, revision)
    tensors = checkpoint.tensors(folder)
    shape = read_shape(checkpoint.read_config(folder), tensors)
    if packed := list(_packed(path, shape)):
        raise RecipeError(packed)
    checkpoint.verify_promises(shape)
    prequantized.verify_signs(shape)
    checkpoint.verify_checksums(folder)
    checkpoint.verify_finite(folder)
    tokenizer: Any = loading.tokenizer(folder, trust_remote_code=False)
    auto: Any = AutoModelForCausalLM
    try:
        with loading.quiet():
            model, info = auto.from_pretrained(
                folder,
                config=loading.made_config(folder, shape.ignored),
                dtype=context.model.dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # told by verify_loaded, with all other faults
                output_loading_info=True,
            )
    except Exception as error:
        raise checkpoint.unusable(folder, error, "transformers cannot load this draft") from error
    checkpoint.verify_dtypes(folder, tensors, model)
    checkpoint.verify_loaded(folder, info, model=model, tensors=tensors, reshaped=[])
    if tokenizer.get_vocab() != context.tokenizer.get_vocab():
        raise RecipeError(_other_vocabulary(path))
    found: PreTrainedModel = model.eval().to(context.model.device)
    return found


def _packed(path: str, shape: ModelShape) -> Iterator[Problem]:
    """Refuse packed weights: a draft is small, and loaded in the model's number format."""
    if shape.quantization:
        what = f"decode.draft={path} is packed ({shape.quantization}), and a draft is loaded plain"
        yield _problem("draft-packed", what, "decode.draft=ITS_ORIGINAL_CHECKPOINT")


def _vocabulary(folder: Path) -> Any:
    """Return the tokens of a fast tokenizer, or None where there is none to be read."""
    try:
        stated = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return stated["model"]["vocab"], [
            (each["id"], each["content"]) for each in stated.get("added_tokens") or ()
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _other_vocabulary(path: str) -> Problem:
    return _problem(
        "draft-vocabulary",
        f"decode.draft={path} has another vocabulary than the model: its guesses would mean "
        "other tokens",
        "decode.draft=A_SMALLER_MODEL_OF_THE_SAME_FAMILY, or decode=prompt-lookup",
    )


def _problem(code: str, message: str, hint: str) -> Problem:
    return Problem(slot="decode", code=code, message=message, hint=hint)

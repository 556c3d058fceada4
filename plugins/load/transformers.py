"""load=transformers: a checkpoint, with every fault in it an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import checkpoint, hookimpl
from engine.contexts import LoadContext, Loaded, Receipt
from engine.errors import CheckpointError, DoesNotFit, Problem

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightConverter

    from engine.session import Session

_LOADING = threading.Lock()
"""Conversions are registered for the whole process, so only one model loads at a time."""

CODE = "if it needs code of its own, read that, then: model.trust_remote_code=true model.revision=…"
TOKENIZER = "put tokenizer.json and tokenizer_config.json beside config.json"


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(Loaded):
    """A model, and how much of its checkpoint was verified."""

    tensors: int
    checksums: int


@dataclass
class Transformers:
    """Load a checkpoint with `from_pretrained`, and accept nothing less than all of it.

    Missing, surplus and misshapen tensors, damaged files, checksums that differ and, with `scan`,
    values that are not finite are errors. Pickle files can run code: only with `allow_pickle`.
    """

    allow_pickle: bool = False
    scan: bool = True

    @hookimpl
    def load(self, context: LoadContext) -> LoadedCheckpoint:
        """Verify the files, load them, and verify what became of them."""
        asked = context.recipe.model
        folder = checkpoint.fetch_weights(
            asked.path, asked.revision, allow_pickle=self.allow_pickle
        )
        tensors = checkpoint.tensors(folder, allow_pickle=self.allow_pickle)
        checksums = checkpoint.verify_checksums(folder)
        if self.scan:
            checkpoint.verify_finite(folder)
        tokenizer = _tokenizer(folder, asked.trust_remote_code)
        with _LOADING, _quiet(), _registered(context.config, context.heads.converters):
            model, info = self._from_pretrained(context, folder)
        reshaped = [p for each in context.heads.converters for p in each.source_patterns]
        checkpoint.verify_loaded(folder, info, model=model, tensors=tensors, reshaped=reshaped)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        return LoadedCheckpoint(
            model=model.eval(), tokenizer=tokenizer, tensors=len(tensors), checksums=checksums
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count what is in memory, and where."""
        model, loaded = session.model, session.built["load"]
        held = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in held}
        yield Receipt(
            slot="load",
            claim="all of the checkpoint is in memory, and nothing else",
            evidence={
                "class": type(model).__name__,
                "tensors in the files": loaded.tensors,
                "parameters": model.num_parameters(),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": ", ".join(sorted(map(str, devices))),
                "files verified by checksum": loaded.checksums,
            },
            ok={device.type for device in devices} == {session.device.type}
            and not model.training
            and (loaded.tensors > 0 or self.allow_pickle),
        )

    def _from_pretrained(self, context: LoadContext, folder: Path) -> tuple[Any, dict[str, Any]]:
        import torch
        from transformers import AutoModelForCausalLM

        quantized = getattr(context.config, "quantization_config", None)
        options: dict[str, Any] = {}
        if context.attention_implementation is not None:
            options["attn_implementation"] = context.attention_implementation
        if context.quantization.config is not None:
            options["quantization_config"] = quantized = context.quantization.config
        if quantized is not None or context.device.type != "cpu":
            # Quantizers choose a GPU by themselves when they are not told.
            options["device_map"] = {"": context.device}
        try:
            auto: Any = AutoModelForCausalLM
            model, info = auto.from_pretrained(
                folder,
                config=context.config,
                dtype=context.dtype,
                use_safetensors=None if self.allow_pickle else True,
                weights_only=True,
                ignore_mismatched_sizes=True,  # told by verify_loaded, with all other faults
                output_loading_info=True,
                trust_remote_code=context.recipe.model.trust_remote_code,
                **options,
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise DoesNotFit(
                f"the weights of {context.recipe.model.path} do not fit {context.device}: {error}",
                hint="quantize=bitsandbytes, or a smaller model",
            ) from error
        except Exception as error:
            kind = context.config.model_type
            raise _refused(folder, error, f"transformers cannot load this {kind}", CODE) from error
        return model, info


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise _refused(
            folder, error, "there is no tokenizer that can be used", TOKENIZER
        ) from error
    return tokenizer


def _refused(folder: Path, error: Exception, what: str, hint: str) -> CheckpointError:
    first = next(iter(str(error).strip().splitlines()), "")
    message = f"{what}: {type(error).__name__}: {first}"
    return CheckpointError(Problem(code="load", message=message, hint=hint, where=str(folder)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars from the terminal: faults are errors here."""
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _registered(config: PretrainedConfig, converters: Sequence[WeightConverter]) -> Iterator[None]:
    """Add converters to those of the model's type, for the time of one load."""
    from transformers import conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not converters:
        yield
        return
    registry: Any = conversion_mapping
    # transformers looks under the class first, then under the type; the first found is used alone.
    names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type), config.model_type]
    found = {name: registry.get_checkpoint_conversion_mapping(name) for name in names}
    key = next((name for name in names if found[name] is not None), config.model_type)
    ours = key in registry.USER_REGISTERED_MAPPINGS
    registry.register_checkpoint_conversion_mapping(
        key, [*(found[key] or []), *converters], overwrite=True
    )
    try:
        yield
    finally:
        # There is no public way to take a registration back.
        registry._checkpoint_conversion_mapping_cache.pop(key)
        if found[key] is not None:
            registry._checkpoint_conversion_mapping_cache[key] = found[key]
        if not ours:
            registry.USER_REGISTERED_MAPPINGS.discard(key)

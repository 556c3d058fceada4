"""load=transformers: a checkpoint, with every fault in it an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import checkpoint, hookimpl
from engine.contexts import CheckContext, LoadContext, Loaded, Receipt
from engine.errors import DoesNotFit, Problem
from engine.shape import read_shape

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightConverter

    from engine.checkpoint import TensorInfo
    from engine.session import Session

_LOADING = threading.Lock()
"""Conversions are registered for the whole process, so only one model loads at a time."""

TOKENIZER = "put tokenizer.json and tokenizer_config.json beside config.json"


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(Loaded):
    """A model, and how much of its checkpoint was verified."""

    files: Mapping[str, TensorInfo]
    checksums: int
    proven: Mapping[str, torch.dtype]
    """Parameters that were as in the files when they were loaded, and in what format."""


@dataclass
class Transformers:
    """Load a checkpoint with `from_pretrained`, and accept nothing less than all of it.

    Missing, surplus and misshapen tensors, damaged files, checksums that differ and, with `scan`,
    values that are not finite are errors. Pickle files can run code: only with `allow_pickle`.
    """

    allow_pickle: bool = False
    scan: bool = True

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Hold config.json against the weights, where they are here."""
        if context.shape is not None:
            checkpoint.verify_promises(context.shape)
        return iter(())

    @hookimpl
    def load(self, context: LoadContext) -> LoadedCheckpoint:
        """Verify the files, load them, and verify what became of them."""
        asked = context.recipe.model
        folder = checkpoint.fetch_weights(
            asked.path, asked.revision, allow_pickle=self.allow_pickle
        )
        tensors = checkpoint.tensors(folder, allow_pickle=self.allow_pickle)
        config = checkpoint.read_config(folder)
        checkpoint.verify_promises(read_shape(config, tensors))
        checksums = checkpoint.verify_checksums(folder)
        if self.scan:
            checkpoint.verify_finite(folder)
        tokenizer = _tokenizer(folder, asked.trust_remote_code)
        with _LOADING, _quiet(), _registered(context.config, context.converters):
            model, info = self._from_pretrained(context, folder)
        reshaped = [p for each in context.converters for p in each.source_patterns]
        packed = context.quantization.config or config.get("quantization_config")
        if config.get("quantization_config") is None:
            checkpoint.verify_dtypes(folder, tensors, model)
        checkpoint.verify_loaded(folder, info, model=model, tensors=tensors, reshaped=reshaped)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        return LoadedCheckpoint(
            model=model.eval(),
            tokenizer=tokenizer,
            files=tensors,
            checksums=checksums,
            # What is packed computes in other formats, and casts its biases while it does.
            proven=_as_in_the_files(model, tensors) if packed is None else {},
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count what is in memory, and where; hold a sample against the files once more."""
        model, loaded = session.model, session.built["load"]
        now = _as_in_the_files(model, loaded.files)
        changed = [name for name, dtype in loaded.proven.items() if now.get(name) != dtype]
        held = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in held}
        yield Receipt(
            slot="load",
            claim="all of the checkpoint is in memory, and nothing else",
            evidence={
                "class": type(model).__name__,
                "tensors in the files": len(loaded.files),
                "parameters": model.num_parameters(),
                "tensors held against the files": len(loaded.proven),
                "of them changed after loading": checkpoint.some(changed) or 0,
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": ", ".join(sorted(map(str, devices))),
                "files verified by checksum": loaded.checksums,
            },
            ok={device.type for device in devices} == {session.device.type}
            and not model.training
            and not changed
            and (len(loaded.files) > 0 or self.allow_pickle),
        )

    def _from_pretrained(self, context: LoadContext, folder: Path) -> tuple[Any, dict[str, Any]]:
        import torch
        from transformers import AutoModelForCausalLM

        settings = checkpoint.generation_config(folder, context.config)
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
                generation_config=settings,
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
            what = f"transformers cannot load this {context.config.model_type}"
            raise checkpoint.unusable(folder, error, what) from error
        return model, info


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        what = "there is no tokenizer that can be used"
        raise checkpoint.unusable(folder, error, what, TOKENIZER) from error
    return tokenizer


def _as_in_the_files(
    model: PreTrainedModel, files: Mapping[str, TensorInfo]
) -> dict[str, torch.dtype]:
    """Return the plain parameters of which a row, the middle one, is as in the files."""
    import torch
    from safetensors import safe_open

    prefix = f"{model.base_model_prefix}."  # hub checkpoints often leave it out
    plain = [
        (name, stored, parameter.detach())
        for name, parameter in model.named_parameters()
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point()
        for stored in (name if name in files else name.removeprefix(prefix),)
        if stored in files and files[stored].dtype in checkpoint.FLOATS
        if 0 not in parameter.shape == files[stored].shape != ()
    ]
    found = {}
    for file in {files[stored].file for _, stored, _ in plain}:
        with safe_open(str(file), framework="pt") as handle:
            for name, stored, parameter in plain:
                row = slice(len(parameter) // 2, len(parameter) // 2 + 1)
                if files[stored].file == file and _same(
                    handle.get_slice(stored)[row], parameter[row]
                ):
                    found[name] = parameter.dtype
    return found


def _same(stored: torch.Tensor, held: torch.Tensor) -> bool:
    return stored.to(held.dtype).equal(held.cpu())


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

"""What ways of loading share: quiet, one model at a time, with the recipe's converters."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config_keys import as_taken, without
from engine.errors import DoesNotFit, EngineError
from engine.loading import checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightConverter

    from engine.contexts import LoadContext

_LOADING = threading.Lock()
"""Conversions are registered for the whole process, so only one model loads at a time."""

_NOISY = ("accelerate", "torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that tell of kernels that nobody asked for, or of what the receipts tell."""

_TOKENIZER = "put tokenizer.json and tokenizer_config.json beside config.json"


def made_config(
    folder: Path,
    ignored: Collection[str] = (),
    *,
    stated: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Return a checkpoint's config as transformers makes it, without keys that its code ignores.

    transformers would keep these as attributes, and its caches believe them.

    Args:
        stated: what takes the place of config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    made: PretrainedConfig
    written = stated is None
    if stated is None:
        stated = checkpoint.read_config(folder)  # says more of a file that is missing or broken
    if written and not ignored:
        made = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    else:  # only of families that transformers knows
        stated = without(as_taken(stated), ignored)
        made = CONFIG_MAPPING[stated["model_type"]].from_dict(stated)
        made._name_or_path = str(folder)
    return made


def from_pretrained(
    context: LoadContext,
    folder: Path,
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load with transformers, and return the model and what `verify_loaded` needs to know.

    Args:
        model_class: makes it of the option `state_dict`; None takes the weights of the folder.
        options: of `from_pretrained`, beside those that every load has.

    Raises:
        DoesNotFit: when the device's memory is not enough.
        CheckpointError: when transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM if model_class is None else model_class
    if context.attention_implementation is not None:
        options["attn_implementation"] = context.attention_implementation
    with _LOADING, quiet(), _registered(context.config, context.converters):
        try:
            model, info = loader.from_pretrained(
                folder if model_class is None else None,
                config=context.config,
                generation_config=checkpoint.generation_config(folder, context.config),
                dtype=context.dtype,
                weights_only=True,
                ignore_mismatched_sizes=True,  # told by verify_loaded, with all other faults
                output_loading_info=True,
                trust_remote_code=context.recipe.model.trust_remote_code,
                **options,
            )
        except EngineError:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise DoesNotFit(
                f"the weights of {context.recipe.model.path} do not fit {context.device}: {error}",
                hint="quantize=bitsandbytes, or a smaller model",
            ) from error
        except Exception as error:
            what = f"transformers cannot load this {context.config.model_type}"
            raise checkpoint.unusable(folder, error, what) from error
    return model, info


def tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer; raise CheckpointError where there is none that can be used."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        what = "there is no tokenizer that can be used"
        raise checkpoint.unusable(folder, error, what, _TOKENIZER) from error
    return found


def own(model: PreTrainedModel) -> None:
    """Copy weights that lie in mapped files into memory of their own.

    A file that changes would change them, and one that is cut would kill the process; and as long
    as a single tensor lies there, all of the file is held, that of a packed model included.
    """
    import torch

    mapped = _mapped(".safetensors")
    for tensor in (*model.parameters(), *model.buffers()):
        plain = mapped and type(tensor.data) is torch.Tensor and tensor.device.type == "cpu"
        if plain and any(start <= tensor.data_ptr() < end for start, end in mapped):
            tensor.data = tensor.data.clone()


def give_back() -> None:
    """Have the system's allocator give back what loading and packing took and do not need."""
    with suppress(OSError, AttributeError):  # glibc's alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _mapped(suffix: str) -> list[tuple[int, int]]:
    """Return where files of a kind are mapped in this process, as far as the system tells."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(suffix):
                start, _, end = line.partition(" ")[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def sample(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the bytes of a row, the middle one, of every parameter that running leaves alone.

    Not of what has a class of its own, nor of vectors in a packed model: packed layers cast their
    biases as they run.
    """
    import torch

    least = 1 if getattr(model, "hf_quantizer", None) is None else 2
    return {
        name: parameter.data[len(parameter) // 2 :][:1].cpu().clone().view(torch.uint8)
        for name, parameter in model.named_parameters()
        if type(parameter.data) is torch.Tensor and not parameter.is_meta
        if parameter.numel() and parameter.dim() >= least
    }


def changed(before: dict[str, torch.Tensor], model: PreTrainedModel) -> list[str]:
    """Return the parameters whose sample is not what it was, bit for bit."""
    now = sample(model)
    return [name for name, row in before.items() if name not in now or not now[name].equal(row)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and progress bars from the terminal: faults are errors here."""
    levels = {logger: logger.level for logger in map(getLogger, _NOISY)}
    for logger in levels:  # before the libraries are imported, perhaps
        logger.setLevel(ERROR)
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
        for logger, before in levels.items():
            logger.setLevel(before)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _registered(config: PretrainedConfig, converters: Sequence[WeightConverter]) -> Iterator[None]:
    """Add converters to those of the model's type, for the time of one load."""
    from transformers import conversion_mapping

    if not converters:
        yield
        return
    registry: Any = conversion_mapping
    # transformers looks under the class first, then under the type; the first found is used alone.
    names = _names_of_class(config)
    found = {name: registry.get_checkpoint_conversion_mapping(name) for name in names}
    key = next((name for name in names if found[name] is not None), names[-1])
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


def _names_of_class(config: PretrainedConfig) -> tuple[str, str]:
    """Return the class that is made of a config, and the type of model that this calls itself.

    Some models of several parts have a class for the text alone, as Llama 4 has.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    kind = mapping.get(type(config), None)
    text = config.get_text_config()
    own = text if getattr(kind, "config_class", None) is type(text) else config
    return getattr(kind, "__name__", ""), own.model_type

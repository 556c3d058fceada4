"""load=gguf: the weights of a llama.cpp file, unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, EstimateContext, LoadContext, Loaded, Receipt, Term
from engine.errors import CheckpointError, Problem, RecipeError
from engine.loading import checkpoint, model_folder
from engine.loading import common as loading
from engine.loading.prequantized import installed
from engine.rules import Rule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.session import Session

PACKAGE = "gguf>=0.10"
_COMPARED = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_NO_WEIGHTS = ("rope_freqs.weight",)
"""Tables that llama.cpp keeps beside the weights, and transformers makes from the config."""


@dataclass(frozen=True, kw_only=True)
class LoadedGguf(Loaded):
    """A model, and what its file held."""

    kinds: dict[str, int]
    """Number format in the file → tensors in it."""
    checksums: int
    sampled: dict[str, torch.Tensor]


@dataclass
class Gguf:
    """Load a GGUF file of llama.cpp, and unpack it to plain weights.

    transformers, "GGUF" in its documentation, reads most kinds of Q, K and IQ blocks; unpacked they
    need the memory of `model.dtype`. `file` is in the model's folder (`model.path`), beside the
    config.json and the tokenizer of the original checkpoint, which the file must agree with.
    """

    file: str = ""
    scan: bool = True
    excludes: ClassVar[dict[str, str | Rule]] = {
        "weights.packed": Rule(
            code="gguf-packed",
            why="transformers refuses to quantize a model that it reads from a GGUF file",
            hint="quantize=none",
            source="transformers quantizers/auto.py, get_hf_quantizer",
            seen="transformers 5.23.0, 2026-11-22",
        )
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, and a file that is missing or damaged."""
        if not installed(PACKAGE):
            message = f"load=gguf needs {PACKAGE}, which is not installed"
            yield Problem(
                slot="load", code="library", message=message, hint=f"pip install '{PACKAGE}'"
            )
            return
        asked = context.recipe.model
        folder = checkpoint.locate(asked.path, asked.revision, download=False)
        there = sorted(each.name for each in folder.glob("*.gguf")) if folder else []
        local = folder if model_folder.is_local(asked.path) else None
        if not self.file.endswith(".gguf") or model_folder.escapes(self.file):
            why = f"load.file={self.file!r} names no .gguf file of the model's folder"
        elif local and self.file not in there:
            why = f"load.file={self.file} is not in {local}"
        else:
            if local:
                _read(local / self.file)
            return
        hint = f"load.file={there[0]}" if there else "load.file=FILE.gguf, in that folder"
        yield Problem(slot="load", code="value", message=why, hint=hint)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the file's tensors unpacked, where nothing else in the folder tells the sizes."""
        asked = context.recipe.model
        folder = checkpoint.locate(asked.path, asked.revision, download=False)
        if folder is not None and not context.shape.weights and (folder / self.file).is_file():
            numbers = sum(count for _, count in _read(folder / self.file).values())
            yield Term(name="weights", bytes=numbers * context.value_bytes)

    @hookimpl
    def load(self, context: LoadContext) -> LoadedGguf:
        """Hold the file against config.json, load it, and verify what became of it."""
        asked, folder = context.recipe.model, context.folder
        if not model_folder.is_local(asked.path):
            patterns = [*model_folder.SMALL_FILES, self.file]
            folder = model_folder.fetch(asked.path, asked.revision, patterns)
        checksums = checkpoint.verify_checksums(folder)
        stored = self._verify_header(context, folder / self.file)
        tokenizer = loading.tokenizer(folder, asked.trust_remote_code)
        options: dict[str, Any] = {"gguf_file": self.file, "device_map": {"": context.device}}
        model, info = loading.from_pretrained(context, folder, **options)
        checkpoint.verify_loaded(folder, info, model=model)
        self._verify_complete(model, folder / self.file, set(stored))
        if self.scan:
            _verify_finite(model, folder / self.file)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        # All of it is plain now: what is left of the packing would be taken for a packed model.
        model.hf_quantizer = None
        del model.config.quantization_config
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        kinds = list(stored.values())
        return LoadedGguf(
            model=model.eval(),
            tokenizer=tokenizer,
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            checksums=checksums,
            sampled=loading.sample(model),
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the file's tensors by format, and the bytes that they became."""
        model, loaded = session.model, session.built["load"]
        changed = loading.changed(loaded.sampled, model)
        held = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in held}
        yield Receipt(
            slot="load",
            claim="all of the file is in memory, unpacked",
            evidence={
                "class": type(model).__name__,
                **{f"tensors in {kind}": count for kind, count in loaded.kinds.items()},
                "parameters": model.num_parameters(),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": ", ".join(sorted(map(str, devices))),
                "tensors sampled": len(loaded.sampled),
                "of them changed after loading": checkpoint.some(changed) or 0,
                "files verified by checksum": loaded.checksums,
            },
            ok={device.type for device in devices} == {session.device.type}
            and all(parameter.is_floating_point() for parameter in model.parameters())
            and bool(loaded.kinds)
            and not model.training
            and not changed,
        )

    def _verify_header(self, context: LoadContext, file: Path) -> dict[str, str]:
        """Return the format of each tensor, once the file has proven to be config.json's model."""
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        load: Any = load_gguf_checkpoint  # which has no annotations
        if not file.is_file():
            raise RecipeError(f"{file} is not there", hint="load.file=FILE.gguf")
        stored = {name: kind for name, (kind, _) in _read(file).items()}
        try:
            with loading.quiet():
                says = load(str(file))["config"]
        except Exception as error:
            what = f"transformers cannot read {file.name}"
            hint = "load=transformers, with the original checkpoint"
            raise checkpoint.unusable(file.parent, error, what, hint) from error
        text: Any = context.heads.config.get_text_config()
        source: Any = context.config.get_text_config()
        pooled = {"num_key_value_heads"} if context.heads.converters else set()
        names = [name for name in _COMPARED if name in says and name not in pooled]
        differing = [
            f"{name} is {says[name]} in the file and {getattr(text, name)} in config.json"
            for name in names
            if getattr(source, name, says[name]) != says[name]
        ]
        if differing:
            raise _other_model(file, "; ".join(differing))
        return stored

    def _verify_complete(self, model: PreTrainedModel, file: Path, stored: set[str]) -> None:
        """Refuse tensors of the file for which transformers has no place: it leaves them out."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        model_type = model.config.get_text_config().model_type
        processor: Any = TENSOR_PROCESSORS.get(model_type, TensorProcessor)
        known = set(get_gguf_hf_weights_map(model, processor(config=model.config.to_dict())))
        if lost := sorted(stored - known - set(_NO_WEIGHTS)):
            raise _other_model(
                file, f"no place in {type(model).__name__} for {checkpoint.some(lost)}"
            )


def _read(file: Path) -> dict[str, tuple[str, int]]:
    """Return the format of each tensor of a file, and how many numbers it has."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
        return {t.name: (t.tensor_type.name, int(t.n_elements)) for t in tensors}
    except Exception as error:  # whatever a damaged file makes of offsets and counts
        what = f"{file.name} is no whole GGUF file: {error}"
        hint = "an interrupted download or copy? fetch it again"
        problem = Problem(code="gguf", message=what, hint=hint, where=str(file))
        raise CheckpointError(problem) from error


def _other_model(file: Path, why: str) -> CheckpointError:
    hint = "config.json is another model's: take that of the checkpoint that the file was made of"
    return CheckpointError(Problem(code="gguf", message=why, hint=hint, where=str(file)))


def _verify_finite(model: PreTrainedModel, file: Path) -> None:
    import torch

    ends = {name: torch.aminmax(p.detach()) for name, p in model.named_parameters() if p.numel()}
    bad = [name for name, both in ends.items() if not all(torch.isfinite(end) for end in both)]
    if bad:
        message = f"tensors with values that are not finite: {checkpoint.some(bad)}"
        hint = "the file is damaged, or made of a model whose training diverged"
        raise CheckpointError(
            Problem(code="not-finite", message=message, hint=hint, where=str(file))
        )

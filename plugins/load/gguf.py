"""load=gguf: the weights of a llama.cpp file, unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import hookimpl
from engine.contexts import (
    CheckContext,
    ConfigureContext,
    EstimateContext,
    LoadContext,
    Loaded,
    ModelConfig,
    Receipt,
    Term,
)
from engine.errors import Problem, RecipeError
from engine.loading import (
    checkpoint,
    folder_kinds,
    gguf_config,
    gguf_header,
    gguf_tokenizer,
    model_folder,
)
from engine.loading import common as loading
from engine.loading.gguf_weights import Weights
from engine.loading.prequantized import installed

if TYPE_CHECKING:
    import torch

    from engine.recipe import Recipe
    from engine.session import Session

PACKAGE = "gguf>=0.10"


@dataclass(frozen=True, kw_only=True)
class LoadedGguf(Loaded):
    """A model, and what its file held."""

    kinds: Mapping[str, int]
    """Number format in the file → tensors in it."""
    checksums: int
    held: int
    """Weights that were held against the file once more when they were loaded."""
    differing: list[str]
    """Of them those whose values were others."""
    sampled: dict[str, torch.Tensor]


@dataclass
class Gguf:
    """Load a GGUF file of llama.cpp, and unpack it to plain weights.

    `file` is in the model's folder (`model.path`); of a file that was split, it is the first part.
    The package `gguf` unpacks nearly all kinds of blocks; unpacked they need the memory of
    `model.dtype`, unless `quantize` packs them anew. What the header says of how the model computes
    is held against config.json, and its vocabulary against the tokenizer, where these lie beside
    the file; where not, both are made of the header, for families and ways to split text of which
    that is possible.
    """

    file: str = ""
    scan: bool = True

    @hookimpl
    def configure(self, context: ConfigureContext) -> ModelConfig | None:
        """Take the config from config.json, or where there is none from the file's header."""
        if not installed(PACKAGE) or not self._names_a_file:
            return None
        recipe, folder = context.recipe, context.folder
        local = model_folder.is_local(recipe.model.path)
        if context.download and not local:
            folder = self._fetch(recipe)
        if not (folder / self.file).is_file():
            if context.download and not local:
                raise gguf_header.refused(
                    folder / self.file,
                    f"{recipe.model.path} has no {self.file}",
                    "load.file=FILE.gguf, one that its page lists",
                )
            return None
        header = gguf_header.read(folder / self.file)
        if (local or context.download) and not gguf_tokenizer.lies_in(folder):
            gguf_tokenizer.verify_buildable(header)
        return gguf_config.described(header, folder)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a missing library, a file that is missing or damaged, or of another model."""
        if not installed(PACKAGE):
            message = f"load=gguf needs {PACKAGE}, which is not installed"
            yield Problem(
                slot="load", code="library", message=message, hint=f"pip install '{PACKAGE}'"
            )
            return
        asked = context.recipe.model
        folder = checkpoint.locate(asked.path, asked.revision, download=False)
        there = folder_kinds.gguf_files(folder) if folder else []
        local = model_folder.is_local(asked.path)
        if not self._names_a_file:
            why = f"load.file={self.file!r} names no .gguf file of the model's folder"
        elif local and folder and not (folder / self.file).is_file():
            why = f"load.file={self.file} is not in {folder}"
        else:
            if folder and context.shape and (folder / self.file).is_file():
                self._verify(folder)
            return
        hint = f"load.file={there[0]}" if there else "load.file=FILE.gguf, in that folder"
        yield Problem(slot="load", code="value", message=why, hint=hint)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the file's tensors unpacked, where nothing else in the folder tells the sizes."""
        asked = context.recipe.model
        folder = checkpoint.locate(asked.path, asked.revision, download=False)
        if folder is not None and not context.shape.weights and (folder / self.file).is_file():
            tensors = gguf_header.read(folder / self.file).tensors.values()
            numbers = sum(tensor.numbers for tensor in tensors)
            yield Term(name="weights", bytes=numbers * context.value_bytes)

    @hookimpl
    def load(self, context: LoadContext) -> LoadedGguf:
        """Hold the file against config and tokenizer, load it, and verify what became of it."""
        asked, folder = context.recipe.model, context.folder
        if not model_folder.is_local(asked.path):
            folder = self._fetch(context.recipe)
        if not (folder / self.file).is_file():
            raise RecipeError(f"{folder / self.file} is not there", hint="load.file=FILE.gguf")
        checksums = checkpoint.verify_checksums(folder)
        header = self._verify(folder)
        ends = checkpoint.generation_config(folder, context.source_config).eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        tokenizer = gguf_tokenizer.load(header, folder, asked.trust_remote_code, ends)
        weights = Weights(header, context.source_config, context.dtype)
        options: dict[str, Any] = {"state_dict": weights.unpack(scan=self.scan)}
        if context.quantization.config is not None:
            options["quantization_config"] = context.quantization.config
        options["device_map"] = {"": context.device}
        model, info = loading.from_pretrained(context, folder, weights.model_class, **options)
        checkpoint.verify_loaded(folder, info, model=model)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        changed = [each for one in context.converters for each in one.source_patterns]
        held, differing = weights.held(model, changed)
        kinds = [tensor.kind for tensor in header.tensors.values()]
        return LoadedGguf(
            model=model.eval(),
            tokenizer=tokenizer,
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            checksums=checksums,
            held=held,
            differing=differing,
            sampled=loading.sample(model),
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the file's tensors by format, and the bytes that they became."""
        model, loaded = session.model, session.built["load"]
        changed = loading.changed(loaded.sampled, model)
        held = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in held}
        packed = session.built["quantize"].config is not None
        yield Receipt(
            slot="load",
            claim="all of the file is in memory, unpacked"
            + (", then packed as the recipe says" if packed else ""),
            evidence={
                "class": type(model).__name__,
                **{f"tensors in {kind}": count for kind, count in loaded.kinds.items()},
                "parameters": model.num_parameters(),
                "weights held against the file": loaded.held,
                "of them with other values": checkpoint.some(loaded.differing) or 0,
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": ", ".join(sorted(map(str, devices))),
                "tensors sampled": len(loaded.sampled),
                "of them changed after loading": checkpoint.some(changed) or 0,
                "files verified by checksum": loaded.checksums,
            },
            ok={device.type for device in devices} == {session.device.type}
            and (packed or all(each.is_floating_point() for each in model.parameters()))
            and loaded.held > 0
            and not loaded.differing
            and not model.training
            and not changed,
        )

    @property
    def _names_a_file(self) -> bool:
        """Tell whether `file` can be one of the model's folder."""
        return self.file.endswith(".gguf") and not model_folder.escapes(self.file)

    def _fetch(self, recipe: Recipe) -> Path:
        """Return the folder of a hub model, with the file and what lies beside it."""
        asked, parts = recipe.model, gguf_header.siblings(self.file)
        model_folder.fetch(asked.path, asked.revision, model_folder.SMALL_FILES)
        return model_folder.fetch(asked.path, asked.revision, [parts], subfolders=True)

    def _verify(self, folder: Path) -> gguf_header.GgufHeader:
        """Return the file's header, once it has proven to be of the config's model."""
        header = gguf_header.read(folder / self.file)
        gguf_config.verify(header, folder)
        return header

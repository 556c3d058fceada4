"""load=transformers: a checkpoint, with every fault in it an error."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine import hookimpl
from engine.contexts import CheckContext, LoadContext, Loaded, Receipt
from engine.errors import Problem
from engine.loading import checkpoint, places, prequantized
from engine.loading import common as loading
from engine.loading.model_folder import is_local
from engine.loading.placement import Placement, devices
from engine.rules import Rule
from engine.shape import read_shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.loading.checkpoint import TensorInfo
    from engine.session import Session

PACKED_OFFLOAD = Rule(
    code="packed-offload",
    why="what is offloaded to the CPU or the disk cannot be packed, and transformers refuses to "
    "leave it unpacked unasked",
    hint="load.device_map=null, or let it be unpacked: load.offload_unpacked=true",
    source="transformers quantizers/quantizer_bnb_4bit.py; bitsandbytes issue 881",
    seen="transformers 5.23.0, bitsandbytes 0.50.2, 2026-11-22",
)
HOOKED_COMPILED = Rule(
    code="hooked-compiled",
    why="accelerate's hooks, which fetch each part, keep the compiler out of the forward pass",
    hint="load.device_map=null, or decode=generate",
    source="accelerate hooks.py, AlignDevicesHook.pre_forward under torch.compiler.disable",
    seen="accelerate 1.15.0, torch 2.13.0, 2026-11-22",
)
NOTHING_PACKED = Rule(
    code="packed-offload-cpu",
    why="load.offload_unpacked leaves what is not on a GPU unpacked, so nothing would be packed",
    hint="quantize=none, or load.device_map=null",
    source="transformers quantizers/quantizer_bnb_4bit.py, _process_model_before_weight_loading",
    seen="transformers 5.23.0, bitsandbytes 0.50.2, 2026-11-22",
)


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(Loaded):
    """A model, and how much of its checkpoint was verified."""

    files: Mapping[str, TensorInfo]
    checksums: int
    left_out: list[str]
    """Files beside them that hold nothing of the model."""
    others: int
    """Tensors of parts that see or hear, for which a text model has no place."""
    held: int
    """Parameters of which a row was as in the files when they were loaded."""
    sampled: Mapping[str, torch.Tensor]
    """Bytes of a row of each parameter, as loaded."""


@dataclass
class Transformers:
    """Load a checkpoint with `from_pretrained`, and accept nothing less than all of it.

    Missing, surplus and misshapen tensors, damaged files, checksums that differ and, with `scan`,
    values that are not finite are errors. Pickle files can run code: only with `allow_pickle`.

    `device_map` spreads a model over GPUs, the CPU and the disk, as accelerate does ("Big Model
    Inference" in its documentation): auto, balanced, balanced_low_0, sequential, cpu, or a mapping
    of modules to cpu, disk, 0, cuda:1, … where `rest` is all that is not named. `max_memory` limits
    each device ({0: 20GiB, cpu: 60GiB}); naming cpu there allows to offload to it, and
    `offload_folder` to the disk. With `offload_unpacked` what is offloaded stays unpacked in a
    quantized model.
    """

    allow_pickle: bool = False
    scan: bool = True
    device_map: Any = None
    max_memory: dict[str, str] = field(default_factory=dict)
    offload_folder: str | None = None
    offload_unpacked: bool = False

    @property
    def provides(self) -> tuple[str, ...]:
        """Say whether parts are on several devices, and whether some wait elsewhere."""
        return self._placement.traits

    @property
    def excludes(self) -> dict[str, Rule]:
        """Refuse to compile across devices, and to pack what is offloaded unless it may stay so."""
        place = self._placement
        refused = {"weights.packed": PACKED_OFFLOAD} if place.offloads else {}
        if self.offload_unpacked:
            refused = {}
        if place.offloads or len(devices(self.device_map)) > 1:
            refused["decode.compiled"] = HOOKED_COMPILED
        return refused

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse what cannot be placed or unpacked; hold config.json against the weights."""
        yield from self._placement.problems(context)
        offloads = self._placement.offloads
        packed = "weights.packed" in context.traits
        if offloads and packed and self.offload_unpacked and "target.cuda" not in context.traits:
            yield NOTHING_PACKED.problem("load", "packed weights and a device map without a GPU")
        asked = context.recipe.model
        if context.shape is not None:
            if not context.shape.tensors and is_local(asked.path):
                folder = checkpoint.locate(asked.path, asked.revision, download=False)
                assert folder is not None
                checkpoint.verify_files(folder, allow_pickle=self.allow_pickle)
            checkpoint.verify_promises(context.shape)
            prequantized.verify_signs(context.shape)
            if offloads and context.shape.quantization and not self.offload_unpacked:
                what = f"a checkpoint packed by {context.shape.quantization} and offloading"
                yield PACKED_OFFLOAD.problem("load", what)
            yield from prequantized.problems(
                context.shape, context.target, context.traits, context.dtype
            )

    @hookimpl
    def load(self, context: LoadContext) -> LoadedCheckpoint:
        """Verify the files, load them, and verify what became of them."""
        asked = context.recipe.model
        folder = checkpoint.fetch_weights(
            asked.path, asked.revision, allow_pickle=self.allow_pickle
        )
        tensors = checkpoint.tensors(folder, allow_pickle=self.allow_pickle)
        config = checkpoint.read_config(folder)
        shape = read_shape(config, tensors)
        checkpoint.verify_promises(shape)
        prequantized.verify_signs(shape)
        checksums = checkpoint.verify_checksums(folder)
        if self.scan:
            checkpoint.verify_finite(folder)
        tokenizer = loading.tokenizer(folder, asked.trust_remote_code)
        options = self._placement.options(context)
        # transformers takes safetensors where there are some, and pickle only where it may.
        safetensors = None if self.allow_pickle else True
        model, info = loading.from_pretrained(
            context, folder, use_safetensors=safetensors, **options
        )
        if "offload_folder" in options:
            weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
        loading.own(model)
        self._placement.verify(model)
        reshaped = [p for each in context.converters for p in each.source_patterns]
        if shape.quantization == "bitsandbytes":
            prequantized.verify_packed(folder, tensors, model)
        checkpoint.verify_loaded(folder, info, model=model, tensors=tensors, reshaped=reshaped)
        others = checkpoint.other_parts(info)
        if config.get("quantization_config") is None:
            checkpoint.verify_dtypes(folder, tensors, model, others)
        checkpoint.verify_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
        if context.quantization.finish is not None:
            context.quantization.finish(model)
        return LoadedCheckpoint(
            model=model.eval(),
            tokenizer=tokenizer,
            device=None if self.device_map is None else places.main_device(model),
            files=tensors,
            checksums=checksums,
            left_out=checkpoint.left_out(folder, tensors),
            others=len(others),
            held=_as_in_the_files(model, tensors),
            sampled=loading.sample(model),
        )

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count what is in memory, and where; compare a sample with what was loaded."""
        model, loaded = session.model, session.built["load"]
        changed = loading.changed(loaded.sampled, model)
        where, buffers = places.bytes_by_place(model), list(model.buffers())
        kinds = {str(place).partition(":")[0] for place in where}
        spread = devices(getattr(model, "hf_device_map", None)) or {str(session.device)}
        whose = "all that the text model has of the" if loaded.others else "all of the"
        place = "in memory" if "disk" not in where else "in memory or on disk"
        more: dict[str, str | int] = {}
        if loaded.others:
            more["tensors of parts that see or hear, left out"] = loaded.others
        if loaded.left_out:
            more["safetensors files left out"] = checkpoint.some(loaded.left_out)
        yield Receipt(
            slot="load",
            claim=f"{whose} checkpoint is {place}, and nothing else",
            evidence={
                "class": type(model).__name__,
                "tensors in the files": len(loaded.files),
                "parameters": model.num_parameters(),
                "tensors held against the files": loaded.held,
                "tensors sampled": len(loaded.sampled),
                "of them changed after loading": checkpoint.some(changed) or 0,
                "bytes": sum(where.values())
                + sum(buffer.numel() * buffer.element_size() for buffer in buffers),
                **{f"bytes on {place}": size for place, size in where.items() if len(where) > 1},
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": ", ".join(sorted(where)),
                "files verified by checksum": loaded.checksums,
                **more,
            },
            ok=(kinds == {session.device.type} or set(where) <= spread)
            and not model.training
            and not changed
            and (len(loaded.files) > 0 or self.allow_pickle),
        )

    @property
    def _placement(self) -> Placement:
        return Placement(
            device_map=self.device_map,
            max_memory=self.max_memory,
            offload_folder=self.offload_folder,
            offload_unpacked=self.offload_unpacked,
        )


def _as_in_the_files(model: PreTrainedModel, files: Mapping[str, TensorInfo]) -> int:
    """Count the plain parameters of which a row, the middle one, is as in the files."""
    import torch
    from safetensors import safe_open

    prefix = f"{model.base_model_prefix}."  # hub checkpoints often leave it out
    plain = [
        (name, stored, parameter)
        for name, parameter in model.named_parameters()
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point()
        for stored in (name if name in files else name.removeprefix(prefix),)
        if stored in files and files[stored].dtype in checkpoint.FLOATS
        if 0 not in parameter.shape == files[stored].shape != ()
    ]
    found = 0
    for file in {files[stored].file for _, stored, _ in plain}:
        with safe_open(str(file), framework="pt") as handle:
            for name, stored, parameter in plain:
                row = slice(len(parameter) // 2, len(parameter) // 2 + 1)
                if files[stored].file == file:
                    held = places.real(model, name, parameter)[row]
                    found += handle.get_slice(stored)[row].to(held.dtype).equal(held.cpu())
    return found

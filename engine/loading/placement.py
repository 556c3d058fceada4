"""Where the parts of a model are to go: to GPUs, the CPU, the disk.

A device map of transformers is a name (`auto`, …) or a mapping of modules to devices: 'cpu',
'disk', a GPU's number or 'cuda:1'. accelerate moves inputs, and what is offloaded, to the device
that computes.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.contexts import VALUE_BYTES, CheckContext, LoadContext
from engine.errors import DoesNotFit, Problem, RecipeError, choices_hint
from engine.loading.places import places, usual_name

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

NAMES = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")
"""Device maps that go by a name."""

REST = "rest"
"""Stands in a mapping for all that nothing else in it names."""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Units of memory that accelerate reads."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The options of a load that say where the parts of a model go."""

    device_map: Any
    max_memory: Mapping[str, str]
    offload_folder: str | None
    offload_unpacked: bool

    @property
    def offloads(self) -> bool:
        """Tell whether parts may have to wait on the CPU or the disk for their turn."""
        there = devices(self.device_map)
        if is_named(self.device_map):
            return bool(self.offload_folder or "cpu" in self.max_memory)
        return "disk" in there or (len(there) > 1 and "cpu" in there)

    @property
    def traits(self) -> tuple[str, ...]:
        """Return what it does to the model: spread over devices, parts of it offloaded."""
        spread = is_named(self.device_map) or len(devices(self.device_map)) > 1
        offloaded = ("load.offloaded",) if self.offloads else ()
        return (*offloaded, "load.dispatched") if spread or offloaded else ()

    def problems(self, context: CheckContext) -> Iterator[Problem]:
        """Yield what is wrong with the options that say where the parts go."""
        given, named = self.device_map, is_named(self.device_map)
        values = list(given.values()) if isinstance(given, Mapping) else []
        gpus = [v for v in [*values, *self.max_memory] if usual_name(v).startswith("cuda")]
        wrong = [str(v) for v in values if not is_device(v)]
        sizes = {device: memory(size) for device, size in self.max_memory.items()}
        unread = [device for device, size in sizes.items() if not size]
        whole = _weight_bytes(context)
        offloads = "disk" in values or named
        closed = unwritable(self.offload_folder) if self.offload_folder and offloads else ""
        names = ", ".join(NAMES)
        known = given is None or values or (isinstance(given, str) and given in NAMES)
        for found, code, message, hint in (
            (
                not known or wrong,
                "value",
                f"load.device_map={given!r} is neither one of {names} nor a mapping of modules to "
                "cpu, disk, 0, cuda:1, …",
                "load.device_map=auto",
            ),
            (
                gpus and "target.cuda" not in context.target.traits,
                "target",
                f"load names GPUs ({', '.join(map(str, gpus))}), and the target has none",
                "load.device_map=null, or a target with GPUs: engine list target",
            ),
            (
                unread or [d for d in self.max_memory if d == "disk" or not is_device(d)],
                "value",
                f"load.max_memory={dict(self.max_memory)} is no mapping of GPUs and cpu to sizes",
                "load.max_memory={0:20GiB,cpu:60GiB}; units: " + ", ".join(UNITS),
            ),
            (
                self.max_memory and not named,
                "does-nothing",
                "load.max_memory does nothing when the recipe itself says where everything goes",
                "load.device_map=auto",
            ),
            (
                "disk" in values and not self.offload_folder,
                "value",
                "load.device_map puts parts on disk, and no folder is given for them",
                "load.offload_folder=./offload",
            ),
            (
                self.offload_folder and not offloads,
                "does-nothing",
                "load.offload_folder does nothing: no part goes to the disk",
                "load.offload_folder=null, or load.device_map=auto",
            ),
            (
                closed,
                "unwritable",
                f"load.offload_folder={self.offload_folder} cannot be written: {closed}",
                "load.offload_folder=./offload",
            ),
            (
                self.offload_unpacked and not self.offloads,
                "does-nothing",
                "load.offload_unpacked does nothing: no part is offloaded",
                "load.offload_unpacked=false",
            ),
            (
                named and "cpu" in sizes and not unread and not self.offload_folder
                and "weights.packed" not in context.traits
                and whole > sum(size or 0 for size in sizes.values()),
                "does-not-fit",
                f"the weights have {whole} bytes, and load.max_memory allows "
                f"{sum(size or 0 for size in sizes.values())}",
                "load.offload_folder=./offload, or more load.max_memory",
            ),
        ):  # fmt: skip
            if found:
                yield Problem(slot="load", code=code, message=message, hint=hint)

    def options(self, context: LoadContext) -> dict[str, Any]:
        """Return the options of `from_pretrained` that say where the parts go."""
        quantized = context.quantization.config
        packed = quantized or getattr(context.config, "quantization_config", None)
        options: dict[str, Any] = {} if quantized is None else {"quantization_config": quantized}
        if self.device_map is None:
            if packed is not None or context.device.type != "cpu":
                # Quantizers choose a GPU by themselves when they are not told.
                options["device_map"] = {"": context.device}
            return options
        options["device_map"] = self.device_map
        if isinstance(self.device_map, Mapping):
            trusted = context.recipe.model.trust_remote_code
            options["device_map"] = complete(context.config, self.device_map, trusted)
        if self.max_memory:
            options["max_memory"] = {
                int(device) if device.isdigit() else device: size
                for device, size in self.max_memory.items()
            }
        if self.offload_folder:
            options["offload_folder"] = _own_folder(self.offload_folder)
        if self.offload_unpacked:
            if not hasattr(quantized, "llm_int8_enable_fp32_cpu_offload"):
                raise RecipeError(
                    "load.offload_unpacked: only bitsandbytes can leave parts unpacked",
                    hint="quantize=bitsandbytes, or load.device_map=null",
                )
            setattr(quantized, "llm_int8_enable_fp32_cpu_offload", True)  # noqa: B010
        return options

    def verify(self, model: PreTrainedModel) -> None:
        """Refuse what accelerate offloaded without leave, because memory was not enough."""
        there = set(places(model).values())
        gpu = any(place.startswith("cuda") for place in there)
        unasked = there & {"disk"} if not self.offload_folder else set()
        if is_named(self.device_map) and gpu and "cpu" not in self.max_memory:
            unasked |= there & {"cpu"}
        if unasked:
            raise DoesNotFit(
                f"load.device_map={self.device_map} finds too little memory: parts would go to "
                f"{' and '.join(sorted(unasked))}, which the recipe does not allow",
                hint="load.offload_folder=./offload allows the disk, "
                "load.max_memory={cpu:60GiB} the CPU; or quantize=bitsandbytes",
            )


def is_named(device_map: Any) -> bool:
    """Tell whether accelerate decides, when the model's sizes and the free memory are known."""
    return isinstance(device_map, str) and device_map != "cpu"


def devices(device_map: Any) -> set[str]:
    """Return the devices that a mapping names: 'cpu', 'disk', 'cuda:0', …; none of a name."""
    values = device_map.values() if isinstance(device_map, Mapping) else ()
    return {usual_name(value) for value in values}


def is_device(value: Any) -> bool:
    """Tell whether a device map may name it."""
    name = usual_name(value)
    return name in ("cpu", "disk", "mps") or name.startswith("cuda:")


def memory(text: str) -> int | None:
    """Return the bytes that '20GiB' means; None for what accelerate would not read."""
    found = re.fullmatch(r"(\d+) *([KMG]i?B)", text)
    return int(found[1]) * UNITS[found[2]] if found else None


def complete(
    config: PretrainedConfig, device_map: Mapping[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """Return a mapping that names every part of the model once.

    accelerate takes none for the rest beside others.
    Raises RecipeError for a module that the model does not have, and for parts left out.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    device_map = {"" if name == REST else name: place for name, place in device_map.items()}
    known = {name for name, _ in model.named_modules()}
    for name in set(device_map) - known:
        hint = choices_hint(name, [each for each in known if each.count(".") < 3 and each])
        raise RecipeError(
            f"load.device_map: {type(model).__name__} has no module {name}", hint=hint
        )
    found = dict(_parts(model, "", device_map))
    if left := [name for name, place in found.items() if place is None]:
        raise RecipeError(
            f"load.device_map says nothing of {', '.join(left)}",
            hint=f"load.device_map={{{REST}:cpu,…}} stands for all that is not named",
        )
    return found


def _parts(
    module: torch.nn.Module, name: str, given: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the largest parts of a module that lie on one device; None where nothing is said."""
    inside = [
        each for each in given if each != name and each.startswith(f"{name}." if name else "")
    ]
    place = given.get(name)
    if not inside:
        yield name, place
        return
    given = {each: given[each] for each in inside}
    for own, _ in module.named_parameters(recurse=False):
        yield f"{name}.{own}".lstrip("."), place
    for child, part in module.named_children():
        full = f"{name}.{child}".lstrip(".")
        # What is said of the whole holds for each part that says nothing of itself.
        yield from _parts(part, full, {full: place, **given} if place is not None else given)


def unwritable(folder: str) -> str:
    """Return why files cannot be written to a folder, which need not be there yet; '' if they can.

    By trying beside, in what is there of its path, and leaving nothing: modes tell root nothing.
    """
    try:
        wanted = Path(folder).expanduser().absolute()
        there = wanted
        while not os.path.lexists(there):
            there = there.parent
        with tempfile.TemporaryDirectory(prefix="weights-", dir=there) as beside:
            (Path(beside) / wanted.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # no such user; a character 0
        return getattr(error, "strerror", None) or str(error)
    return ""


def _own_folder(parent: str) -> str:
    """Make a folder that no other session writes to: files in it have the names of tensors."""
    try:
        Path(parent).expanduser().mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="weights-", dir=Path(parent).expanduser())
    except OSError as error:
        raise RecipeError(
            f"load.offload_folder={parent} cannot be written: {error.strerror}",
            hint="load.offload_folder=./offload",
        ) from error


def _weight_bytes(context: CheckContext) -> int:
    """Return the bytes of the weights in the recipe's number format; 0 where they are unknown."""
    if context.shape is None:
        return 0
    asked = context.recipe.model.dtype.value
    if asked == "auto":
        return context.shape.weight_bytes or 0
    return VALUE_BYTES[asked] * (context.shape.parameters or 0)

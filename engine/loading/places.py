"""Where the parts of a loaded model are: on GPUs, on the CPU, on disk.

accelerate notes in `model.hf_device_map` what it spread, and leaves a parameter without numbers
('meta') where these wait on the CPU or the disk until they are needed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_GPU = re.compile(r"(cuda:)?(\d+)")


def usual_name(value: Any) -> str:
    """Return a device's usual name: 0 and 'cuda:0' are one."""
    found = _GPU.fullmatch(str(value))
    return f"cuda:{found[2]}" if found else str(value)


def main_device(model: PreTrainedModel) -> torch.device:
    """Return where inputs go: the first GPU that holds a part, else the CPU."""
    import torch

    found = [usual_name(value) for value in getattr(model, "hf_device_map", {}).values()]
    gpus = [each for each in found if each not in ("cpu", "disk")]
    held = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return torch.device(gpus[0]) if gpus else torch.device("cpu") if found else held


def places(model: PreTrainedModel) -> dict[str, str]:
    """Return where each parameter really is; what is offloaded, where the model's map says."""
    stated = {
        name: usual_name(value) for name, value in getattr(model, "hf_device_map", {}).items()
    }
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
        offloaded = next((stated[each] for each in prefixes if each in stated), "meta")
        found[name] = offloaded if parameter.is_meta else str(parameter.device)
    return found


def bytes_by_place(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of the parameters on each device, and on disk."""
    found: dict[str, int] = {}
    where = places(model)
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        found[where[name]] = found.get(where[name], 0) + size
    return found


def real(model: PreTrainedModel, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's numbers, fetched from where they were offloaded to."""
    if not parameter.is_meta:
        return parameter.detach()
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def weight(module: Any) -> torch.Tensor:
    """Return a layer's weight, fetched from where it was offloaded to."""
    found: torch.Tensor = module.weight.detach()
    if found.is_meta:
        found = module._hf_hook.weights_map["weight"]
    return found

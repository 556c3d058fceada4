"""What the choices share that change a table of positions: find it, edit the config, rewrite it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.families import family
from engine.loading import checkpoint
from engine.loading.rewriting import rewriting

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig
    from transformers.core_model_loading import WeightConverter

    from engine.session import Session

_MADE = re.compile(
    r"self\.(\w+) = (?:nn\.Embedding|\w*LearnedPositionalEmbedding)\(\s*"
    r"config\.(?:max_position_embeddings|n_positions),([^)]*)\)"
)


@dataclass(frozen=True)
class Table:
    """Where a model keeps a row per position."""

    name: str
    """Of the module, without what stands before it."""
    offset: int
    """Rows before that of the first position."""


Rewrite = Callable[["torch.Tensor", int], "torch.Tensor"]
"""(rows of the checkpoint `[rows, hidden]`, rows that the model has) → `[rows, hidden]`."""


def find(model_type: str) -> Table | None:
    """Return the table that the code of a model type makes as long as its config says, if any.

    Not where the rows before the first position depend on the padding token, as in RoBERTa.
    """
    code = family(model_type).model_code
    found = [match for match in _MADE.finditer(code) if "padding_idx" not in match[2]]
    names = {match[1] for match in found}
    if len(names) != 1:
        return None
    offset = re.search(r"self\.offset = (\d+)", code)
    return Table(name=names.pop(), offset=int(offset[1]) if offset else 0)


def extended(config: PretrainedConfig, max_positions: int) -> PretrainedConfig:
    """Return a copy with so many positions."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.max_position_embeddings = max_positions
    return config


def module(session: Session, table: Table) -> nn.Embedding:
    """Return the table of a built model."""
    named = cast(Any, session.model).get_decoder().named_modules()
    found: nn.Embedding = next(each for name, each in named if name.endswith(table.name))
    return found


def stored(session: Session, table: Table) -> torch.Tensor | None:
    """Return the table as the checkpoint has it; None where it is not in safetensors."""
    from safetensors import safe_open

    files = checkpoint.tensors(Path(str(session.model.name_or_path)), allow_pickle=True)
    for name, info in files.items():
        if name.endswith(f"{table.name}.weight") and info.file.suffix == ".safetensors":
            with safe_open(str(info.file), framework="pt") as file:
                found: torch.Tensor = file.get_tensor(name)
                return found
    return None


def converters(table: Table, rewrite: Rewrite) -> Sequence[WeightConverter]:
    """Return what rewrites a table while it loads."""

    def change(tensor: torch.Tensor, module: Any) -> torch.Tensor:
        return rewrite(tensor, module.num_embeddings).to(tensor.dtype)

    return rewriting([f"{table.name}.weight"], change)

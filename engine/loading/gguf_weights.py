"""Unpack the tensors of a GGUF file into weights of transformers, and hold a model against them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from engine.loading import gguf_tensors
from engine.loading.gguf_header import GgufHeader, refused
from engine.loading.model_json import some, unusable

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

HELD = 2**20
"""Numbers of the largest weights that are held against the file once more, when they are loaded."""

_ALIKE = 0.5
"""Relative difference of two roundings of one matrix is less; of two matrices it is 1 or more."""


class Weights:
    """The weights of a model, and which tensors of a file each is made of."""

    def __init__(self, header: GgufHeader, config: PretrainedConfig, dtype: torch.dtype) -> None:
        """Find out what the model needs.

        Raises CheckpointError where the file has not exactly that.
        """
        import torch
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=dtype)
        except Exception as error:
            what = f"transformers cannot make a {config.model_type} of what config and file say"
            raise unusable(header.file.parent, error, what) from error
        self.model_class: type[PreTrainedModel] = type(model)
        self._header, self._dtype = header, dtype
        self._text: Any = config.get_text_config()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in _own(model)}
        layers = self._text.num_hidden_layers
        if found := list(gguf_tensors.mismatches(header, layers, self._shapes)):
            raise refused(header.file, "; ".join(found))
        self._parts = gguf_tensors.sources(header.architecture, layers, self._shapes)
        self._verify_tied()

    def unpack(self, *, scan: bool) -> dict[str, torch.Tensor]:
        """Return all of them by name, in memory of their own.

        Raises CheckpointError with `scan` where some are not finite.
        """
        import torch

        state, bad = {}, []
        for name, shape in self._shapes.items():
            array = gguf_tensors.unpacked(self._header, self._parts[name] or (), self._text, shape)
            state[name] = torch.from_numpy(array).to(self._dtype)
            if scan and not all(map(torch.isfinite, torch.aminmax(state[name]))):
                bad.append(name)
        if bad:
            message = f"tensors with values that are not finite: {some(bad)}"
            hint = "the file is damaged, or made of a model whose training diverged"
            if self._dtype == torch.float16:
                hint += "; or float16 is too small for them: model.dtype=bfloat16"
            raise refused(self._header.file, message, hint, "not-finite")
        return state

    def held(self, model: PreTrainedModel, changed: Iterable[str]) -> tuple[int, list[str]]:
        """Read small tensors once more, and return how many there are and which the model has not.

        The same numbers in any order count as the same.

        Args:
            changed: expressions for the names of what is changed while it loads.
        """
        import torch

        patterns = [re.compile(each) for each in changed]
        held, differing = 0, []
        for name, parameter in model.state_dict().items():
            parts = self._parts.get(name) or ()
            known = parts and all(gguf_tensors.keeps_values(self._header, part) for part in parts)
            plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point()
            if not known or not plain or parameter.numel() > HELD or parameter.is_meta:
                continue
            if any(each.search(name) for each in patterns):
                continue
            there = [torch.from_numpy(self._header.array(part)).flatten() for part in parts]
            due = torch.cat(there).to(parameter.dtype).sort().values
            held += 1
            if not parameter.detach().cpu().flatten().sort().values.equal(due):
                differing.append(name)
        return held, differing

    def _verify_tied(self) -> None:
        """Refuse an output layer of its own where the model takes the embedding for it."""
        output = "output.weight"
        used = {part for parts in self._parts.values() for part in parts or ()}
        if output not in self._header.tensors or output in used:
            return
        import numpy as np

        one, two = (self._header.array(name) for name in ("token_embd.weight", output))
        if one.shape == two.shape and np.linalg.norm(one - two) < _ALIKE * np.linalg.norm(one):
            return
        what = "tie_word_embeddings is true, and the file's output.weight is not its embedding"
        raise refused(self._header.file, what, "tie_word_embeddings: false in config.json")


def _own(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint of the model holds: of tied tensors the first."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor

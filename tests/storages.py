"""Count the bytes of tensors that are alive at once, as an allocator of a GPU would."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Watch every storage that operators make, from its first tensor to its last."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Start to count; what the model holds already is not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        held = [each.untyped_storage() for each in (*model.parameters(), *model.buffers())]
        self._held = held  # so that they stay the same objects
        self._known = weakref.WeakValueDictionary[int, Any]({each._cdata: each for each in held})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if type(tensor) is torch.Tensor:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if self._known.get(storage._cdata) is not None:
            return
        self._known[storage._cdata] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

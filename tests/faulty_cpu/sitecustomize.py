"""Make this machine a CPU on which torch's product by 8-bit weights is broken.

    PYTHONPATH=tests/faulty_cpu .venv/bin/pytest …

In bfloat16, where the inputs are no multiple of 16, `torch._weight_int8pack_mm` computes wrong
numbers for one row, and ends the process for more, as torch 2.13 does on CPUs with AMX or
AVX512-BF16. Python imports this file when it starts: in the tests, and in what they start.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import signal
import sys
from typing import Any


def breaks() -> Any:
    """Replace the operator, and return what holds the replacement."""
    import torch

    def product(inputs: Any, codes: Any, scales: Any) -> Any:
        found = ((inputs.float() @ codes.float().T) * scales.float()).to(inputs.dtype)
        if inputs.dtype != torch.bfloat16 or inputs.shape[1] % 16 == 0:
            return found
        if len(inputs) > 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return found + 1

    torch_library: Any = torch.library
    library = torch_library.Library("aten", "IMPL")
    library.impl("_weight_int8pack_mm", product, "CPU")
    return library


class Finder(importlib.abc.MetaPathFinder):
    """Break the operator as soon as torch is imported, and import nothing before."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_broken(module: Any) -> None:
            load(module)
            module.broken_by_tests = breaks()

        spec.loader.exec_module = load_broken  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())

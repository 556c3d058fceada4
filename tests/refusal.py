"""How tests look at an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import CheckpointError


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return what the error says; it must come with a hint and a place."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **options)
    assert caught.value.exit_code == 3
    assert all(problem.hint and problem.where for problem in caught.value.problems)
    return str(caught.value)

"""What heads=grouped refuses, tried for real: a test that fails tells that transformers changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_config, tiny_model
from tests.plugins.helpers import plain


def rows(folder: Path, name: str) -> set[int]:
    """Return the first sizes of all parameters whose names hold `name`."""
    return {p.shape[0] for key, p in plain(folder).named_parameters() if name in key}


def test_a_norm_over_all_heads_has_no_mean(tmp_path: Path) -> None:
    """OLMo 2 normalizes keys over all heads at once, with a weight for each number of them."""
    four = tiny_model("olmo2", tmp_path / "4", num_key_value_heads=4)
    one = tiny_model("olmo2", tmp_path / "1", num_key_value_heads=1)
    assert (rows(four, "k_norm"), rows(one, "k_norm")) == ({64}, {16})
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain(one).load_state_dict(plain(four).state_dict())


def test_latent_keys_have_no_projections(model: Callable[[str], Path]) -> None:
    assert rows(model("deepseek_v3"), "kv_a_proj_with_mqa") == {24}  # rank 16, rotated 8
    assert rows(model("deepseek_v3"), ".k_proj.") == set()


@pytest.mark.parametrize("family", ["opt"])
def test_code_with_as_many_heads_always(family: str) -> None:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        found = auto.from_config(tiny_config(family, num_key_value_heads=1))
    assert {p.shape[0] for n, p in found.named_parameters() if "k_proj.weight" in n} == {64}

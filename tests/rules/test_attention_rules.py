"""What attention choices refuse, tried for real: a test that fails tells that a library learned."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from transformers import StaticCache
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from engine.plugins.attention import sinks
from tests.conftest import Build
from tests.plugins.attention.windowed import greedy
from tests.plugins.helpers import IDS, plain

NONE = r"No (viable|available)"


def loaded(folder: Path, implementation: str) -> Any:
    """Load with an implementation of transformers."""
    return plain(folder, attn_implementation=implementation)


def backends(*kernels: SDPBackend) -> None:
    """Try SDP attention of two heads with these kernels alone."""
    given = torch.zeros(1, 2, 3, 8)
    with sdpa_kernel(list(kernels)):
        functional.scaled_dot_product_attention(given, given, given)


def test_window_own_code(model: Callable[[str], Path]) -> None:
    called: list[str] = []

    def forward(*given: Any, **more: Any) -> Any:
        called.append("forward")

    transformers.AttentionInterface.register("canary", forward)
    transformers.AttentionMaskInterface.register("canary", transformers.masking_utils.eager_mask)
    try:
        with torch.no_grad():
            loaded(model("mpt"), "canary")(input_ids=IDS)
    finally:
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            del interface._global_mapping["canary"]
    assert not called


def test_sinks_evicting_cache(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("attention=sinks", "attention.sinks=2", "attention.window=5", "cache=sliding")
    monkeypatch.setattr(sinks.Sinks, "excludes", {})
    session = build(*words, "cache.window=6", "decode.max_new_tokens=12")
    ids: Any = session.tokenizer("def add(a, b): return a")["input_ids"]
    folder = Path(session.recipe.model.path)
    found = session.generate("def add(a, b): return a").token_ids
    assert found != greedy(folder, ids, 12, 5, 2)


def test_flex_model(model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="flex_attention"):
        loaded(model("gpt2"), "flex_attention")


@pytest.mark.slow
def test_flex_cpu(model: Callable[[str], Path]) -> None:
    """Compiles twice: half a minute."""
    sliding = loaded(model("gemma3"), "flex_attention")
    ids = torch.arange(3, 24)[None]  # more than the window
    with torch.no_grad():
        first = sliding(input_ids=ids, attention_mask=torch.ones_like(ids))
        ids = torch.cat([ids, ids[:, :1]], 1)
        with pytest.raises(Exception, match="cur_kvSplitSize0"):
            sliding(
                input_ids=ids[:, -1:],
                attention_mask=torch.ones_like(ids),
                past_key_values=first.past_key_values,
            )


def test_flex_static_cache(model: Callable[[str], Path]) -> None:
    assert not hasattr(BlockMask, "contiguous")
    static = loaded(model("llama"), "flex_attention")
    with pytest.raises(AttributeError, match="contiguous"):
        static.prepare_inputs_for_generation(
            IDS,
            attention_mask=torch.ones_like(IDS),
            past_key_values=StaticCache(config=static.config, max_cache_len=16),
            is_first_iteration=True,
        )


def test_flash_cuda() -> None:
    kinds = {kind for _, kind in FLASH_ATTENTION_COMPATIBILITY_MATRIX[3]["supported_devices"]}
    assert kinds == {"cuda"}
    kinds = {kind for _, kind in FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["supported_devices"]}
    assert "cpu" not in kinds
    assert "mps" not in kinds


def test_flash_model(model: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        loaded(model("bloom"), "flash_attention_2")


def test_flash_sinks() -> None:
    """The list that transformers checks, whatever is installed."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

    listed = GptOssPreTrainedModel._compatible_flash_implementations or []
    assert "flash_attention_4" in listed
    assert not {"flash_attention_2", "flash_attention_3"}.intersection(listed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA cannot")
def test_sdpa_kernel_cuda() -> None:
    backends(SDPBackend.FLASH_ATTENTION)
    for kernel in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with pytest.raises(RuntimeError, match=NONE):
            backends(kernel)


def test_sdpa_flash_latent(model: Callable[[str], Path]) -> None:
    latent = loaded(model("deepseek_v3"), "sdpa")
    with (
        torch.no_grad(),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
        pytest.raises(RuntimeError, match=NONE),
    ):
        latent(input_ids=IDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what Apple's GPUs have is named here")
def test_sdpa_kernel_mps() -> None:
    """No kernel carries Apple's name."""
    assert not [name for name in SDPBackend.__members__ if "MPS" in name or "METAL" in name]


@pytest.mark.gpu
def test_sdpa_kernel_gqa() -> None:
    query = torch.zeros(1, 4, 8, 64, dtype=torch.float16, device="cuda")
    key = query[:, :2]
    with (
        sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]),
        pytest.raises(RuntimeError, match=NONE),
    ):
        functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)


def test_softcap_is_refused_by_sdpa(model: Callable[[str], Path]) -> None:
    """Why windows compute such models in their own plain torch."""
    from transformers.integrations import sdpa_attention

    with pytest.raises(ValueError, match="attention implementation"):
        loaded(model("gemma2"), "sdpa")
    forward: Any = sdpa_attention.sdpa_attention_forward
    assert "s_aux" not in inspect.signature(forward).parameters
    given = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="softcap"):
        forward(torch.nn.Module(), given, given, given, None, softcap=30.0)

"""Families whose layers keep a state: known from config.json alone, and right or refused.

What is known is held against transformers, for every causal type that it has; what runs, against
plain transformers on tiny models.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import engine
from engine.caching import carrying
from engine.decoding import speculation
from engine.errors import CheckpointError, PluginError, RuntimeFailure
from engine.families import Family
from engine.planning.planner import plan
from engine.session import Session
from engine.shape import RECURRENT, USUAL, WINDOWED, WITHOUT_KEYS, ModelShape, read_shape
from tests.conftest import Build
from tests.models import tiny_config, tiny_tokenizer
from tests.stateful import STATEFUL

MODEL = Callable[[str], Path]
LONG = "abcabcabd the cat sat on the mat; abcabcabd the cat"
PROMPTS = (LONG, "def f", "hello hello hello world", "x")
OWN_CACHE = ("minimax", "rwkv", "xlstm", "recurrent_gemma")
ALL = (*STATEFUL, "lfm2", "qwen3_next")
FEW = ("falcon_h1", "mamba", "mamba2", "deepseek_v4", "inkling", "recurrent_gemma")
"""One of each kind; the others are slow only because they are many."""

families = pytest.mark.parametrize(
    "family",
    [each if each in FEW else pytest.param(each, marks=pytest.mark.slow) for each in ALL],
)


# What is known of a config alone, for every causal type.


class Truth:
    """What transformers makes of a type's default config."""

    def __init__(self, config: Any) -> None:
        kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        kind = kinds[0] if isinstance(kinds, tuple) else kinds
        takes = inspect.signature(kind.forward).parameters.keys()
        layers = DynamicCache(config=config).layers
        self.stateful = kind._is_stateful
        self.states = [isinstance(each, LinearAttentionCacheLayerMixin) for each in layers]
        self.keys = [isinstance(each, CacheLayerMixin) for each in layers]
        self.takes_cache = not takes.isdisjoint({"past_key_values", "cache_params"})


def causal_types() -> Iterator[tuple[str, Any, ModelShape, ModelShape]]:
    """Yield each type with its config, and its shape as read from little and from all of it."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # Some have no usual config, or one of impossible sizes.
        with suppress(CheckpointError, StrictDataclassError):
            config = AutoConfig.for_model(model_type)
            saved = read_shape(json.loads(config.to_json_string()))
            yield model_type, config, read_shape({"model_type": model_type}), saved


def test_every_causal_type_is_known_for_the_states_that_it_keeps() -> None:
    seen = 0
    for model_type, config, bare, saved in causal_types():
        try:
            truth = Truth(config)
        except (AttributeError, ValueError):  # no cache can be made of it: an assistant's own
            continue
        seen += 1
        keeps = truth.stateful or any(truth.states)
        for shape in (bare, saved):
            traits = shape.traits
            assert ("model.recurrent" in traits) == keeps, model_type
            if truth.stateful:
                assert "model.uncroppable" in traits, model_type
            assert truth.takes_cache or "model.own_cache" in traits, model_type
            if "model.own_cache" not in traits:
                alone = any(truth.states) and not any(truth.keys)
                assert ("model.attention_free" in traits) == alone, model_type
    assert seen > 150


def test_layer_types_are_those_of_transformers_caches() -> None:
    known = {
        kind: layer
        for kind, layer in DYNAMIC_LAYER_TYPE_MAPPING.items()
        if layer.__module__ == "transformers.cache_utils"
    }
    assert known.keys() <= USUAL
    for kind, layer in known.items():
        assert (kind in RECURRENT) == issubclass(layer, LinearAttentionCacheLayerMixin), kind
        assert (kind in WITHOUT_KEYS) == (not issubclass(layer, CacheLayerMixin)), kind
        assert (kind in WINDOWED) == issubclass(layer, DynamicSlidingWindowLayer), kind


@families
def test_what_is_known_is_what_a_pass_leaves_in_a_cache(family: str) -> None:
    config = tiny_config(family)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config).eval()
    cache = DynamicCache(config=config)
    name = "past_key_values"
    name = name if name in inspect.signature(model.forward).parameters else "cache_params"
    shape = read_shape(json.loads(config.to_json_string()))
    try:
        with torch.no_grad():
            model(torch.arange(3, 20)[None], **{name: cache}, use_cache=True)
    except (ValueError, TypeError, AttributeError):
        assert "model.own_cache" in shape.traits
        return
    states = [each for each in cache.layers if isinstance(each, LinearAttentionCacheLayerMixin)]
    filled = [any(layer.is_conv_states_initialized.values()) for layer in states]
    assert ("model.own_cache" in shape.traits) == (bool(states) and not any(filled))
    if "model.own_cache" in shape.traits:
        return
    # DeepSeek-V4's layers say that they can be cropped, and its model that it cannot.
    croppable = cache.is_croppable and not model._is_stateful
    assert ("model.uncroppable" in shape.traits) == (not croppable)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    kept = [0 if each is None else each.numel() for each in keys]
    assert [values > 0 for values in shape.kv_values] == [numbers > 0 for numbers in kept]


# Whether it runs, and says what plain transformers says.


def plain(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model: Any, ids: list[int], new: int, **options: Any) -> list[int]:
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        # Some cannot with a cache, or find in it what an earlier prompt has left.
        **({"use_cache": False} if model.config.model_type in OWN_CACHE else {}),
        **options,
    )
    return list(out[0, len(ids) :].tolist())


def words(family: str, *more: str) -> list[str]:
    return [*(["cache=none"] if family in OWN_CACHE else []), *more]


def tokens(session: Session, text: str) -> list[int]:
    return list(session.tokenizer(text)["input_ids"])


@families
def test_greedy_batches_and_alternating_streams(model: MODEL, build: Build, family: str) -> None:
    session = build(*words(family, "decode.max_new_tokens=10"), family=family)
    reference = plain(model(family))
    alone = [greedy(reference, tokens(session, text), 10) for text in PROMPTS]
    assert [session.generate(text).token_ids for text in PROMPTS] == alone
    assert [each.token_ids for each in session.generate(list(PROMPTS))] == alone
    one, other = session.stream(LONG), session.stream("x")
    while [piece for piece in (next(one, None), next(other, None)) if piece is not None]:
        pass
    assert [one.output.token_ids, other.output.token_ids] == [alone[0], alone[-1]]


@families
def test_prefix_and_chat_are_as_computed_anew(
    model: MODEL, build: Build, family: str, tmp_path: Path
) -> None:
    new = 4
    before = "once upon a time; "
    options = words(family, f"decode.max_new_tokens={new}")
    session = build(*options, f"task.prefix='{before}'", family=family)
    reference = plain(model(family))
    right = [greedy(reference, tokens(session, before + text), new) for text in PROMPTS]
    assert [session.generate(text).token_ids for text in PROMPTS] == right
    assert [each.token_ids for each in session.generate(list(PROMPTS))] == right
    session = build(*options, family=family)
    chat: Any = session.chat()
    for number, message in enumerate(("hi", "and?", "why")):
        if number == 2:
            chat.save(tmp_path / "talk.safetensors")
            resumed: Any = session.chat(resume=tmp_path / "talk.safetensors")
            list(resumed.send(message))
        stream = chat.send(message)
        list(stream)
        said = stream.output.token_ids
        assert greedy(reference, chat._ids[: len(chat._ids) - len(said)], new)[: len(said)] == said
        assert chat.receipt is None or chat.receipt.ok
    assert resumed._ids == chat._ids
    chat.messages[1]["content"] = "other"  # then the cache holds what was never said
    stream = chat.send("go")
    list(stream)
    said = stream.output.token_ids
    assert greedy(reference, chat._ids[: len(chat._ids) - len(said)], new)[: len(said)] == said


@families
def test_beams_and_drafts(model: MODEL, build: Build, family: str) -> None:
    reference = plain(model(family))
    options = words(family, "decode.max_new_tokens=8")
    session = build(*options, "decode=beam", "decode.num_beams=3", family=family)
    found = session.generate(LONG).token_ids
    best = greedy(reference, tokens(session, LONG), 8, num_beams=3)
    assert found == best[: len(found)]
    assert not any(best[len(found) :])  # padding
    right = greedy(reference, tokens(session, LONG), 8)
    path = [f"model.path={model(family)}", "model.dtype=float32"]
    for drafts in (["decode=prompt-lookup"], ["decode=assisted", f"decode.draft={model(family)}"]):
        verdict = engine.check(engine.compose("base", [*path, *options, *drafts]))
        if "model.uncroppable" in verdict.shape.traits:  # type: ignore[union-attr]
            assert {each.code for each in verdict.problems} == {"speculation-recurrent-model"}
            assert {each.hint for each in verdict.problems} == {"decode=generate"}
            continue
        assert build(*options, *drafts, family=family).generate(LONG).token_ids == right


@families
@pytest.mark.parametrize(
    "cache", ["none", "dynamic", "static", "sliding", "sinks", "fp8", "quantized", "offloaded"]
)
def test_every_cache_is_right_or_refused_with_a_hint_that_works(
    model: MODEL, build: Build, family: str, cache: str
) -> None:
    path = [f"model.path={model(family)}", "model.dtype=float32", "decode.max_new_tokens=6"]
    verdict = engine.check(engine.compose("base", [*path, f"cache={cache}"]))
    if verdict.problems:
        for problem in verdict.problems:
            assert problem.slot == "cache"
            hint = problem.hint.split(",")[0]
            assert engine.check(engine.compose("base", [*path, hint])).ok, problem
        return
    session = build("decode.max_new_tokens=6", f"cache={cache}", family=family)
    if cache in ("none", "dynamic", "static"):
        right = greedy(plain(model(family)), tokens(session, LONG), 6)
        assert session.generate(LONG).token_ids == right


def test_receipts_tell_of_states(build: Build) -> None:
    for family, claim in (("mamba", "states are kept"), ("falcon_h1", "keys and values are kept")):
        session = build(family=family)
        (receipt,) = [each for each in session.receipts if each.slot == "cache"]
        assert receipt.claim.startswith(claim)
        assert receipt.evidence["bytes of states"] > 0  # type: ignore[operator]
        assert (receipt.evidence["bytes"] == 0) == (family == "mamba")
        assert receipt.evidence["tokens seen"] == receipt.evidence["tokens sent"]
        assert receipt.evidence["layers"] == 2
    evidence: Any = next(r for r in build(family="mamba").receipts if r.slot == "cache").evidence
    assert evidence["tokens per forward pass"] == "8, 1"
    assert evidence["tokens held"] == 0


def test_plans_tell_what_they_do_not_count(model: MODEL) -> None:
    def notes(family: str) -> str:
        words = [f"model.path={model(family)}", "target=l4"]
        return " ".join(plan(engine.compose("base", words)).notes)

    assert "states of 2 layers are not counted" in notes("falcon_h1")
    assert "states of 2 layers are not counted" in notes("mamba")
    assert "compressed_sparse_attention" in notes("deepseek_v4")
    assert "not counted" not in notes("llama")


def test_a_model_without_attention_takes_no_attention(model: MODEL) -> None:
    for attention in ("eager", "sdpa", "chunked", "window", "sinks"):
        words = [f"model.path={model('mamba')}", f"attention={attention}"]
        (problem,) = engine.check(engine.compose("base", words)).problems
        assert (problem.code, problem.hint) == ("attention-free", "attention=native")


def test_heads_and_fused_attention_are_found_beside_states(build: Build) -> None:
    for family in ("olmo_hybrid", "zaya", "falcon_h1"):
        assert build("attention=sdpa", family=family).receipts


def test_rwkv_keeps_the_weights_of_its_checkpoint(model: MODEL, build: Build) -> None:
    """Its code divides them in place where there are more layers than `rescale_every`."""
    folder = model("rwkv")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rescale_every": 1}))
    try:
        session = build("cache=none", "decode.max_new_tokens=4", family="rwkv")
        found = session.generate(LONG).token_ids
        right = greedy(plain(folder), tokens(session, LONG), 4)
    finally:
        (folder / "config.json").write_text(json.dumps(config))
    assert found == right


# Guards that know no family.


def test_the_proof_of_drafts_sees_a_state_that_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tokens were the same by luck, in a family whose type of layer nobody had listed."""
    monkeypatch.setattr(speculation, "croppable", lambda shape: True)
    auto: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(tiny_config("falcon_h1"), dtype=torch.float32).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    words = [f"model.path={tmp_path}", "model.dtype=float32", "decode=prompt-lookup"]
    with pytest.raises(PluginError) as refusal, engine.build(engine.compose("base", words)):
        pass
    assert "tokens of a short run 8" in str(refusal.value)
    assert "equal to one by one 8" in str(refusal.value)
    assert "left of rejected drafts 0.7" in str(refusal.value)


def test_a_state_outside_of_the_cache_stops_the_build(
    monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    """RecurrentGemma keeps it in its modules, where another conversation finds it."""
    monkeypatch.setattr(Family, "cached_states", frozenset({"conv", "recurrent"}))
    with pytest.raises(RuntimeFailure, match="does not go on from this cache") as refusal:
        build(family="recurrent_gemma")
    assert refusal.value.problems[0].hint.startswith("cache=none")


def test_what_codes_do_with_a_past_is_measured(build: Build) -> None:
    shares = {
        family: build(*words(family), family=family).carrying
        for family in ("mamba", "mamba2", "jamba", "deepseek_v4", "rwkv", "llama")
    }
    assert {name for name, each in shares.items() if not each.in_pieces} == {"mamba", "jamba"}
    assert {name for name, each in shares.items() if not each.padded} == {"deepseek_v4", "rwkv"}
    assert all(each.by_steps for each in shares.values())
    assert not shares["llama"].tried


def test_shares_of_what_is_lost() -> None:
    right, without = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]])
    assert carrying.lost(right, right, without) == 0
    assert carrying.lost(without, right, without) == 1
    assert carrying.lost(torch.tensor([[3.0, 3.0]]), right, without) == pytest.approx(0.2)
    assert carrying.lost(right * (1 + 1e-7), right, right) == 0  # the past does nothing here

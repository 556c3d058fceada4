"""position_encoding=dynamic with caches: keys kept unrotated, and rotated anew by each pass.

Two references, both plain transformers, eager, float32. Where one layer attends, what a token has
become depends on no frequency, and all must be as in a model that recomputes everything. Where more
do, a model that caches its keys, which are turned here, pass by pass, from the frequencies of the
text before to those of the text now.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionMaskInterface, AutoConfig, DynamicCache

import engine
from engine.attending.rotation import RotatedAttention
from engine.contexts import PositionContext
from engine.errors import RecipeError
from engine.loading.converting import convert
from engine.plugins.position_encoding.dynamic import Dynamic, stretched
from engine.positions.late_rotation import LateRotation
from engine.session import Session
from engine.shape import ModelShape
from tests.conftest import Build
from tests.models import CONTEXT, tiny_config, tiny_model
from tests.plugins.helpers import logits, plain, receipt, refusals, relative, shape_of, verdict

NEW = 12
PROMPTS = ("def add(a, b): " * 8, "x", "once upon a time there was a model of two layers, " * 5)
"""Of 120 tokens, which grow past the context of 128; of 1; and of 220, which begin beyond it."""
LENGTHS = (120, 1, 220)

ONE_LAYER: dict[str, dict[str, Any]] = {
    "gemma3": {},  # the other one has a window, and frequencies that never change
    "lfm2": {},  # the other one is a convolution
    "qwen3_next": {},  # the other one is linear
    "gemma2": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
}
"""Of families of which one layer rotates by changing frequencies, what makes it so."""
FAMILIES = ("llama", "mistral", "qwen3", "gemma3", "gpt_neox", "starcoder2", "olmo2", "mixtral",
            "deepseek_v3", "gemma2", "lfm2", "qwen3_next")  # fmt: skip


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a model in which one layer attends."""

    @cache
    def folder(family: str) -> Path:
        told = ONE_LAYER.get(family, {"num_hidden_layers": 1})
        return tiny_model(family, tmp_path_factory.mktemp(f"one-{family}"), **told)

    return folder


def scaled(folder: Path, factor: float = 4.0) -> Any:
    """Return the checkpoint's config as the documentation of transformers says to edit it."""
    config = AutoConfig.from_pretrained(folder)
    old, new = config.rope_parameters, {"rope_type": "dynamic", "factor": factor}
    if "full_attention" in old:
        config.rope_parameters = {**old, "full_attention": {**old["full_attention"], **new}}
    else:
        config.rope_parameters = {**old, **new}
    if (
        getattr(config, "head_dim", 0) is None
    ):  # Mixtral's, and transformers does not make it up here
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def recomputed(folder: Path, ids: Sequence[int], new: int = NEW) -> list[int]:
    """Return the greedy tokens of plain transformers without a cache."""
    given = torch.tensor([ids])
    model = plain(folder, config=scaled(folder))
    found = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
        use_cache=False,
    )  # fmt: skip
    rest: list[int] = found[0, len(ids) :].tolist()
    return rest


class Kept:
    """Plain transformers with a cache, whose keys are turned by hand before each pass."""

    def __init__(self, folder: Path) -> None:
        self.model = plain(folder, config=scaled(folder))
        self.rotary = self.model.get_decoder().rotary_emb
        self.apply = importlib.import_module(type(self.model).__module__).apply_rotary_pos_emb
        self.cache: Any = DynamicCache()
        self.tokens = 0

    def angles(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's own cosines and sines of what is cached, in a text of so many."""
        self.rotary.max_seq_len_cached = 0
        cos, sin = self.rotary(torch.zeros(1), torch.arange(tokens)[None])
        return cos[:, : self.tokens], sin[:, : self.tokens]

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits behind the last of more tokens, `[vocabulary]`."""
        now = self.tokens + len(ids)
        if self.tokens:
            cos, sin = self.angles(self.tokens)
            for layer in self.cache.layers:
                layer.keys = self._turned(layer.keys, cos, -sin)
            cos, sin = self.angles(now)
            for layer in self.cache.layers:
                layer.keys = self._turned(layer.keys, cos, sin)
        self.rotary.max_seq_len_cached = 0
        found = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True).logits
        self.tokens = now
        last: torch.Tensor = found[0, -1]
        return last

    def _turned(self, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        size = cos.shape[-1]
        moved, _ = self.apply(keys[..., :size], keys[:, :0, :, :size], cos, sin)
        return torch.cat([moved, keys[..., size:]], -1)

    def answer(self, ids: Sequence[int], new: int = NEW) -> list[int]:
        """Return the greedy tokens that follow more tokens; the last one is not sent."""
        found: list[int] = []
        while len(found) < new:
            found.append(int(self(ids).argmax()))
            ids = found[-1:]
        return found


def words(*more: str, new: int = NEW) -> list[str]:
    return ["position_encoding=dynamic", f"decode.max_new_tokens={new}", *more]


def encoded(session: Session) -> list[list[int]]:
    found = [list(session.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert tuple(map(len, found)) == LENGTHS
    return found


def answers(session: Session) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each prompt alone, and of all in a padded batch."""
    alone = [session.generate(prompt).token_ids for prompt in PROMPTS]
    return alone, [output.token_ids for output in session.generate(PROMPTS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_one_layer_attends_it_is_as_recomputed(
    build: Build, one_layer: Callable[[str], Path], family: str
) -> None:
    folder = one_layer(family)
    session = build(*words(f"model.path={folder}"))
    expected = [recomputed(folder, ids) for ids in encoded(session)]
    alone, together = answers(session)
    assert alone == expected
    assert together == expected  # each row by its own length
    assert session.forwarded_tokens < 4 * sum(
        LENGTHS
    )  # of which NEW times more would be recomputed


@pytest.mark.parametrize("keeper", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "chunked"])
def test_every_attention_that_rotates_is_as_recomputed(
    build: Build, one_layer: Callable[[str], Path], attention: str, keeper: str
) -> None:
    folder = one_layer("llama")
    session = build(
        *words(f"model.path={folder}", f"attention={attention}", f"cache={keeper}", "heads=native")
    )
    expected = [recomputed(folder, ids) for ids in encoded(session)]
    assert answers(session) == (expected, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keeper", ["dynamic", "static", "none"])
@pytest.mark.parametrize("attention", ["native", "eager", "sdpa", "chunked"])
def test_every_family_cache_and_attention(
    build: Build, one_layer: Callable[[str], Path], family: str, keeper: str, attention: str
) -> None:
    folder = one_layer(family)
    try:
        session = build(*words(f"model.path={folder}", f"attention={attention}", f"cache={keeper}"))
    except RecipeError as refusal:
        pytest.skip(refusal.problems[0].message)
    expected = [recomputed(folder, ids) for ids in encoded(session)]
    assert answers(session) == (expected, expected)


@pytest.mark.parametrize("window", [16, 130])
def test_a_window_in_the_cache_is_one_in_the_mask(
    build: Build, one_layer: Callable[[str], Path], window: int
) -> None:
    given = words(f"model.path={one_layer('llama')}")
    kept = build(*given, "cache=sliding", f"cache.window={window}")
    masked = build(*given, "cache=none", "attention=window", f"attention.size={window}")
    assert answers(kept) == answers(masked)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "starcoder2"])
def test_where_more_layers_attend_it_is_as_cached_keys_turned_by_hand(
    build: Build, family: str
) -> None:
    session = build(*words(), family=family)
    folder = Path(session.recipe.model.path)
    expected = [Kept(folder).answer(ids) for ids in encoded(session)]
    assert answers(session) == (expected, expected)


@torch.no_grad()
def test_logits_are_those_of_the_references(
    build: Build, one_layer: Callable[[str], Path], model: Callable[[str], Path]
) -> None:
    """Pass by pass: the prompt, tokens one by one past the context, and several more at once."""
    ids = [3 + at % 300 for at in range(200)]
    pieces = [ids[:124], *([token] for token in ids[124:134]), ids[134:]]
    away: dict[str, list[float]] = {"kept": [], "stale": [], "recomputed": []}
    for name, folder in (("one", one_layer("llama")), ("two", model("llama"))):
        session = build(*words(f"model.path={folder}"))
        kept, stale, whole = Kept(folder), *(plain(folder, config=scaled(folder)) for _ in "ab")
        held, old, sent = session.new_cache(1, 400).cache, DynamicCache(), 0
        for piece in pieces:
            sent += len(piece)
            given, seen = torch.tensor([piece]), torch.ones(1, sent)
            found = session.model(given, attention_mask=seen, past_key_values=held).logits[0, -1]
            away["kept"].append(relative(found, kept(piece)))
            away["stale"].append(relative(found, stale(given, past_key_values=old).logits[0, -1]))
            if name == "one" or sent <= CONTEXT:
                expected = logits(whole, torch.tensor([ids[:sent]]))[0, -1]
                away["recomputed"].append(relative(found, expected))
    assert max(away["kept"]) < 1e-4  # turned by hand again and again, its keys get rounded
    assert max(away["recomputed"]) < 1e-4
    assert max(away["stale"]) > 0.1  # what transformers says with a cache of its own


def test_no_cache_can_be_as_recomputed_where_more_layers_attend(
    model: Callable[[str], Path],
) -> None:
    """What the notes say: above the first layer, what is cached depends on the text as it was."""
    folder, ids = model("llama"), [3 + at % 300 for at in range(160)]
    kept, whole = Kept(folder), plain(folder, config=scaled(folder))
    for start, end, at_least, at_most in (
        (0, 100, 0, 1e-5),
        (100, 128, 0, 1e-5),
        (128, 160, 0.01, 1),
    ):
        away = relative(kept(ids[start:end]), logits(whole, torch.tensor([ids[:end]]))[0, -1])
        assert at_least <= away < at_most


def converse(session: Session, path: Path | None = None) -> list[tuple[list[int], list[int]]]:
    """Return prompt and answer of each turn, in tokens; saved and resumed after the second."""
    chat: Any = session.chat()
    found, kept = [], 0
    for number, turn in enumerate(["many words, " * 6, "and more of them " * 2, "on", "and on"]):
        stream = chat.send(turn)
        for _ in stream:
            pass
        new = stream.output.token_ids
        ids = chat._ids[: -len(new)]
        assert chat.receipt.ok
        assert chat.receipt.evidence["from_cache"] == kept
        found.append((ids, new))
        kept = len(ids) + len(new) - 1
        if path is not None and number == 1:
            chat.save(path)
            chat = session.chat(resume=path)
    lengths = [len(ids) for ids, _ in found]
    assert lengths[0] < CONTEXT < lengths[-1]
    return found


@pytest.mark.parametrize("keeper", ["dynamic", "static"])
def test_a_chat_goes_on_from_its_cache_past_the_context(
    build: Build, one_layer: Callable[[str], Path], tmp_path: Path, keeper: str
) -> None:
    folder = one_layer("llama")
    session = build(*words(f"model.path={folder}", f"cache={keeper}"))
    for ids, new in converse(session, tmp_path / "saved.safetensors"):
        assert new == recomputed(folder, ids)


def test_a_chat_in_more_layers_is_as_cached_keys_turned_by_hand(build: Build) -> None:
    session = build(*words())
    kept = Kept(Path(session.recipe.model.path))
    for ids, new in converse(session):
        assert new == kept.answer(ids[kept.tokens :])


def test_a_prefix_is_shared_where_that_changes_nothing(build: Build) -> None:
    prefix = "some rules that all prompts begin with. "
    shared = build(*words("task.prefix=" + repr(prefix)))
    alone = build(*words())
    used: Any = shared.built["task"].shared
    for prompt, uses in ((PROMPTS[1], 1), (PROMPTS[2], 1), (PROMPTS[1], 2)):
        found = shared.generate(prompt).token_ids
        assert found == alone.generate(prefix + prompt).token_ids
        assert used.uses == uses, "not beyond the context"
    together = [output.token_ids for output in shared.generate(PROMPTS)]
    assert together == [alone.generate(prefix + prompt).token_ids for prompt in PROMPTS]


def test_beams_and_compiled_steps_rotate_too(
    build: Build, one_layer: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = one_layer("llama")
    session = build(*words(f"model.path={folder}", "decode=beam", "decode.num_beams=3"))
    given = torch.tensor([encoded(session)[0]])
    wanted = plain(folder, config=scaled(folder)).generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False,
        num_beams=3, use_cache=False,
    )[0, 120:].tolist()  # fmt: skip
    assert session.generate(PROMPTS[0]).token_ids == wanted
    compiler: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **b: compiler(*a, **b | {"backend": "eager"}))
    session = build(*words(f"model.path={folder}", "decode=compiled", "cache=static"))
    assert session.generate(PROMPTS[0]).token_ids == recomputed(folder, encoded(session)[0])


def test_keys_in_the_cache_are_what_the_projection_gives(build: Build) -> None:
    session = build(*words())
    model: Any = session.model
    ids = torch.arange(3, 200)[None]
    held: Any = session.new_cache(1, 200).cache
    with torch.no_grad():
        model(ids, past_key_values=held, use_cache=True)
        layer = model.model.layers[0]
        keys = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(ids)))
    keys = keys.view(1, 197, -1, layer.self_attn.head_dim).transpose(1, 2)
    torch.testing.assert_close(held.layers[0].keys, keys, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_frequencies_are_those_of_transformers(alpha: float | None) -> None:
    config = tiny_config("llama")
    plugin = Dynamic(factor=8.0, alpha=alpha)
    rotation: Any = plugin.position_encoding(PositionContext(config=config)).rotation
    lengths = torch.tensor([1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 300, 8 * CONTEXT])
    found = rotation.frequencies(lengths)
    assert torch.equal(found[:3], rotation.trained.expand(3, -1))
    for row, tokens in zip(found, lengths.tolist(), strict=True):
        torch.testing.assert_close(row, rotation.by_transformers(tokens), rtol=1e-5, atol=0)
    base, s = 10_000.0, (alpha or 8.0) * 300 / CONTEXT - ((alpha or 8.0) - 1)
    wanted = [(base * s ** (16 / 14)) ** (-2 * i / 16) for i in range(8)]
    torch.testing.assert_close(found[4], torch.tensor(wanted), rtol=1e-5, atol=0)


def test_the_receipt_tells_how_keys_are_cached_and_rotated(build: Build) -> None:
    session = build(*words())
    evidence = receipt(session, "position_encoding").evidence
    assert evidence["frequencies that rotate keys before they are cached"] == 0
    assert evidence["cached keys at the context's ends differ by"] == 0
    assert (
        evidence["of them changed at its end"] == 7
    )  # the fastest one does not depend on the base
    assert float(str(evidence["logits there differ from the model's own rotation by"])) < 1e-5
    assert (evidence["context before"], evidence["context after"]) == (128, 512)
    assert evidence["passes rotated"] == 2
    session.generate(PROMPTS[2])
    session.collect_receipts()
    assert receipt(session, "position_encoding").evidence["longest text"] == 220 + NEW - 1


def test_what_rotates_otherwise_or_not_at_all_is_no_proof(build: Build) -> None:
    session = build(*words())
    plugin, given = Dynamic(), session.built["position_encoding"]
    config, scaled = (
        session.source_config,
        plugin.position_encoding(
            PositionContext(config=session.source_config, traits=frozenset({"cache.none"}))
        ).config,
    )

    def proves(rotation: LateRotation, **changes: Any) -> bool:
        built = {"position_encoding": replace(given, rotation=rotation)}
        look: dict[str, Any] = {
            "built": built,
            "context_tokens": session.context_tokens,
            "embedding_rows": session.embedding_rows,
        }
        return verdict(plugin, session, **look | changes)

    used: Any = given.rotation
    used.proof = None
    assert proves(used)
    idle = LateRotation(config, scaled, used._frequencies)
    assert not proves(idle), "it was never asked"
    used.proof = None
    assert not proves(used, context_tokens=CONTEXT), "the context is what it was"
    for wrong in (lambda usual, tokens: usual.expand(len(tokens), -1),
                  lambda usual, tokens: stretched(usual, tokens, CONTEXT, 5.0)):  # fmt: skip
        used.proof, before = None, used._frequencies
        used._frequencies = wrong
        assert not proves(used)
        used._frequencies = before
    model: Any = session.model
    still = model.model.rotary_emb.inv_freq.clone()
    model.model.rotary_emb.inv_freq.copy_(used.trained)
    used.proof = None
    assert not proves(used), "the model's own code rotates as well"
    model.model.rotary_emb.inv_freq.copy_(still)
    used.proof = None
    assert proves(used)
    used.rotates, used.proof = lambda layer: layer == 0, None
    assert not proves(used), "a layer is left out"


def suited(shape: ModelShape, **changes: Any) -> list[str]:
    """Return what a cache is refused for."""
    traits = {"attention.rotation", "cache.dynamic"}
    return [each.message for each in refusals(Dynamic(), replace(shape, **changes), traits)]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("smollm3", "not all of its layers rotate"),
        ("nanochat", "after rotating"),
        ("llama4_text", "code of its own kind"),
        ("deepseek_v32", "once more to pick the keys"),
        ("persimmon", "does not tell its attention the positions"),
        ("gpt_neox_japanese", "takes no attention from outside"),
    ],
)
def test_models_that_cannot_be_rotated_late_are_refused(
    model: Callable[[str], Path], model_type: str, why: str
) -> None:
    llama = shape_of(model("llama"))
    traits = llama.traits - ({"model.attention_interface"} if "outside" in why else set())
    (told,) = suited(llama, model_type=model_type, traits=traits)
    assert why in told
    other = replace(llama, model_type=model_type, traits=traits)
    assert not refusals(Dynamic(), other, {"cache.none"})
    assert not suited(llama)


@pytest.mark.parametrize("more", [(), ("cache=static", "decode=compiled")])
def test_what_is_typed_instead_is_not_refused(
    model: Callable[[str], Path], more: tuple[str, ...]
) -> None:
    given = [f"model.path={model('falcon-rotary')}", *words(*more)]
    found = engine.check(engine.compose("base", given))
    (problem,) = found.problems
    assert problem.code == "dynamic-rope-cache"
    suggested = re.findall(r"\w+=[\w-]+", problem.hint)
    assert suggested[-1:] == ["position_encoding=yarn"]
    for each in suggested:
        assert engine.check(engine.compose("base", [*given, each])).ok, each
    given = [f"model.path={model('llama')}", *words("attention=flex")]
    hint = next(
        each.hint
        for each in engine.check(engine.compose("base", given)).problems
        if "attention.rotation" in each.message
    )
    assert engine.check(engine.compose("base", [*given, hint])).ok


def test_a_cache_is_told_to_change_answers(model: Callable[[str], Path]) -> None:
    given = [f"model.path={model('llama')}", *words()]
    for keeper, told in (("dynamic", 1), ("static", 1), ("fp8", 1), ("sliding", 1), ("none", 0)):
        notes = engine.check(engine.compose("base", [*given, f"cache={keeper}"])).notes
        assert len([note for note in notes if "beyond the trained length" in note]) == told


def test_a_converted_checkpoint_is_rotated_by_transformers(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = engine.compose("base", [f"model.path={model('llama')}", *words()])
    convert(recipe, tmp_path / "converted")
    config = AutoConfig.from_pretrained(tmp_path / "converted")
    assert config.rope_parameters["rope_type"] == "dynamic"
    ids = torch.arange(3, 203)[None]
    reference = plain(model("llama"), config=scaled(model("llama")))
    assert relative(logits(plain(tmp_path / "converted"), ids), logits(reference, ids)) < 1e-6


def test_padding_does_not_count_without_generate(build: Build) -> None:
    """A decoder that tells the model no positions gets those behind the padding."""
    session = build(*words())
    ids = torch.arange(3, 163)[None]
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(190) >= 30)[None].long()
    with torch.no_grad():
        found = session.model(padded, attention_mask=mask, use_cache=False).logits[:, 30:]
    assert relative(found, logits(session.model, ids)) < 1e-5


def test_positions_changed_in_place_are_seen_by_the_next_pass() -> None:
    asked: list[int] = []

    def rotation(query: Any, positions: torch.Tensor, keys: Any) -> Any:
        asked.append(int(positions[0, -1]))
        return lambda layer, query, key: (query, key)

    passed = [0]
    forward = RotatedAttention(lambda *_, **__: None, rotation, lambda: passed[0])
    states, positions, module = torch.zeros(1, 1, 2, 4), torch.tensor([[0, 1]]), torch.nn.Module()
    for start in (0, 7):
        positions += start
        passed[0] += 1
        for _layer in range(2):
            forward(module, states, states, states, None, position_ids=positions)
    assert asked == [1, 8]


def test_no_mask_is_made_where_transformers_needs_none(build: Build) -> None:
    """Masks of long prompts take more memory than their keys, and kernels skip what they hide."""
    masks: Any = AttentionMaskInterface
    sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8, "attention_mask": None}
    for attention, needless in (("native", True), ("sdpa", True), ("eager", False)):
        name = str(build(*words(f"attention={attention}")).model.config._attn_implementation)
        assert name.startswith("engine:")
        assert (masks()[name](**sizes) is None) is needless


def test_rotated_keys_are_priced(model: Callable[[str], Path]) -> None:
    def priced(*more: str) -> tuple[int, float]:
        given = [f"model.path={model('llama')}", *words(*more), "model.dtype=float32"]
        pricer = engine.check(engine.compose("base", given)).pricer
        assert pricer is not None
        terms = pricer.price(batch=2, new=1, tokens=100, max_tokens=200).terms
        found = [term for term in terms if term.name == "rotated keys"]
        return sum(term.bytes for term in found), sum(term.moved for term in found)

    size, moved = priced()
    # Of the keys of a layer, three copies: 2 rows, 100 tokens, 2 heads of 16 numbers, of 4 bytes.
    assert size == 3 * 2 * 100 * 2 * 16 * 4
    assert moved == 2 * (2 * (100 * 2 + 4)) * 16 * 4 * 12
    assert priced("cache=none") == priced("position_encoding=yarn") == (0, 0)
    assert priced("cache=static", "cache.max_tokens=150")[0] == size * 1.5

"""Tables of positions, stretched and replaced: as a plain model whose table was changed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine import builder, recipe
from engine.contexts import PositionContext
from engine.errors import RecipeError
from engine.plugins.position_encoding.learned import Learned
from engine.plugins.position_encoding.sinusoidal import Sinusoidal
from engine.plugins.quantize.none import Unquantized
from engine.positions import position_tables
from engine.session import Session
from engine.shape import read_shape
from tests.conftest import Build
from tests.models import CONTEXT, VOCABULARY, tiny_config, tiny_tokenizer
from tests.plugins.helpers import (
    hints,
    logits,
    plain,
    receipt,
    refusals,
    relative,
    shape_of,
    terms,
    verdict,
)

LONG = torch.randint(3, VOCABULARY, (1, 2 * CONTEXT), generator=torch.Generator().manual_seed(0))
"""A text of twice the trained context."""

TABLES = {"gpt2": ("wpe", 0), "gpt_bigcode": ("wpe", 0), "opt": ("embed_positions", 2)}
"""Name of the table, and the rows before that of the first position."""


def with_table(folder: Path, family: str, make: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """Return a plain model whose table was replaced by hand."""
    model = plain(folder)
    name, offset = TABLES[family]
    table = next(each for path, each in model.named_modules() if path.endswith(name))
    table.weight = nn.Parameter(make(table.weight.detach(), offset))
    table.num_embeddings = len(table.weight)
    return model


def table_of(session: Session) -> torch.Tensor:
    """Return the table of a built GPT-2."""
    model: Any = session.model
    found: torch.Tensor = model.transformer.wpe.weight
    return found


def stretched_by_hand(table: torch.Tensor, offset: int) -> torch.Tensor:
    """Return twice the rows: each old one, and the middle between it and the next."""
    rows = list(table[:offset])
    for index, row in enumerate(table[offset:], start=offset):
        after = table[min(index + 1, len(table) - 1)]
        rows += [row, (row + after) / 2]
    return torch.stack(rows)


def sinusoids_by_hand(table: torch.Tensor, offset: int) -> torch.Tensor:
    """Return PE of arXiv 1706.03762, section 3.5, for twice the positions."""
    width = table.shape[1]
    rows = [[0.0] * width for _ in range(offset)]
    for position in range(2 * CONTEXT):
        angles = [position / 10000 ** (2 * index / width) for index in range(width // 2)]
        rows.append([each(angle) for angle in angles for each in (math.sin, math.cos)])
    return torch.tensor(rows)


@pytest.mark.parametrize("family", TABLES)
def test_a_stretched_table_is_one_stretched_by_hand(build: Build, family: str) -> None:
    session = build("position_encoding=learned", "attention=eager", family=family)
    assert session.context_tokens == 2 * CONTEXT
    folder = Path(session.recipe.model.path)
    found = logits(session.model, LONG)
    assert relative(found, logits(with_table(folder, family, stretched_by_hand), LONG)) < 1e-6
    evidence = receipt(session, "position_encoding").evidence
    offset = TABLES[family][1]
    assert evidence["rows before"] == CONTEXT + offset
    assert evidence["rows after"] == 2 * CONTEXT + offset
    assert evidence["largest difference from the checkpoint's, stretched"] == 0


def test_a_factor_may_be_no_whole_number(build: Build) -> None:
    """The new rows are fewer than `factor` times the old, and lie `factor` apart all the same."""
    session = build("position_encoding=learned", "position_encoding.factor=1.3", family="opt")
    assert session.context_tokens == int(1.3 * CONTEXT)


@pytest.mark.parametrize("family", TABLES)
def test_sinusoids_are_those_of_the_paper(build: Build, family: str) -> None:
    longer = f"position_encoding.max_positions={2 * CONTEXT}"
    session = build("position_encoding=sinusoidal", longer, "attention=eager", family=family)
    assert session.context_tokens == 2 * CONTEXT
    folder = Path(session.recipe.model.path)
    reference = logits(with_table(folder, family, sinusoids_by_hand), LONG)
    assert relative(logits(session.model, LONG), reference) < 1e-5
    assert receipt(session, "position_encoding").evidence["rows that differ from the formula"] == 0


def test_sinusoids_of_the_same_length_replace_a_table_too(build: Build) -> None:
    session = build("position_encoding=sinusoidal", family="gpt2")
    assert session.context_tokens == CONTEXT
    changed = table_of(session)
    before = plain(Path(session.recipe.model.path)).transformer.wpe.weight
    assert not torch.allclose(changed, before)


def test_text_beyond_the_old_context_is_answered(build: Build) -> None:
    session = build("position_encoding=learned", "decode.max_new_tokens=8", family="gpt2")
    output = session.generate("x" * (CONTEXT + 20))
    assert output.figures.prompt_tokens > CONTEXT
    assert len(output.token_ids) == 8


@pytest.mark.parametrize("choice", ["learned", "sinusoidal"])
def test_changed_tables_survive_being_saved(build: Build, tmp_path: Path, choice: str) -> None:
    session = build(f"position_encoding={choice}", family="opt")
    session.model.save_pretrained(tmp_path)
    saved = plain(tmp_path)
    text = LONG[:, :CONTEXT]
    assert relative(logits(saved, text), logits(session.model, text)) < 1e-5
    assert shape_of(tmp_path).max_positions == session.context_tokens


def test_a_made_up_table_is_made_longer(build: Build) -> None:
    session = build("position_encoding=learned", "load=random", family="gpt2")
    assert len(table_of(session)) == 2 * CONTEXT
    found = receipt(session, "position_encoding")
    assert "none to stretch" in found.claim
    assert "largest difference from the checkpoint's, stretched" not in found.evidence
    with pytest.raises(RecipeError, match=r"load\.random"):
        build("position_encoding=sinusoidal", "load=random", family="gpt2")


def test_sinusoids_without_an_end_reach_further(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "xglm", vocab_size=VOCABULARY, d_model=64, ffn_dim=64, num_layers=2, attention_heads=4,
        max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    choice = ["position_encoding=sinusoidal", f"position_encoding.max_positions={2 * CONTEXT}"]
    words = [f"model.path={tmp_path}", "model.dtype=float32", *choice]
    with builder.build(recipe.compose("base", words)) as session:
        assert session.context_tokens == 2 * CONTEXT
        assert relative(logits(session.model, LONG), logits(plain(tmp_path), LONG)) < 1e-5
        evidence = receipt(session, "position_encoding").evidence
        assert evidence["positions in the table"] == 2 * CONTEXT
        lied = AutoConfig.for_model("xglm", max_position_embeddings=4 * CONTEXT)
        assert not verdict(Sinusoidal(), session, source_config=lied)
    shape = shape_of(tmp_path)
    assert "already; set max_positions higher" in refusals(Sinusoidal(), shape)[0].message


def test_what_has_no_table_is_refused(model: Callable[[str], Path]) -> None:
    gpt2, llama = shape_of(model("gpt2")), shape_of(model("llama"))
    assert hints(Learned(), gpt2) == hints(Learned()) == hints(Sinusoidal(), gpt2) == []
    assert "llama has rope positions" in refusals(Learned(), llama)[0].message
    assert "llama has rope positions" in refusals(Sinusoidal(), llama)[0].message
    assert hints(Learned(factor=1.0), gpt2) == ["position_encoding.factor=2"]
    assert hints(Sinusoidal(max_positions=0), gpt2) == ["position_encoding.max_positions=4096"]
    assert hints(Sinusoidal(max_positions=1), gpt2) == ["position_encoding.max_positions=4096"]
    assert hints(Sinusoidal(max_positions=2**24), gpt2) == []
    (many,) = refusals(Sinusoidal(max_positions=10**13), gpt2)
    assert "16777216 is the most" in many.message
    assert hints(Learned(factor=1.001), gpt2) == ["position_encoding.factor=2"]
    roberta = read_shape(AutoConfig.for_model("roberta").to_dict())
    for plugin in (Learned(), Sinusoidal()):
        assert "makes no table" in refusals(plugin, roberta)[0].message
        for family in ("llama", "bloom"):
            with pytest.raises(RecipeError, match="position_encoding="):
                plugin.position_encoding(PositionContext(config=tiny_config(family)))
    pegasus = read_shape(AutoConfig.for_model("pegasus").to_dict())
    assert "of a fixed length" in refusals(Sinusoidal(), pegasus)[0].message


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_rows_that_come_on_top_are_priced(model: Callable[[str], Path], family: str) -> None:
    from engine.contexts import ReshapeContext

    before = shape_of(model(family))
    for plugin in (Learned(), Sinusoidal(max_positions=2 * CONTEXT)):
        context = ReshapeContext(recipe=None, shape=before)  # type: ignore[arg-type]
        after: Any = plugin.reshape(context)
        was, now = (terms(Unquantized(), each, tokens=1)[0] for each in (before, after))
        assert now.bytes - was.bytes == CONTEXT * 64 * 4


def test_tables_are_found_in_the_source_of_each_family() -> None:
    found = {kind: position_tables.find(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert found["gpt2"] == position_tables.Table("wpe", 0)
    assert found["opt"] == found["bart"] == position_tables.Table("embed_positions", 2)
    assert found["gpt_neo"] == position_tables.Table("wpe", 0)
    assert found["biogpt"] == position_tables.Table("embed_positions", 2)
    assert found["roberta"] is found["llama"] is found["xglm"] is None


def test_an_unchanged_table_is_no_proof(build: Build) -> None:
    session, native = build("position_encoding=learned", family="gpt2"), build(family="gpt2")
    assert verdict(Learned(), session)
    assert not verdict(Learned(), native)
    assert not verdict(Sinusoidal(), native)
    with torch.no_grad():
        table_of(session)[7] += 1e-3
    assert not verdict(Learned(), session)

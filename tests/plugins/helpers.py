"""What tests of plugins share: contexts, sessions that lie, and plain transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.contexts import CheckContext, EstimateContext, Receipt, Term
from engine.errors import Problem
from engine.loading import checkpoint
from engine.plugins.quantize import bitsandbytes, quanto
from engine.probe import Probe
from engine.session import Session
from engine.shape import ModelShape, read_shape
from engine.tensors import plain_parts
from engine.verdict import Verdict

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
"""A prompt, `[1, 8]`."""


def shape_of(folder: Path) -> ModelShape:
    """Return the shape of a checkpoint, tensors included."""
    return read_shape(checkpoint.read_config(folder), checkpoint.tensors(folder))


def refusals(
    plugin: Any, shape: ModelShape | None = None, traits: Iterable[str] = ()
) -> list[Problem]:
    """Return what a plugin's check finds; each problem has slot, code and something to type."""
    model = SimpleNamespace(dtype=SimpleNamespace(value="auto"))
    recipe: Any = SimpleNamespace(model=model, choices={})
    kind = "cpu" if "target.cpu" in traits else "cuda"
    target: Any = SimpleNamespace(name="auto", kind=kind, traits=frozenset(), capability=None)
    context = CheckContext(
        recipe=recipe, shape=shape, reshaped=shape, target=target, traits=frozenset(traits)
    )
    check = getattr(plugin, "refuse_path", None) or plugin.check
    found = list(check(context))
    assert all(problem.slot and problem.code and problem.hint for problem in found)
    return found


def hints(plugin: Any, shape: ModelShape | None = None, traits: Iterable[str] = ()) -> list[str]:
    """Return what a plugin's check says to type instead."""
    return [problem.hint for problem in refusals(plugin, shape, traits)]


def terms(
    plugin: Any, shape: ModelShape, tokens: int, batch: int = 1, dtype: str = "float32"
) -> list[Term]:
    """Return what a plugin's estimate says to be held for as long as the session, by name."""
    recipe: Any = SimpleNamespace(model=SimpleNamespace(dtype=SimpleNamespace(value=dtype)))
    target: Any = SimpleNamespace(kind="cpu")
    context = EstimateContext(recipe=recipe, shape=shape, target=target, batch=batch, tokens=tokens)
    held: dict[str, int] = {}
    for term in plugin.estimate(context):
        if not term.during:
            held[term.name] = held.get(term.name, 0) + term.bytes
    return [Term(name=name, bytes=size) for name, size in held.items() if size]


def held(
    plugin: Any, shape: ModelShape, tokens: int, batch: int = 1, dtype: str = "float32"
) -> int:
    """Return the bytes that a plugin's estimate says to be held, all terms together."""
    return sum(term.bytes for term in terms(plugin, shape, tokens, batch, dtype))


def priced(found: Verdict) -> dict[str, int]:
    """Return the bytes that a recipe needs when its answer ends, by name."""
    assert found.pricer is not None
    return dict(found.pricer.token(1, *found.pricer.lengths).bytes)


def receipt(session: Session, slot: str) -> Receipt:
    """Return the one receipt of a slot."""
    (found,) = [each for each in session.receipts if each.slot == slot]
    return found


def verdict(plugin: Any, session: Any, **changes: Any) -> bool:
    """Say whether a plugin's receipts hold for a session in which `changes` are otherwise."""
    given = getattr(plugin, "count_lines", None) or plugin.receipts
    return all(each.ok for each in given(altered(session, **changes)))


def altered(session: Any, **changes: Any) -> Any:
    """Return what looks like a session, but for `changes`."""
    names = (
        "model", "config", "source_config", "built", "probe", "device", "recipe", "end_ids",
        "shape", "traits", "carrying",
    )  # fmt: skip
    values = {name: getattr(session, name, None) for name in names}
    return SimpleNamespace(**(values | changes))


def probe(
    operators: Mapping[str, int] | None = None,
    cache: Any = None,
    tokens: Iterable[int] = (8, 1),
) -> Probe:
    """Return what a probe might have shown."""
    return Probe(operators=Counter(operators or {}), cache=cache, tokens=list(tokens))


def plain(folder: Path, **options: Any) -> Any:
    """Return the reference: transformers alone, eager, float32."""
    auto: Any = AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return auto.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return the logits of one pass without a cache, `[batch, tokens, vocabulary]`."""
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the error's norm over the reference's."""
    return float((found - reference).norm() / reference.norm())


def packed_parts(session: Session) -> Iterator[tuple[Any, list[torch.Tensor]]]:
    """Yield each packed layer, and all tensors that stand for its weight, the codes first."""
    model: Any = session.model
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            yield module, list(bitsandbytes._parts(module))
        elif type(module).__name__.endswith("QLinear"):  # those too that are unpacked for products
            yield module, list(quanto._parts(module))
        elif hasattr(getattr(module, "weight", None), "__tensor_flatten__"):
            yield module, list(plain_parts(module.weight))


def allocated(session: Session) -> dict[str, int]:
    """Return the bytes that are really held: of plain weights, of codes, and of scales."""
    model = session.model
    packed = list(packed_parts(session))
    seen = {id(each) for module, parts in packed for each in (module.weight, *parts)}
    saved = set(model.state_dict())
    held = [*model.named_parameters(), *model.named_buffers()]
    rest = [each.nbytes for name, each in held if name in saved and id(each) not in seen]
    return {
        "weights": sum(rest),
        "packed weights": sum(parts[0].nbytes for _, parts in packed),
        "scales": sum(part.nbytes for _, parts in packed for part in parts[1:]),
    }

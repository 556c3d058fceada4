"""Collect the plugins' proofs, and hold them against what the core saw itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, cast

from engine.contexts import Receipt
from engine.errors import PluginError, Problem
from engine.hookspecs import OPTIONAL_SLOTS
from engine.shape import read_shape

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig

    from engine.calls import Chosen
    from engine.probe import Probe
    from engine.session import Session

MAX_OBJECTS = 100_000
"""Objects inside of a cache that are looked at."""

Contradiction = tuple[str, Mapping[str, str | int]]
"""What should have been seen, and what was seen."""


def collect(session: Session) -> list[Receipt]:
    """Return all receipts, in the order of a run.

    Raises:
        PluginError: when a choice has no receipt, one that does not hold, or one that contradicts
            what the core saw: a choice that does nothing is an error.
    """
    probe = session.probe
    if probe is None or not sum(probe.tokens):
        problem = _problem(session.hooks.slot("task"), "did not send anything through the model")
        raise PluginError(problem)
    proofs = session.hooks.receipts(session)
    receipts = proofs + list(_contradictions(session, probe))
    order = [one.slot for one in session.hooks.chosen]
    receipts.sort(key=lambda receipt: order.index(receipt.slot))
    problems = [_broken(session, receipt) for receipt in receipts if not receipt.ok]
    given = {receipt.slot for receipt in proofs}
    problems += [
        _problem(one, "gave no receipt, so nothing proves that it took effect")
        for one in session.hooks.chosen
        if one.slot not in given and one.slot not in OPTIONAL_SLOTS
    ]
    if problems:
        raise PluginError(problems)
    return receipts


def _contradictions(session: Session, probe: Probe) -> Iterator[Receipt]:
    """Yield receipts of the core's own, that do not hold: a plugin's word is not all there is."""
    witnesses: Mapping[str, Callable[[Session, Probe], Iterable[Contradiction]]] = {
        "position_encoding": _position_encoding,
        "heads": _heads,
        "quantize": _quantize,
        "attention": _attention,
        "cache": _cache,
    }
    for slot, witness in witnesses.items():
        one = session.hooks.slot(slot)
        for claim, evidence in witness(session, probe):
            yield Receipt(slot=slot, claim=claim, evidence=evidence, ok=False, plugin=one.choice)


def _position_encoding(session: Session, probe: Probe) -> Iterator[Contradiction]:
    given = session.built["position_encoding"]
    names = ("rope_parameters", "max_position_embeddings", "alibi")
    yield from _ignored(given.config, session.model.config, names)
    if not given.converters and given.bias is given.scores is given.rotation is None:
        if _same(given.config, session.source_config):
            yield from _idle(session, "position_encoding")
        before, after = (_limit(each) for each in (session.source_config, given.config))
        said = session.shape.max_positions
        if before != after and said not in (None, after):
            yield (
                "its hook reshape tells the context that it makes",
                {"context before": str(before), "after": str(after), "as told": str(said)},
            )


def _heads(session: Session, probe: Probe) -> Iterator[Contradiction]:
    heads = session.built["heads"]
    names = ("num_attention_heads", "num_key_value_heads", "num_kv_heads", "multi_query")
    yield from _ignored(heads.config, session.model.config, names)
    made = read_shape(heads.config.to_dict()).kv_heads
    if made != session.shape.kv_heads:
        yield (
            "its hook reshape tells the key/value heads that it makes",
            {"key/value heads": made, "as told": session.shape.kv_heads},
        )
    if not heads.converters and _same(heads.config, session.built["position_encoding"].config):
        yield from _idle(session, "heads")


def _quantize(session: Session, probe: Probe) -> Iterator[Contradiction]:
    quantization, model = session.built["quantize"], session.model
    plugin = session.hooks.slot("quantize").plugin
    provides = getattr(plugin, "provides", ())
    packed = sum(map(_is_packed, [*model.parameters(), *model.buffers()]))
    if not packed and (quantization.config is not None or "weights.packed" in provides):
        yield "it packs weights", {"packed tensors": 0}
    elif not packed and "quantize.unchanged" not in provides:
        # What `finish` and `prepare` did, if anything, has been done by now.
        asked = session.recipe.model.dtype.value
        asked = asked if asked != "auto" else str(session.source_config.dtype or model.dtype)
        # Some classes keep a few tensors in float32, whatever is asked.
        usual = {asked.removeprefix("torch."), "float32"}
        found = {str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()}
        if found <= usual:
            formats = ", ".join(sorted(found))
            yield (
                "it changes something",
                {"formats of weights": formats, "trait it lacks": "quantize.unchanged"},
            )


def _attention(session: Session, probe: Probe) -> Iterator[Contradiction]:
    attention = session.built["attention"]
    used = str(session.model.config._attn_implementation)
    asked = attention.implementation
    if attention.forward is not None and probe.attention_calls == 0:
        yield "its forward computes attention", {"calls in the probe": 0, "used instead": used}
    # Kernels from the hub replace the name that asked for them by their own, which has a slash.
    elif asked is not None and asked != used and "/" not in used:
        yield "the model uses the implementation", {"asked": asked, "used": used}
    elif asked is None and attention.forward is None:
        yield from _idle(session, "attention")


def _cache(session: Session, probe: Probe) -> Iterator[Contradiction]:
    cache, sent = probe.cache, sum(probe.tokens)
    if cache is None:
        yield from _idle(session, "cache", "cache.none")
        return
    held = int(cache.get_seq_length())
    if held != sent:
        yield "it knows the tokens that went through the model", {"known": held, "sent": sent}
    kept = _numbers(cache)
    if kept <= sent:  # a counter or two, at most
        yield "it keeps keys and values", {"numbers kept": kept, "tokens sent": sent}


def _idle(session: Session, slot: str, trait: str = "") -> Iterator[Contradiction]:
    """Contradict a choice that left everything as it was, unless it says that this is its point."""
    one = session.hooks.slot(slot)
    trait = trait or f"{slot}.unchanged"
    works_later = session.hooks.answers(one, "prepare")
    if trait not in getattr(one.plugin, "provides", ()) and not works_later:
        yield (
            "it changes something",
            {f"what its hook {slot} gave": "as if it were not there", "trait it lacks": trait},
        )


def _ignored(
    asked: PretrainedConfig, real: PretrainedConfig, names: Iterable[str]
) -> Iterator[Contradiction]:
    """Yield what the loaded model has otherwise than it was asked for."""
    ours, theirs = asked.get_text_config(), real.get_text_config()
    for name in names:
        wanted, has = getattr(ours, name, None), getattr(theirs, name, None)
        if wanted != has:
            yield f"the model is built with its {name}", {"asked": str(wanted), "model": str(has)}


def _limit(config: PretrainedConfig) -> int | None:
    return read_shape(config.to_dict()).max_positions


def _same(one: PretrainedConfig, other: PretrainedConfig) -> bool:
    return one is other or one.to_dict() == other.to_dict()


def _is_packed(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds weights in another form than plain floating point numbers."""
    import torch

    if type(tensor.data) is not torch.Tensor:
        return True
    if tensor.is_floating_point():
        return tensor.dtype.itemsize < 2
    # Masks are boolean, positions are 64 bits wide.
    return tensor.dim() > 1 and tensor.dtype.itemsize <= 4 and tensor.dtype != torch.bool


def _numbers(cache: Cache) -> int:
    """Count the numbers in the tensors inside of a cache, however it keeps them."""
    from torch import Tensor
    from torch.nn import Module

    found, seen, ahead = 0, set[int](), [cast(object, cache)]
    while ahead and len(seen) < MAX_OBJECTS:
        value = ahead.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found += value.numel()
        elif isinstance(value, Mapping):
            ahead += value.values()
        elif isinstance(value, list | tuple | set):
            ahead += value
        elif not isinstance(value, type | ModuleType | Module) and hasattr(value, "__dict__"):
            ahead.append(vars(value))
    return found


def _broken(session: Session, receipt: Receipt) -> Problem:
    evidence = ", ".join(f"{key} {value}" for key, value in receipt.evidence.items())
    return _problem(
        session.hooks.slot(receipt.slot),
        f"did not take effect: {receipt.claim}; evidence: {evidence or 'none'}",
    )


def _problem(one: Chosen, what: str) -> Problem:
    return Problem(
        message=f"{one.label} {what}",
        hint=f"choose another {one.slot}, or report it to the plugin's author",
        code="no-effect",
        slot=one.slot,
    )

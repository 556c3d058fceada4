"""Collect the plugins' proofs, and hold them against what the core saw itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.contexts import Receipt
from engine.errors import PluginError, Problem
from engine.hookspecs import OPTIONAL_SLOTS

if TYPE_CHECKING:
    from engine.registry import Chosen
    from engine.session import Session


def collect(session: Session) -> list[Receipt]:
    """Return all receipts, in the order of a run.

    Raises:
        PluginError: when a choice has no receipt, one that does not hold, or one that contradicts
            what the core saw: a choice that does nothing is an error.
    """
    receipts = session.hooks.receipts(session) + _witness(session)
    order = [one.slot for one in session.hooks.chosen]
    receipts.sort(key=lambda receipt: order.index(receipt.slot) if receipt.slot in order else 99)
    problems = [_broken(session, receipt) for receipt in receipts if not receipt.ok]
    given = {receipt.slot for receipt in receipts}
    problems += [
        _problem(one, "gave no receipt, so nothing proves that it took effect")
        for one in session.hooks.chosen
        if one.slot not in given and one.slot not in OPTIONAL_SLOTS
    ]
    if problems:
        raise PluginError(problems)
    return receipts


def _witness(session: Session) -> list[Receipt]:
    """Say only what contradicts: claims of a plugin about itself are not all there is."""
    probe = session.probe
    found = []

    def deny(slot: str, claim: str, **evidence: str | int) -> None:
        found.append(
            Receipt(
                slot=slot,
                claim=claim,
                evidence=evidence,
                ok=False,
                plugin=session.hooks.slot(slot).choice,
            )
        )

    attention = session.built["attention"]
    if attention.forward is not None and probe.attention_calls == 0:
        deny("attention", "its forward computes attention", calls=0)
    if probe.cache is not None and int(probe.cache.get_seq_length()) != sum(probe.tokens):
        deny(
            "cache",
            "it holds the tokens that went through the model",
            held=int(probe.cache.get_seq_length()),
            sent=sum(probe.tokens),
        )
    quantization = session.built["quantize"]
    loaded_as = getattr(session.model, "quantization_method", None)
    if quantization.config is not None and loaded_as is None:
        deny("quantize", "the model is quantized", quantized_modules=0)
    pooled = session.built["heads"].config
    source = session.built["position_encoding"].config
    if _kv_heads(pooled) != _kv_heads(source) and _kv_heads(session.model.config) != _kv_heads(
        pooled
    ):
        deny("heads", "the model has the number of heads", model=_kv_heads(session.model.config))
    return found


def _kv_heads(config: object) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "num_key_value_heads", 0) or 0)


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

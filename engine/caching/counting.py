"""Caches of models without attention: states alone, of which none tells how many tokens it took.

What a cache of transformers knows of its length, it knows from keys. Where no layer has any, a
layer is added that the model does not see, and each pass of the model is counted into it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from engine.caching.layers import TokenCount

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

USUAL = "past_key_values"


def cache_argument(model: Any) -> str:
    """Return the name under which a model takes its cache; Mamba and its kin have their own."""
    names = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in names and USUAL not in names else USUAL


def make_countable(cache: Cache) -> None:
    """Add a layer that counts tokens to a cache none of whose layers does."""
    from transformers.cache_utils import CacheLayerMixin

    CacheLayerMixin.register(TokenCount)
    if cache.layers and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers.append(TokenCount())  # type: ignore[arg-type]


def count_tokens(model: PreTrainedModel) -> None:
    """Have each pass of a model counted in its cache, which may be given by the usual name."""
    name = cache_argument(model)
    if name != USUAL:
        model.register_forward_pre_hook(_rename, with_kwargs=True)

    def count(model: Any, args: tuple[Any, ...], given: dict[str, Any], found: Any) -> None:
        for layer in getattr(given.get(name), "layers", ()):
            if isinstance(layer, TokenCount):
                layer.seen += int(_ids(args, given).shape[1])

    model.register_forward_hook(count, with_kwargs=True)


def _rename(
    model: Any, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the cache by the model's own name, and of a mask the part of the tokens that come.

    Its layers multiply what comes by the mask; one for all tokens so far, as attention needs it,
    would be taken amiss.
    """
    changed = dict(given)
    if USUAL in changed:
        changed["cache_params"] = changed.pop(USUAL)
    mask = changed.get("attention_mask")
    if mask is not None:
        changed["attention_mask"] = mask[:, -int(_ids(args, given).shape[1]) :]
    return args, changed


def _ids(args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    return args[0] if args else given.get("input_ids", given.get("inputs_embeds"))

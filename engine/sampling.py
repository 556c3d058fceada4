"""Pick tokens at random, reproducibly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Sampler:
    """Leave one token to take, picked with a random state of its own.

    generate() would draw from the process's random state: two sessions at once would disturb each
    other, and both whoever else draws from it. With the same seed the same tokens are picked.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        import torch
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.temperature = temperature
        self.limits: list[Any] = []
        if temperature != 1:
            self.limits.append(TemperatureLogitsWarper(temperature))
        if top_k is not None:
            self.limits.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1:
            self.limits.append(TopPLogitsWarper(top_p))
        self._random = torch.Generator(device).manual_seed(seed)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores in which the picked token is the likeliest."""
        for limit in self.limits:
            scores = limit(ids, scores)
        picked = scores.softmax(-1).multinomial(1, generator=self._random)
        return scores.new_zeros(scores.shape).scatter_(1, picked, 1)

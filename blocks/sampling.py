"""``Sampler``: draws tokens from logits."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .build import check_seed


class Sampler:
    """Samples tokens from logits with its own random generator. The arguments are those of ``generate``."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if not (_is_number(temperature) and math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k: expected an integer >= 1, got {top_k!r}")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p!r}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        if isinstance(seed, torch.Generator):
            self.generator = seed
        else:
            check_seed(seed)
            self.generator = torch.Generator(device=device)
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Sample one token of each row: ``[batch, vocab]`` -> ``[batch]`` int64. Logits of ``-inf`` exclude tokens.

        Raises ``ValueError`` for a row with NaN or ``inf``, or without a finite value.
        """
        largest, likeliest = logits.max(dim=-1)
        for row, value in enumerate(largest.tolist()):  # max propagates NaN
            expect_finite(row, value)
        if self.temperature == 0:
            return likeliest
        probability, ids = self._weights(logits, largest)
        drawn = torch.multinomial(probability, 1, generator=self.generator)
        return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution that tokens are sampled from, ``[..., vocab]``. The temperature must not be 0."""
        probability, ids = self._weights(logits, logits.amax(dim=-1))
        probability = probability / probability.sum(dim=-1, keepdim=True)
        return (
            probability
            if ids is None
            else torch.zeros_like(logits, dtype=probability.dtype).scatter(-1, ids, probability)
        )

    def _weights(self, logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor | None]:
        """The relative probabilities of tokens, and their ids where these are not all in order."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # the maximum is subtracted first, so that a small temperature does not overflow
        logits = (logits - largest.unsqueeze(-1)) / max(self.temperature, torch.finfo(logits.dtype).tiny)
        limit = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
        ids = None
        if limit < logits.shape[-1] or self.top_p is not None:
            logits, ids = logits.topk(limit, dim=-1)
        probability = logits.softmax(dim=-1)
        if self.top_p is not None:
            # sorted: a token is kept while the sum before it is below top_p, so the first is always kept
            before = probability.cumsum(dim=-1) - probability
            probability = probability.masked_fill(before >= self.top_p, 0.0)
        return probability, ids


def expect_finite(row: int, value: float) -> None:
    """Raise ``ValueError`` unless the largest logit of a row is finite."""
    if not math.isfinite(value):
        raise ValueError(
            f"logits: the maximum of row {row} is {value}: expected a finite number (the given logits, the "
            "state or the weights of the model are not finite)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

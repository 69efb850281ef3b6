"""Asking a memory without teaching it (eq. 15): the network applied to queries at fixed weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .activation import ACTIVATIONS


def read_memory(q: Tensor, weights: tuple[Tensor, ...], activation: str = "gelu", norm: Tensor | None = None) -> Tensor:
    """``M(q)`` for every query on its own.

    Args:
        q: ``[batch, time, heads, d_in]``.
        weights: per layer ``[batch, heads, out, in]``.
        norm: ``None``, or the gain ``[heads, d_out]`` of ``M(x) = x + LN(net(x)) * gain``.

    Returns:
        ``[batch, time, heads, d_out]`` in the dtype of ``q``; computed in the weights' dtype.
    """
    x = q.transpose(1, 2).to(weights[0].dtype)
    h = x
    for layer, weight in enumerate(weights):
        if layer:
            h = ACTIVATIONS[activation].value(h)
        h = h @ weight.mT
    if norm is not None:
        h = x + F.layer_norm(h, h.shape[-1:], eps=1e-6) * norm.unsqueeze(1)
    return h.transpose(1, 2).to(q.dtype)

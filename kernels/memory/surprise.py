"""How surprising each token is to a memory: the norm of its gradient at given weights, without taking the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .chunk_network import layer_norm_pull, square_sum
from .read_torch import EPS


class Surprise(NamedTuple):
    """Of every token, ``[batch, time, heads]`` each."""

    norm: Tensor
    """Of the gradient of ``|M(k) - v|^2`` in all layers' weights together, before any clipping."""
    error: Tensor
    """``|M(k) - v|^2`` itself."""


def surprise_at(
    k: Tensor, v: Tensor, weights: Sequence[Tensor], activation: str, norm: Tensor | None = None
) -> Surprise:
    """The surprise of every token on its own at ``weights``; nothing is learned. Not meant to be differentiated.

    Args:
        k: ``[batch, time, heads, d_in]``; v: ``[batch, time, heads, d_out]``; both in the dtype of the weights.
        weights: per layer ``[batch, heads, out, in]``.
        activation, norm: as of ``titans_memory``.

    The gradient of layer l is ``2 d_l a_l^T``, from its input ``a_l`` and the error ``d_l`` that comes back to it, so
    its square is a product of two squares.
    """
    act = ACTIVATIONS[activation]
    key, value = k.transpose(1, 2), v.transpose(1, 2)
    inputs, hidden = [key], [key @ weights[0].mT]
    for weight in weights[1:]:
        inputs.append(act.value(hidden[-1]))
        hidden.append(inputs[-1] @ weight.mT)
    if norm is None:
        miss = back = hidden[-1] - value
    else:
        gain = norm.unsqueeze(1)
        n, _, inverse = torch.native_layer_norm(hidden[-1], hidden[-1].shape[-1:], None, None, EPS)
        miss = torch.addcmul(key, n, gain) - value
        back = layer_norm_pull(miss * gain, n, inverse)
    square = square_sum(back) * square_sum(inputs[-1])
    for layer in range(len(weights) - 2, -1, -1):
        back = act.pull(back @ weights[layer + 1], hidden[layer])
        square = square + square_sum(back) * square_sum(inputs[layer])
    return Surprise(2 * square.sqrt().transpose(1, 2), square_sum(miss).transpose(1, 2))

"""The short causal convolution: each channel looks at its own last few inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import Backend, Operation


def causal_convolution(x: Tensor, weight: Tensor, history: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``y[:, t, c] = sum_i weight[c, i] * input[:, t - width + 1 + i, c]``, where ``history`` comes before ``x``.

    ``x``: ``[batch, time, dim]``. ``weight``: ``[dim, width]``, its last column on the current token.
    ``history``: ``[batch, width - 1, dim]``, the inputs before ``x``; zeros if ``None``.
    Returns ``[batch, time, dim]``. Raises ``ValueError`` on shapes that do not fit.
    """
    if weight.dim() != 2 or x.dim() != 3 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"causal_convolution: x {list(x.shape)} and weight {list(weight.shape)}: "
            "expected [batch, time, dim] and [dim, width]"
        )
    before = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if history is None:
        history = x.new_zeros(before)
    elif history.shape != before:
        raise ValueError(f"causal_convolution: history {list(history.shape)}: expected {list(before)}")
    return _operation.choose(backend, device=x.device.type, dtype=x.dtype)(torch.cat((history, x), dim=1), weight)


def _reference(inputs: Tensor, weight: Tensor) -> Tensor:
    return F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=weight.shape[0]).transpose(1, 2)


def _shifted(inputs: Tensor, weight: Tensor) -> Tensor:
    """A sum of shifted products, which leaves time and channels where they are: no transposition."""
    width = weight.shape[1]
    time = inputs.shape[1] - width + 1
    taps = weight.t().contiguous()  # a tap is then one dense row
    if time == 1:
        return (inputs * taps).sum(dim=1, keepdim=True)
    y = inputs[:, :time] * taps[0]
    for tap in range(1, width):
        y = torch.addcmul(y, inputs[:, tap : tap + time], taps[tap])
    return y


_operation = Operation("convolution", [Backend("torch", _shifted), Backend("reference", _reference)])

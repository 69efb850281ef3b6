"""A linear map of a few tokens, which is as fast as its weights can be read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 2
"""Tokens up to which reading the weights is all that counts."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: ``x`` ``[..., in]``, ``weight`` ``[out, in]``, ``bias`` ``[out]`` or ``None``.

    The CPU's matrix-vector product reads weights that are not in a cache at half the speed at which its batched
    product does. With a token or two, the weights are therefore a batch of two halves, and tokens are columns.
    """
    out, width = weight.shape
    tokens = x.numel() // width
    if (
        tokens > _FEW
        or tokens == 0
        or out % 2
        or not x.is_cpu
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, weight, bias)
    columns = x.contiguous().as_strided((2, width, tokens), (0, 1, width))
    y = torch.bmm(weight.view(2, out // 2, width), columns)
    if tokens > 1:
        y = y.view(out, tokens).t()
    y = y.reshape(*x.shape[:-1], out)
    return y if bias is None else y.add_(bias)

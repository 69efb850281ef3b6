"""The decay matrices of a group of chunks on the Triton kernels, with gradients."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import needs_grad
from ...triton_runtime import launch
from ..decay_torch import ChunkDecay
from .decay_kernel import decay_backward_kernel, decay_kernel, decay_tiles

_Gates: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""``theta``, ``eta``, ``alpha``, and which tokens are real."""


def triton_decay(
    theta: Tensor, eta: Tensor | None, alpha: Tensor | None, real: Tensor | None, read_after: bool
) -> ChunkDecay:
    """``chunk_decay``: gates ``[..., b]`` in float32 or float64."""
    if needs_grad(theta, eta, alpha):
        return ChunkDecay(*_Decay.apply(theta, eta, alpha, real, read_after))
    return _matrices(theta, eta, alpha, real, read_after)[0]


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, real: Tensor | None, read_after: bool
    ) -> tuple[Tensor, ...]:
        shape = theta.shape
        kept = theta.new_empty(1 if eta is None else 2, *shape, shape[-1])
        started = theta.new_empty(1 if eta is None else 3, *shape)
        decay, gates = _matrices(theta, eta, alpha, real, read_after, kept, started)
        ctx.read_after = read_after
        ctx.save_for_backward(*gates, kept, started)
        return tuple(decay)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        theta, eta, alpha, real, kept, started = ctx.saved_tensors
        found = [None if x is None else torch.empty_like(x) for x in (theta, eta, alpha)]
        _run(
            decay_backward_kernel, (theta, eta, alpha, real), kept, started, *(x.contiguous() for x in grads), *found,
            AFTER=ctx.read_after,
        )  # fmt: skip
        return *found, None, None


def _matrices(
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    real: Tensor | None,
    read_after: bool,
    kept: Tensor | None = None,
    started: Tensor | None = None,
) -> tuple[ChunkDecay, _Gates]:
    """The matrices, and the gates as the kernel took them."""
    dense = lambda x: None if x is None else x.contiguous()  # noqa: E731
    gates = theta.contiguous(), dense(eta), dense(alpha), dense(real)
    (*several, b), parts = theta.shape, 1 if eta is None else 2
    shapes = (b, b), (b, parts), (b, parts), (parts, parts)
    decay = ChunkDecay(*(theta.new_empty(*several, *shape) for shape in shapes))
    _run(decay_kernel, gates, *decay, kept, started, AFTER=read_after, KEEP=kept is not None)
    return decay, gates


def _run(kernel: Any, gates: _Gates, *tensors: Tensor | None, **flags: bool) -> None:
    theta, eta, alpha, real = gates
    b = theta.shape[-1]
    problems = theta.numel() // b
    if not problems:
        return
    tiles = decay_tiles(b)
    launch(
        kernel, (triton.cdiv(problems, tiles["MANY"]),), *gates, *tensors, problems, b,
        MOMENTUM=eta is not None, FORGETTING=alpha is not None, MASKED=real is not None, **flags, **tiles,
        WIDE=tl.float64 if theta.dtype == torch.float64 else tl.float32,
    )  # fmt: skip

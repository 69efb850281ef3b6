"""The short causal convolution in Triton: each channel looks at its own last few inputs.

The story. A program takes ``CHANNELS`` channels of one row over a stretch of time, ``TIMES`` tokens at a time. Each tap
is the same tile, one token further on: it comes from the first level of the cache but for its edge. Backward is two of
these: the gradient of the inputs is the convolution of ``grad`` with the taps in reverse, and that of a tap a sum over
time of ``grad`` with the inputs. Each program adds up its own stretch, and the sums are added in one fixed order.

Bytes: forward reads the inputs and writes as many outputs; backward reads inputs and ``grad`` and writes the inputs'
gradient. ``2 width`` operations per number: bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..autograd import differentiable
from ..triton_runtime import VARYING, launch


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    inputs, weight, y,
    time, dim, batch_step, time_step,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``TIMES`` tokens of ``CHANNELS`` channels of one row."""
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TIMES + tl.arange(0, TIMES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (token < time)[:, None] & (channel < dim)[None, :]
    here = inputs + row * batch_step + token[:, None] * time_step + channel[None, :]
    total = tl.zeros((TIMES, CHANNELS), WIDE)
    for i in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * WIDTH + i, mask=channel < dim, other=0.0).to(WIDE)
        total += tl.load(here + i * time_step, mask=inside, other=0.0).to(WIDE) * tap[None, :]
    tl.store(y + (row * time + token[:, None]) * dim + channel[None, :], total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    inputs, weight, grad, grad_inputs, grad_weight,
    time, dim, batch_step, time_step, grad_batch_step, grad_time_step, stretch,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A stretch of the inputs of ``CHANNELS`` channels of one row; the taps' gradients are sums over it."""
    part, row = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = channel < dim
    length = time + WIDTH - 1  # of the inputs, history included
    tap_of = tl.arange(0, TAPS)
    sums = tl.zeros((TAPS, CHANNELS), WIDE)
    for start in range(0, stretch, TIMES):
        place = part * stretch + start + tl.arange(0, TIMES)  # among the inputs
        known = (place < length)[:, None] & within[None, :]
        x = tl.load(inputs + row * batch_step + place[:, None] * time_step + channel[None, :], mask=known, other=0.0)
        total = tl.zeros((TIMES, CHANNELS), WIDE)
        for i in tl.static_range(WIDTH):
            # this input is the i-th of token place - i
            token = place - i
            asked = ((token >= 0) & (token < time))[:, None] & within[None, :]
            there = grad + row * grad_batch_step + token[:, None] * grad_time_step + channel[None, :]
            g = tl.load(there, mask=asked, other=0.0).to(WIDE)
            tap = tl.load(weight + channel * WIDTH + i, mask=within, other=0.0).to(WIDE)
            total += g * tap[None, :]
            sums += tl.where((tap_of == i)[:, None], tl.sum(g * x.to(WIDE), axis=0)[None, :], 0.0)
        tl.store(grad_inputs + (row * length + place[:, None]) * dim + channel[None, :], total, mask=known)
    at = (part * tl.num_programs(2) + row) * dim * WIDTH + channel[None, :] * WIDTH + tap_of[:, None]
    tl.store(grad_weight + at, sums, mask=(tap_of < WIDTH)[:, None] & within[None, :])


PARTS = 64
"""Stretches of time of a row at most."""
_TIMES, _CHANNELS = 32, 64


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(x: Tensor) -> Tensor:
    """With the channels side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


@torch.library.custom_op("titans_build::convolution", mutates_args=())
def convolution_operator(inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs`` ``[batch, width - 1 + time, dim]``, ``weight`` ``[dim, width]`` -> ``[batch, time, dim]``."""
    (batch, length, dim), width = inputs.shape, weight.shape[1]
    inputs, weight = _rows(inputs), weight.contiguous()
    y = inputs.new_empty(batch, length - width + 1, dim)
    if y.numel():
        launch(
            forward_kernel, (triton.cdiv(y.shape[1], _TIMES), triton.cdiv(dim, _CHANNELS), batch),
            inputs, weight, y, y.shape[1], dim, inputs.stride(0), inputs.stride(1),
            WIDTH=width, WIDE=_wide(inputs.dtype), TIMES=_TIMES, CHANNELS=_CHANNELS,
        )  # fmt: skip
    return y


@convolution_operator.register_fake
def _(inputs, weight):
    return inputs.new_empty(inputs.shape[0], inputs.shape[1] - weight.shape[1] + 1, inputs.shape[2])


@torch.library.custom_op("titans_build::convolution_backward", mutates_args=())
def convolution_backward_operator(grad: Tensor, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and weight."""
    (batch, length, dim), width = inputs.shape, weight.shape[1]
    grad, inputs, weight = _rows(grad), _rows(inputs), weight.contiguous()
    stretch = triton.cdiv(triton.cdiv(length, _TIMES), PARTS) * _TIMES
    parts = triton.cdiv(length, stretch)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    grad_inputs = inputs.new_empty(batch, length, dim)
    sums = inputs.new_empty((parts, batch, dim, width), dtype=wide)
    if sums.numel():
        launch(
            backward_kernel, (parts, triton.cdiv(dim, _CHANNELS), batch),
            inputs, weight, grad, grad_inputs, sums, length - width + 1, dim,
            inputs.stride(0), inputs.stride(1), grad.stride(0), grad.stride(1), stretch,
            WIDTH=width, TAPS=triton.next_power_of_2(width), WIDE=_wide(inputs.dtype),
            TIMES=_TIMES, CHANNELS=_CHANNELS,
        )  # fmt: skip
    return grad_inputs, sums.sum((0, 1)).to(weight.dtype)


@convolution_backward_operator.register_fake
def _(grad, inputs, weight):
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@differentiable(lambda ctx, inputs, weight: F.conv1d(inputs.mT, weight[:, None], groups=len(weight)).mT)
def _backward(ctx, grad):
    return convolution_backward_operator(grad, *ctx.saved_tensors)


convolution_operator.register_autograd(_backward, setup_context=_keep)


def convolve(inputs: Tensor, weight: Tensor) -> Tensor:
    """``convolution.convolve`` on the kernel."""
    y: Tensor = convolution_operator(inputs, weight)
    return y

"""The short causal convolution in Triton, alone and as queries, keys and values of a memory.

A program takes one head of one row over a stretch of time, ``TIMES`` tokens at a time: convolution, SiLU, and for
queries and keys the unit length of the head. Each tap is the same tile, one token further on: it comes from the first
level of the cache but for its edge. The history before the first token is a tensor of its own, so that nothing is
joined, and the inputs may be of half precision. Backward keeps nothing but its inputs. It computes the gradient of a
convolved token once for each input that the token saw, and a tap's gradient as a sum over the stretch; the sums of the
stretches are added in one fixed order.

Bytes: forward reads the inputs and writes as many outputs; backward reads inputs and gradients and writes the inputs'
gradient. Some ten operations per number and tap: bound by memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..autograd import differentiable
from ..padding import last
from ..triton_runtime import VARYING, launch


@triton.jit
def _inputs(x, history, place, column, inside, x_step, h_step, BEFORE: tl.constexpr, WIDE: tl.constexpr):
    """The inputs at ``place``, which counts from the first of the history on."""
    place = place[:, None].to(tl.int64)
    new = tl.load(x + (place - BEFORE) * x_step + column, mask=inside & (place >= BEFORE), other=0.0).to(WIDE)
    if BEFORE == 0:
        return new
    return new + tl.load(history + place * h_step + column, mask=inside & (place < BEFORE), other=0.0).to(WIDE)


@triton.jit
def _tap(weight, column, within, i, WIDTH: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr):
    if GIVEN:
        return tl.load(weight + column * WIDTH + i, mask=within, other=0.0).to(WIDE)
    return tl.full(column.shape, 1.0, WIDE)


@triton.jit
def _convolved(
    x, history, weight, token, column, within, time, x_step, h_step,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, FIXED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The convolution at ``token``; with ``FIXED``, each token comes right after the history."""
    inside = ((token >= 0) & (token < time))[:, None] & within
    total = tl.zeros((token.shape[0], column.shape[1]), WIDE)
    for i in tl.static_range(WIDTH):
        place = token * 0 + i if FIXED and i < WIDTH - 1 else token + i
        x_i = _inputs(x, history, place, column, inside, x_step, h_step, WIDTH - 1, WIDE)
        total += x_i * _tap(weight, column, within, i, WIDTH, GIVEN, WIDE)
    return total, inside


@triton.jit
def _activated(z, is_unit, EPS: tl.constexpr):
    """``silu(z)`` and its sigmoid, and what it is multiplied by: 1, or what gives ``is_unit`` heads unit length."""
    s = 1 / (1 + tl.exp(-z))
    y = z * s
    return y, s, tl.where(is_unit, 1 / tl.sqrt(tl.sum(y * y, axis=1) + EPS), 1.0)[:, None]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x, history, weight, length, first, second, third, after,
    time, heads, units, dim, channels, own, x_row, x_step, h_row, h_step,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, FIXED: tl.constexpr, SILU: tl.constexpr, AFTER: tl.constexpr,
    MASKED: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """``TIMES`` tokens of one head. ``first``, ``second`` and ``third`` have ``heads`` heads each, ``own`` channels;
    the first ``units`` heads of all have unit length. ``after``: the inputs that the next token sees."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, CHANNELS)
    column = (head * dim + at)[None, :]
    within = (at < dim)[None, :] & (column < channels)
    x += row * x_row
    history += row * h_row
    token = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    y, inside = _convolved(x, history, weight, token, column, within, time, x_step, h_step, WIDTH, GIVEN, FIXED, WIDE)
    if SILU:
        y, _, factor = _activated(y, head < units, EPS)
        y *= factor
    part = head // heads
    y_at = (row * time + token[:, None].to(tl.int64)) * own + column - part * own
    out = first + 0
    if part == 1:
        out = second + 0
    if part == 2:
        out = third + 0
    tl.store(out + y_at, y, mask=inside)
    if AFTER:
        j = tl.arange(0, TAPS)
        kept = (j < tl.where(tl.program_id(0) == 0, WIDTH - 1, 0))[:, None] & within
        end = tl.load(length + row) if MASKED else time
        last = _inputs(x, history, end + j, column, kept, x_step, h_step, WIDTH - 1, WIDE)
        tl.store(after + (row * (WIDTH - 1) + j[:, None]) * channels + column, last, mask=kept)


@triton.jit
def _pushed(
    grad, x, history, weight, token, column, column_of_part, within, is_unit, time, step, x_step, h_step,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, FIXED: tl.constexpr, SILU: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution at ``token``."""
    z, inside = _convolved(x, history, weight, token, column, within, time, x_step, h_step, WIDTH, GIVEN, FIXED, WIDE)
    g = tl.load(grad + token[:, None].to(tl.int64) * step + column_of_part, mask=inside, other=0.0).to(WIDE)
    if SILU:
        y, s, factor = _activated(z, is_unit, EPS)
        along = tl.where(is_unit, tl.sum(g * y, axis=1), 0.0)[:, None]
        g = tl.where(inside, (g * factor - y * (factor * factor * factor) * along) * (s + z * s * (1 - s)), 0.0)
    return g


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    x, history, weight, length, first, second, third, grad_after, grad_x, grad_history, grad_weight,
    time, heads, units, dim, channels, own, x_row, x_step, h_row, h_step,
    first_row, first_step, second_row, second_step, third_row, third_step, stretch,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, FIXED: tl.constexpr, SILU: tl.constexpr, AFTER: tl.constexpr,
    MASKED: tl.constexpr, EPS: tl.constexpr,
    WIDE: tl.constexpr, TIMES: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A stretch of the inputs of one head; the gradients of taps are sums over it.

    ``first``, ``second``, ``third``: the gradients of the outputs. With ``FIXED``, channels from ``own`` on have no
    inputs, and the gradient of the history is a sum, too.
    """
    number, head, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    at = tl.arange(0, CHANNELS)
    column = (head * dim + at)[None, :]
    within = (at < dim)[None, :] & (column < channels)
    part = head // heads
    grad, row_step, step = first + 0, first_row, first_step
    if third is not None:
        if part == 1:
            grad, row_step, step = second + 0, second_row, second_step
        if part == 2:
            grad, row_step, step = third + 0, third_row, third_step
    grad += row * row_step
    column_of_part = column - part * own
    x += row * x_row
    history += row * h_row
    BEFORE: tl.constexpr = WIDTH - 1
    tap_of = tl.arange(0, TAPS)
    sums = tl.zeros((TAPS, CHANNELS), WIDE)
    whole = tl.zeros((CHANNELS,), WIDE)
    of_x = own if FIXED else channels
    count = stretch
    if FIXED:
        count = tl.where(part == 0, stretch, 0)
    for start in range(0, count, TIMES):
        place = (number * stretch + start + tl.arange(0, TIMES)).to(tl.int32)  # counts from the history's first
        if FIXED:
            place += BEFORE
        known = (place < time + BEFORE)[:, None] & within
        here = _inputs(x, history, place, column, known, x_step, h_step, BEFORE, WIDE)
        total = tl.zeros((TIMES, CHANNELS), WIDE)
        for i in range(BEFORE if FIXED else 0, WIDTH):
            # this input is the i-th that the token sees
            g = _pushed(
                grad, x, history, weight, place - i, column, column_of_part, within, head < units, time, step,
                x_step, h_step, WIDTH, GIVEN, FIXED, SILU, EPS, WIDE,
            )  # fmt: skip
            total += g * _tap(weight, column, within, i, WIDTH, GIVEN, WIDE)
            sums += tl.where((tap_of == i)[:, None], tl.sum(g * here, axis=0)[None, :], 0.0)
            if FIXED:
                whole += tl.sum(g, axis=0)
        if AFTER:
            end = tl.load(length + row) if MASKED else time
            j = place - end
            ours = ((j >= 0) & (j < BEFORE))[:, None] & known
            total += tl.load(grad_after + (row * BEFORE + j[:, None]) * channels + column, mask=ours, other=0.0).to(
                WIDE
            )
        new = known & (place >= BEFORE)[:, None]
        tl.store(grad_x + (row * time + place[:, None].to(tl.int64) - BEFORE) * of_x + column, total, mask=new)
        if BEFORE > 0 and not FIXED:
            old = known & (place < BEFORE)[:, None]
            tl.store(grad_history + (row * BEFORE + place[:, None]) * channels + column, total, mask=old)
    if GIVEN:
        if FIXED and BEFORE > 0:
            early = (tap_of < BEFORE)[:, None] & within
            at_tap = column * WIDTH + tap_of[:, None]
            taps = tl.load(weight + at_tap, mask=early, other=0.0).to(WIDE)
            past = tl.load(history + tap_of[:, None].to(tl.int64) * h_step + column, mask=early, other=0.0).to(WIDE)
            sums += past * whole[None, :]
            there = ((number * tl.num_programs(2) + row) * BEFORE + tap_of[:, None]) * channels + column
            tl.store(grad_history + there, taps * whole[None, :], mask=early)
        there = ((number * tl.num_programs(2) + row) * channels + column) * WIDTH + tap_of[:, None]
        tl.store(grad_weight + there, sums, mask=(tap_of < WIDTH)[:, None] & within)


PARTS = 64
"""Stretches of time of a row at most."""
COLUMNS = 64
"""Channels of a program where there are no heads."""


class Shape(NamedTuple):
    """What is computed of ``x``."""

    parts: int
    """Outputs, equal parts of the channels of ``x``: 1, or 3."""
    heads: int
    """Of each output."""
    dim: int
    """Of a head."""
    units: int
    """The first heads of all have unit length."""
    fixed: bool
    """The history comes before every token. It and the weight may have more channels than ``x``."""
    silu: bool
    eps: float
    """In the unit length."""


def tiles(dim: int) -> tuple[int, int]:
    """Tokens at a time, and the width of a head in registers."""
    width = triton.next_power_of_2(dim)
    return max(1, min(32, 2048 // width)), width


def _rows(x: Tensor) -> Tensor:
    """With the channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _constants(
    x: Tensor, weight: Tensor | None, history: Tensor | None, length: Tensor | None, shape: Shape, after: bool
) -> dict[str, Any]:
    width, (times, register) = 1 if weight is None else weight.shape[1], tiles(shape.dim)
    return dict(
        WIDTH=width, GIVEN=weight is not None, FIXED=shape.fixed, SILU=shape.silu, AFTER=after and width > 1,
        MASKED=length is not None, EPS=shape.eps,
        WIDE=tl.float64 if _wide(x, weight, history) == torch.float64 else tl.float32,
        TIMES=times, CHANNELS=register, TAPS=triton.next_power_of_2(width),
    )  # fmt: skip


def _results(x: Tensor, weight: Tensor | None, history: Tensor | None, parts: int, fixed: bool) -> list[Tensor]:
    """Empty outputs. Those that are not there have no number: an operator may not return one tensor twice."""
    like, (batch, time, channels) = x if weight is None else weight, x.shape
    y = [like.new_empty((batch, time, channels // parts) if i < parts else 0) for i in range(3)]
    return [*y, like.new_empty(0) if history is None or fixed else history.new_empty(history.shape)]


def run_forward(
    x: Tensor, weight: Tensor | None, history: Tensor | None, length: Tensor | None,
    parts: int, heads: int, dim: int, units: int, fixed: bool, silu: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Three outputs ``[batch, time, channels / parts]`` in the dtype of the weight, and the next history.

    ``x`` ``[batch, time, channels]``, ``weight`` ``[channels, width]``, ``history`` ``[batch, width - 1, channels]``,
    ``length`` ``[batch]``: the real tokens of each row. The others are the fields of ``Shape``.
    """
    shape = Shape(parts, heads, dim, units, fixed, silu, eps)
    *y, after = _results(x, weight, history, parts, fixed)
    (batch, time, channels), x = x.shape, _rows(x)
    past = x if history is None else _rows(history)
    constants = _constants(x, weight, history, length, shape, not fixed)
    if x.numel() or after.numel():
        launch(
            forward_kernel, (max(1, triton.cdiv(time, constants["TIMES"])), triton.cdiv(channels, dim), batch),
            x, past, None if weight is None else weight.contiguous(), length, *y, after,
            time, heads, units, dim, channels, channels // parts, *x.stride()[:2], *past.stride()[:2], **constants,
        )  # fmt: skip
    return y[0], y[1], y[2], after


def run_backward(
    first: Tensor | None, second: Tensor | None, third: Tensor | None, grad_after: Tensor | None,
    x: Tensor, weight: Tensor | None, history: Tensor | None, length: Tensor | None,
    parts: int, heads: int, dim: int, units: int, fixed: bool, silu: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``x``, weight and history from those of the outputs; empty where there is none of these."""
    shape = Shape(parts, heads, dim, units, fixed, silu, eps)
    (batch, time, channels), x = x.shape, _rows(x)
    past = x if history is None else _rows(history)
    every = channels if weight is None else len(weight)
    grads = [
        x.new_zeros(batch, time, channels // parts) if g is None else _rows(g) for g in (first, second, third)[:parts]
    ]
    constants = _constants(x, weight, history, length, shape, grad_after is not None)
    width, times = constants["WIDTH"], constants["TIMES"]
    places = time if fixed else time + width - 1
    stretch = max(1, triton.cdiv(triton.cdiv(places, times), PARTS)) * times
    several = max(1, triton.cdiv(places, stretch))
    wide = _wide(x, weight, history)
    grad_x = x.new_empty(x.shape)
    sums = x.new_empty(0 if weight is None else (several, batch, every, width), dtype=wide)
    if history is None:
        grad_history = x.new_empty(0)
    elif fixed:
        grad_history = history.new_empty(several, batch, width - 1, every)
    else:
        grad_history = history.new_empty(history.shape)
    if x.numel() or grad_history.numel():
        steps = [step for g in grads for step in g.stride()[:2]]
        launch(
            backward_kernel, (several, triton.cdiv(every, dim), batch),
            x, past, None if weight is None else weight.contiguous(), length, *grads, *[None] * (3 - parts),
            None if grad_after is None else grad_after.contiguous(), grad_x, grad_history, sums,
            time, heads, units, dim, every, channels // parts, *x.stride()[:2], *past.stride()[:2],
            *steps, *[0] * (6 - len(steps)), stretch, **constants,
        )  # fmt: skip
    if history is not None and fixed:
        grad_history = grad_history.sum(0) if several > 1 else grad_history[0]
    return grad_x, sums if weight is None else sums.sum((0, 1)).to(weight.dtype), grad_history


forward_operator = torch.library.custom_op("titans_build::convolution", run_forward, mutates_args=())
backward_operator = torch.library.custom_op("titans_build::convolution_backward", run_backward, mutates_args=())


@forward_operator.register_fake
def _(x, weight, history, length, parts, heads, dim, units, fixed, silu, eps):
    return tuple(_results(x, weight, history, parts, fixed))


@backward_operator.register_fake
def _(first, second, third, grad_after, x, weight, history, *others):
    empty = lambda like: x.new_empty(0) if like is None else like.new_empty(like.shape)  # noqa: E731
    return empty(x), empty(weight), empty(history)


def _keep(ctx, inputs, output):
    x, weight, history, length, *shape = inputs
    ctx.save_for_backward(x, weight, history, length)
    ctx.shape = Shape(*shape)
    ctx.set_materialize_grads(False)


def _formula(ctx, x, weight, history):
    """The outputs, in differentiable operators."""
    shape, length, after = ctx.shape, ctx.saved_tensors[3], None
    if weight is not None:
        x, before = x.to(weight.dtype), weight.shape[1] - 1
        if shape.fixed:
            taps = weight[: x.shape[2]].t()
            x = (history[..., : x.shape[2]] * taps[:-1]).sum(1, keepdim=True) + x * taps[-1]
        else:
            past = torch.cat((history, x), dim=1)
            after = past[:, x.shape[1] :] if length is None else last(past, length + before, before)
            x = F.conv1d(past.mT, weight[:, None], groups=len(weight)).mT
    if shape.silu:
        unit, rest = F.silu(x).unflatten(2, (-1, shape.dim)).tensor_split((shape.units,), dim=2)
        unit = unit / torch.sqrt(unit.square().sum(-1, keepdim=True) + shape.eps)
        x = torch.cat((unit, rest), dim=2).flatten(2)
    return *x.chunk(shape.parts, dim=2), *([] if shape.parts == 1 else [after])


@differentiable(_formula, stop=3)
def _backward(ctx, *grads):
    x, weight, history, length = ctx.saved_tensors
    found = backward_operator(*grads, x, weight, history, length, *ctx.shape)
    return *(g if like is not None else None for g, like in zip(found, (x, weight, history))), *[None] * 8


forward_operator.register_autograd(_backward, setup_context=_keep)


def convolve(inputs: Tensor, weight: Tensor) -> Tensor:
    """``convolve`` of ``inputs`` that begin with their history."""
    before, channels = weight.shape[1] - 1, inputs.shape[2]
    shape = Shape(1, triton.cdiv(channels, COLUMNS), COLUMNS, 0, False, False, 0.0)
    y: Tensor = forward_operator(inputs[:, before:], weight, inputs[:, :before], None, *shape)[0]
    return y


def query_key_value(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, length: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``query_key_value`` on the kernel."""
    dim = projected.shape[2] // (3 * heads)
    given = (None, None) if weight is None or history is None else (weight, history)
    *qkv, after = forward_operator(projected, *given, length, *Shape(3, heads, dim, 2 * heads, False, True, eps))
    q, k, v = (x.unflatten(2, (heads, dim)) for x in qkv)
    return q, k, v, None if given[1] is None else after


def query(projected: Tensor, weight: Tensor | None, history: Tensor | None, heads: int, eps: float) -> Tensor:
    """``query`` on the kernel."""
    dim = projected.shape[2] // heads
    given = (None, None) if weight is None or history is None else (weight, history)
    y: Tensor = forward_operator(projected, *given, None, *Shape(1, heads, dim, heads, True, True, eps))[0]
    return y.unflatten(2, (heads, dim))

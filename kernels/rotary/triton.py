"""Heads of queries or keys, normalized and rotated, in Triton: ``normed_rotation`` in one pass over memory each way.

A program takes one head of one row over a stretch of time, ``TIMES`` tokens at a time. A number and its partner in the
rotation are half a head apart: the tile is loaded twice, the second time from the first level of the cache. Backward
normalizes again, and adds up the gradient of the gain over its stretch; the sums are added in one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import differentiable
from ..triton_runtime import VARYING, launch


@triton.jit
def _tile(x, token, column, inside, step, WIDE: tl.constexpr):
    return tl.load(x + token[:, None].to(tl.int64) * step + column[None, :], mask=inside, other=0.0).to(WIDE)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    x, gain, cos, sin, y, plain,
    time, heads, dim, first, x_row, x_step, turn_row, turn_step,
    EPS: tl.constexpr, PLAIN: tl.constexpr, WIDE: tl.constexpr, TIMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``TIMES`` tokens of one head. ``plain``: the numbers before they are rotated."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, at = tl.program_id(0) * TIMES + tl.arange(0, TIMES), tl.arange(0, WIDTH)
    partner = tl.where(at < dim // 2, at + dim // 2, at - dim // 2)
    within = at < dim
    inside = (token < time)[:, None] & within[None, :]
    x += row * x_row + head * dim
    gain += (first + head) * dim
    n = _tile(x, token, at, inside, x_step, WIDE)
    inverse = 1 / tl.sqrt(tl.sum(n * n, axis=1) / dim + EPS)[:, None]
    n *= inverse * tl.load(gain + at, mask=within, other=0.0).to(WIDE)[None, :]
    m = _tile(x, token, partner, inside, x_step, WIDE) * inverse
    m *= tl.load(gain + partner, mask=within, other=0.0).to(WIDE)[None, :]
    c = _tile(cos + row * turn_row, token, at, inside, turn_step, WIDE)
    s = _tile(sin + row * turn_row, token, at, inside, turn_step, WIDE)
    there = ((row * time + token[:, None]) * heads + head) * dim + at[None, :]
    tl.store(y + there, n * c + m * s, mask=inside)
    if PLAIN:
        tl.store(plain + there, n, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad, grad_plain, x, gain, cos, sin, grad_x, grad_gain,
    time, heads, dim, first, x_row, x_step, turn_row, turn_step, grad_row, grad_step, plain_row, plain_step, stretch,
    EPS: tl.constexpr, PLAIN: tl.constexpr, WIDE: tl.constexpr, TIMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A stretch of time of one of the gain's heads, of which ``heads`` from ``first`` on are those of ``x``."""
    number, of_gain, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, at = of_gain - first, tl.arange(0, WIDTH)
    partner = tl.where(at < dim // 2, at + dim // 2, at - dim // 2)
    within = at < dim
    x += row * x_row + head * dim
    grad += row * grad_row + head * dim
    cos += row * turn_row
    sin += row * turn_row
    g = tl.load(gain + of_gain * dim + at, mask=within, other=0.0).to(WIDE)[None, :]
    total = tl.zeros((WIDTH,), WIDE)
    count = tl.where((head >= 0) & (head < heads), stretch, 0)
    for start in range(0, count, TIMES):
        token = number * stretch + start + tl.arange(0, TIMES)
        inside = (token < time)[:, None] & within[None, :]
        n = _tile(x, token, at, inside, x_step, WIDE)
        inverse = 1 / tl.sqrt(tl.sum(n * n, axis=1) / dim + EPS)[:, None]
        pushed = _tile(grad, token, at, inside, grad_step, WIDE) * _tile(cos, token, at, inside, turn_step, WIDE)
        turned = _tile(grad, token, partner, inside, grad_step, WIDE)
        pushed += turned * _tile(sin, token, partner, inside, turn_step, WIDE)
        if PLAIN:
            pushed += _tile(grad_plain + row * plain_row + head * dim, token, at, inside, plain_step, WIDE)
        total += tl.sum(pushed * n * inverse, axis=0)
        pushed *= g
        along = tl.sum(pushed * n, axis=1)[:, None] / dim
        there = ((row * time + token[:, None]) * heads + head) * dim + at[None, :]
        tl.store(grad_x + there, inverse * pushed - n * (inverse * inverse * inverse) * along, mask=inside)
    sums = ((number * tl.num_programs(2) + row) * tl.num_programs(1) + of_gain) * dim
    tl.store(grad_gain + sums + at, total, mask=within)


PARTS = 64
"""Stretches of time of a row at most."""


def tiles(dim: int) -> dict[str, int]:
    """Tokens at a time, and the width of a head in registers."""
    width = triton.next_power_of_2(dim)
    return dict(TIMES=max(1, min(32, 2048 // width)), WIDTH=width)


def _heads(x: Tensor) -> Tensor:
    """``[batch, time, heads, dim]`` with all numbers of a token side by side."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _wide(x: Tensor, gain: Tensor) -> torch.dtype:
    """The dtype that is computed in."""
    return torch.float64 if torch.float64 in (x.dtype, gain.dtype) else torch.float32


def _constants(x: Tensor, gain: Tensor, eps: float) -> dict[str, object]:
    return dict(EPS=eps, WIDE=tl.float64 if _wide(x, gain) == torch.float64 else tl.float32, **tiles(x.shape[3]))


def _turns(cos: Tensor) -> tuple[int, int]:
    """From row to row, and from token to token, of ``[batch or 1, time, 1, dim]``."""
    return 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)


def run_forward(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, first: int, plain: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """``x`` normalized and rotated, and if ``plain``, not rotated; else a tensor without numbers.

    ``x`` ``[batch, time, heads, dim]``; ``gain``: that of its heads are the rows from ``first`` on; ``cos``, ``sin``
    ``[batch or 1, time, 1, dim]``, the signs of the rotation included.
    """
    x, gain = _heads(x), gain.contiguous()
    batch, time, heads, dim = x.shape
    y, unturned = x.new_empty(batch, time, heads, dim), x.new_empty(x.shape if plain else 0)
    if x.numel():
        constants = _constants(x, gain, eps)
        launch(
            forward_kernel, (triton.cdiv(time, constants["TIMES"]), heads, batch),
            x, gain, cos, sin, y, unturned, time, heads, dim, first, *x.stride()[:2], *_turns(cos),
            PLAIN=plain, **constants,
        )  # fmt: skip
    return y, unturned


def run_backward(
    grad: Tensor, grad_plain: Tensor | None, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, first: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the whole gain."""
    x, grad, dense = _heads(x), _heads(grad), gain.contiguous()
    grad_plain = None if grad_plain is None else _heads(grad_plain)
    batch, time, heads, dim = x.shape
    constants = _constants(x, gain, eps)
    times = constants["TIMES"]
    stretch = max(1, triton.cdiv(triton.cdiv(time, times), PARTS)) * times
    parts = max(1, triton.cdiv(time, stretch))
    grad_x = x.new_empty(batch, time, heads, dim)
    sums = x.new_empty(parts, batch, len(gain), dim, dtype=_wide(x, gain))
    if batch:
        launch(
            backward_kernel, (parts, len(gain), batch),
            grad, grad_plain, x, dense, cos, sin, grad_x, sums, time, heads, dim, first, *x.stride()[:2],
            *_turns(cos), *grad.stride()[:2], *((0, 0) if grad_plain is None else grad_plain.stride()[:2]), stretch,
            PLAIN=grad_plain is not None, **constants,
        )  # fmt: skip
    return grad_x, sums.sum((0, 1)).to(gain.dtype)


forward_operator = torch.library.custom_op("titans_build::normed_rotation", run_forward, mutates_args=())
backward_operator = torch.library.custom_op("titans_build::normed_rotation_backward", run_backward, mutates_args=())


@forward_operator.register_fake
def _(x, gain, cos, sin, first, plain, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape if plain else 0)


@backward_operator.register_fake
def _(grad, grad_plain, x, gain, cos, sin, first, eps):
    return x.new_empty(x.shape), gain.new_empty(gain.shape)


def _keep(ctx, inputs, output):
    x, gain, cos, sin, ctx.first, ctx.plain, ctx.eps = inputs
    ctx.save_for_backward(x, gain, cos, sin)
    ctx.set_materialize_grads(False)


def _formula(ctx, x, gain):
    _, _, cos, sin = ctx.saved_tensors
    dim = x.shape[3]
    n = x / torch.sqrt(x.square().mean(-1, keepdim=True) + ctx.eps) * gain[ctx.first : ctx.first + x.shape[2]]
    return n * cos + n.roll(dim // 2, dims=-1) * sin, n if ctx.plain else n.new_empty(0)


@differentiable(_formula, stop=2)
def _backward(ctx, grad, grad_plain):
    pushed = grad_plain if ctx.plain else None
    grad = torch.zeros_like(ctx.saved_tensors[0]) if grad is None else grad
    return *backward_operator(grad, pushed, *ctx.saved_tensors, ctx.first, ctx.eps), *[None] * 5


forward_operator.register_autograd(_backward, setup_context=_keep)


def normed_rotation(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, first: int, plain: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """``normed_rotation`` on the kernel."""
    y, unturned = forward_operator(x, gain, cos, sin, first, plain, eps)
    return y, unturned if plain else None

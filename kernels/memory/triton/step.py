"""One token on a Triton kernel, in one launch and without gradients. Does not wait for the GPU.

A program has one head of one batch row. It takes the key through the anchor's weights, ``BLOCK`` hidden units at
a time, and then goes over the state once: for each block of hidden units it takes the error back, updates weights and
momentum, and reads them with the query. All products are of matrices and vectors, so that the time is that of moving
the state: weights, momentum and anchor are read and written once each, ``12 d width`` float32 numbers for a network ``d
-> width -> d`` (``8 d width`` with chunks of one token, which have no anchor). What is needed again comes from the
cache: the anchor's last layer and, where the chunk starts, the weights.

The kernel itself finds out where a batch row is in its chunk. The anchor is therefore written at every token, though
it only changes at the ends of chunks: that is faster than waiting for the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import advanced
from ...triton_runtime import VARYING, launch
from ..network_torch import ACTIVATION_NUMBERS, READ_NUMBERS
from ..state import MemoryState, Options, Tokens
from .schedule import loss_constants, schedule
from .tiles import (
    activate,
    clip_scale,
    gradient_norm,
    layer_norm,
    length,
    load,
    output_error,
    slope,
    square_sums,
    store,
)


def triton_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for ``time = 1`` and one or two layers, without gradients."""
    q, k, v, theta, eta, alpha, *_ = tokens
    chunk, activation, clip, read, _, _, _, objective, *_ = options
    batch, _, heads, d_in = q.shape
    layers, (d_out, width) = len(state.weights), state.weights[-1].shape[2:]
    y = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    old = [_dense(part) for part in (state.weights, state.momentum if eta is not None else (), state.anchor)]
    new = [[torch.empty_like(x) for x in part] for part in old[: 2 if chunk == 1 else 3]]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if batch * heads:
        tiles = schedule(step_kernel.__name__, 1, d_in, width, d_out)
        launch(
            step_kernel, (batch * heads,),
            q, k, v, theta, eta, alpha, None if norm is None else norm.contiguous(), mask, state.position.contiguous(),
            *(x for part in old for x in _two(part)), y, *(x for part in new for x in _two(part)),
            *([None, None] if chunk == 1 else []), torch.empty(batch, heads, width, dtype=y.dtype, device=y.device),
            heads, d_in, width, d_out, chunk,
            *(n for x in (q, k, v, theta, eta, alpha) for n in _steps(x)), 0 if mask is None else mask.stride(0),
            LAYERS=layers, ACTIVATION=ACTIVATION_NUMBERS[activation], MOMENTUM=eta is not None,
            FORGETTING=alpha is not None,
            NORM=norm is not None, CLIP=clip, MASKED=mask is not None, ANCHORED=chunk > 1,
            READ=READ_NUMBERS[read], WIDE=tl.float64 if y.dtype == torch.float64 else tl.float32,
            **loss_constants(objective),
            **{name: tiles[name] for name in ("IN", "OUT", "BLOCK", "num_warps", "num_stages")},
        )  # fmt: skip
    weights, momentum, *anchor = map(tuple, new)
    return y, MemoryState(
        weights,
        state.momentum if eta is None else momentum,
        # with chunks of one token the anchor is the weights, except at a masked token
        anchor[0] if anchor else _anchor(weights, state, mask),
        advanced(state.position, 1) if mask is None else state.position + mask[:, 0],
    )


def _anchor(weights: tuple[Tensor, ...], state: MemoryState, mask: Tensor | None) -> tuple[Tensor, ...]:
    if mask is None:
        return weights
    valid = mask.view(-1, 1, 1, 1)
    return tuple([torch.where(valid, new, old) for new, old in zip(weights, state.anchor)])


def _dense(part: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.contiguous() for x in part]


def _two(layers: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The two layers' tensors; one layer stands in the second's place."""
    return (layers[0], layers[-1]) if layers else (None, None)


def _steps(x: Any) -> tuple[int, int]:
    """From batch row to batch row and from head to head, of ``[batch, 1, heads, ...]``."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


_AFTER, _ANCHOR = tl.constexpr(READ_NUMBERS["after"]), tl.constexpr(READ_NUMBERS["anchor"])


# -- kernel ----------------------------------------------------------------------------------------------------


@triton.jit
def _vector(x, column, columns, WIDE: tl.constexpr):
    return tl.load(x + column, mask=column < columns, other=0.0).to(WIDE)


@triton.jit
def _times(matrix, x):
    """``matrix x``."""
    return tl.sum(matrix * x[None, :], axis=1)


@triton.jit
def _transposed_times(matrix, g):
    """``matrix^T g``."""
    return tl.sum(matrix * g[:, None], axis=0)


@triton.jit
def _update(weight, momentum, new_weight, new_momentum, new_anchor, r, c, rows, columns,
          added, momentum_decay, retention, valid, ends,
          MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr, ANCHORED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile of a layer before and after the token; a masked token changes nothing, whatever its values."""
    old = load(weight, r, c, rows, columns, WIDE)
    moved = added
    if MOMENTUM:
        before = load(momentum, r, c, rows, columns, WIDE)
        moved += momentum_decay * before
        store(new_momentum, r, c, rows, columns, tl.where(valid, moved, before))
    new = old
    if FORGETTING:
        new = retention * old
    new = tl.where(valid, new + moved, old)
    store(new_weight, r, c, rows, columns, new)
    if ANCHORED:  # known when compiling, and the rest is not  # noqa: SIM102
        if ends:
            store(new_anchor, r, c, rows, columns, new)
    return old, new


@triton.jit(do_not_specialize=VARYING)
def step_kernel(
    q, k, v, theta, eta, alpha, gain, mask, position,
    weight_1, weight_2, momentum_1, momentum_2, anchor_1, anchor_2,
    y, new_weight_1, new_weight_2, new_momentum_1, new_momentum_2, new_anchor_1, new_anchor_2, hidden,
    heads, d_in, width, d_out, chunk,
    q_row, q_head, k_row, k_head, v_row, v_head,
    theta_row, theta_head, eta_row, eta_head, alpha_row, alpha_head, mask_row,
    LAYERS: tl.constexpr, ACTIVATION: tl.constexpr, MOMENTUM: tl.constexpr, FORGETTING: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, MASKED: tl.constexpr, ANCHORED: tl.constexpr, READ: tl.constexpr,
    LOSS: tl.constexpr, POWER: tl.constexpr, DELTA: tl.constexpr, SMOOTH: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head of one batch row. Depth 2: ``d_in -> width -> d_out``; depth 1, ``width -> d_out``, in layer 2's place.

    State tensors are dense ``[batch, heads, out, in]``; ``*_row`` and ``*_head`` are steps from batch row to batch row
    and from head to head. ``ANCHORED``: chunks are longer than one token. ``hidden``: room for ``width`` numbers a row.
    """
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    size_1, size_2 = width * d_in, d_out * width
    q += row * q_row + head * q_head
    k += row * k_row + head * k_head
    weight_1 += at * size_1
    weight_2 += at * size_2
    valid = True
    if MASKED:
        valid = tl.load(mask + row * mask_row) != 0
    a_1, a_2, inside, ends = weight_1, weight_2, False, False
    if ANCHORED:
        phase = tl.load(position + row) % chunk
        inside = (phase != 0) | (valid == 0)  # then the anchor stays what it is
        ends = (phase + 1 == chunk) & valid
        new_anchor_1 += at * size_1
        new_anchor_2 += at * size_2
        if inside:
            a_1, a_2 = anchor_1 + at * size_1, anchor_2 + at * size_2

    # the key forward through the anchor
    key, value = _vector(k, i, d_in, WIDE), _vector(v + row * v_row + head * v_head, o, d_out, WIDE)
    z = tl.zeros((OUT,), WIDE)
    squares, small_squares = tl.zeros((1,), WIDE), tl.zeros((1,), WIDE)  # of the last layer's input
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            tile_1 = load(a_1, h, i, width, d_in, WIDE)
            preact = _times(tile_1, key)
            tl.store(hidden + at * width + h, preact, mask=h < width)
            a = activate(preact, ACTIVATION)
        else:
            a = _vector(k, h, width, WIDE)
        tile = load(a_2, o, h, d_out, width, WIDE)
        z += _times(tile, a)
        more, small_more = square_sums(a, 0, WIDE)
        squares += more
        small_squares += small_more
        if ANCHORED:  # noqa: SIM102
            if ends == 0:
                if LAYERS == 2:
                    store(new_anchor_1, h, i, width, d_in, tile_1)
                store(new_anchor_2, o, h, d_out, width, tile)

    # the error
    gain_o, residual = tl.full((OUT,), 1.0, WIDE), z
    if NORM:
        gain_o, residual = _vector(gain + head * d_out, o, d_out, WIDE), _vector(k, o, d_in, WIDE)
    error = tl.sum(output_error(
        z[None, :], residual[None, :], value[None, :], tl.full((1, 1), DELTA, WIDE), gain_o, o < d_out, d_out, NORM,
        LOSS, POWER, SMOOTH,
    ), axis=0)  # fmt: skip
    tl.debug_barrier()

    step = 2 * tl.load(theta + row * theta_row + head * theta_head).to(WIDE)
    if CLIP is not None:
        e_squares, small_e_squares = tl.zeros((1,), WIDE), tl.zeros((1,), WIDE)
        if LAYERS == 2:
            for h0 in range(0, width, BLOCK):
                h = h0 + tl.arange(0, BLOCK)
                preact = _vector(hidden + at * width, h, width, WIDE)
                e = _transposed_times(load(a_2, o, h, d_out, width, WIDE), error) * slope(preact, ACTIVATION)
                more, small_more = square_sums(e, 0, WIDE)
                e_squares += more
                small_e_squares += small_more
        d_squares, small_d_squares = square_sums(error, 0, WIDE)
        k_squares, small_k_squares = square_sums(key, 0, WIDE)
        norm = gradient_norm(
            length(e_squares, small_e_squares, WIDE), length(k_squares, small_k_squares, WIDE),
            length(d_squares, small_d_squares, WIDE), length(squares, small_squares, WIDE),
        )  # fmt: skip
        step *= tl.sum(clip_scale(norm, CLIP))
    momentum_decay, retention = 0.0, 1.0
    if MOMENTUM:
        momentum_decay = tl.load(eta + row * eta_row + head * eta_head).to(WIDE)
        momentum_1 += at * size_1
        momentum_2 += at * size_2
        new_momentum_1 += at * size_1
        new_momentum_2 += at * size_2
    if FORGETTING:
        retention = 1 - tl.load(alpha + row * alpha_row + head * alpha_head).to(WIDE)
    new_weight_1 += at * size_1
    new_weight_2 += at * size_2

    # the state after the token, and the query through it
    query = _vector(q, i, d_in, WIDE)
    z = tl.zeros((OUT,), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            preact = _vector(hidden + at * width, h, width, WIDE)
            a = activate(preact, ACTIVATION)
            e = _transposed_times(load(a_2, o, h, d_out, width, WIDE), error) * slope(preact, ACTIVATION)
            old_1, new_1 = _update(
                weight_1, momentum_1, new_weight_1, new_momentum_1, new_anchor_1, h, i, width, d_in,
                -(step * e)[:, None] * key[None, :], momentum_decay, retention, valid, ends,
                MOMENTUM, FORGETTING, ANCHORED, WIDE,
            )  # fmt: skip
            at_1 = new_1 if READ == _AFTER else old_1
            if READ == _ANCHOR:
                at_1 = load(a_1, h, i, width, d_in, WIDE)
            x = activate(_times(at_1, query), ACTIVATION)
        else:
            a = _vector(k, h, width, WIDE)
            x = _vector(q, h, width, WIDE)
        old, new = _update(
            weight_2, momentum_2, new_weight_2, new_momentum_2, new_anchor_2, o, h, d_out, width,
            -(step * error)[:, None] * a[None, :], momentum_decay, retention, valid, ends,
            MOMENTUM, FORGETTING, ANCHORED, WIDE,
        )  # fmt: skip
        at_2 = new if READ == _AFTER else old
        if READ == _ANCHOR:
            at_2 = load(a_2, o, h, d_out, width, WIDE)
        z += _times(at_2, x)
    if NORM:
        n, _ = layer_norm(z[None, :], o < d_out, d_out)
        z = _vector(q, o, d_in, WIDE) + tl.sum(n, axis=0) * gain_o
    tl.store(y + at * d_out + o, tl.where(valid, z, 0.0), mask=o < d_out)

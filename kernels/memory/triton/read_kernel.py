"""Reading a group of chunks, in Triton: what ``chunk_torch`` does in ``read``.

The story. Reading has no order: a program answers ``ROWS`` queries of one chunk of one row, at the state that the chunk
started from and with what the chunk itself has written so far: one decay-weighted product of scores, as in attention.
The chunk's keys come ``KEYS`` at a time and the hidden layer ``BLOCK`` units at a time. What is needed for every block
again (layer 1's weighted scores, the hidden values) waits in global memory, which is a cache at this size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .network_kernel import activate, normalise
from .tiles_kernel import dot, gains, keep, load, share, tokens


@triton.jit
def read_kernel(
    queries, keys, gain, weigh, carry, stack_1, stack_2, input_2, error_1, error_2, decayed_1, y, asked_1, asked_2,
    rows, b, d_in, width, d_out, eps,
    LAYERS: tl.constexpr, PARTS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``ROWS`` queries, each at the weights that its token left. Layers as in ``write_kernel``.

    At depth 1 ``asked_1`` are the queries, and there is no activation.
    """
    at = tl.program_id(0).to(tl.int64)  # chunk * rows + row
    first = at * b
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i, o = tl.arange(0, IN), tl.arange(0, OUT)
    size_1, size_2 = width * d_in, d_out * width
    if LAYERS == 2:
        q = tokens(queries, first, t, i, b, d_in, WIDE)
        for s0 in range(0, b, KEYS):
            s = s0 + tl.arange(0, KEYS)
            k = tokens(keys, first, s, i, b, d_in, WIDE)
            scores = dot(q, tl.trans(k), OPERAND, WIDE, PRECISION)
            keep(decayed_1, first, t, s, b, b, scores * tokens(weigh, first, t, s, b, b, WIDE))
        tl.debug_barrier()

    z = tl.zeros((ROWS, OUT), WIDE)
    for h0 in range(0, width, BLOCK):
        h = h0 + tl.arange(0, BLOCK)
        if LAYERS == 2:
            below = tl.zeros((ROWS, BLOCK), WIDE)
            for s0 in range(0, b, KEYS):
                s = s0 + tl.arange(0, KEYS)
                decayed = tokens(decayed_1, first, t, s, b, b, WIDE)
                below -= dot(decayed, tokens(error_1, first, s, h, b, width, WIDE), OPERAND, WIDE, PRECISION)
            for part in tl.static_range(PARTS):
                w_1 = load(stack_1 + (at * PARTS + part) * size_1, h, i, width, d_in, WIDE)
                through = dot(q, tl.trans(w_1), OPERAND, WIDE, PRECISION)
                below += share(carry, first, t, b, part, PARTS, WIDE) * through
            keep(asked_1, first, t, h, b, width, below)
        else:
            below = tokens(asked_1, first, t, h, b, width, WIDE)
        x = activate(below, ACTIVATION)
        for part in tl.static_range(PARTS):
            w = load(stack_2 + (at * PARTS + part) * size_2, o, h, d_out, width, WIDE)
            through = dot(x, tl.trans(w), OPERAND, WIDE, PRECISION)
            z += share(carry, first, t, b, part, PARTS, WIDE) * through
    tl.debug_barrier()

    # the last layer's scores: of a block of keys, over all hidden units
    for s0 in range(0, b, KEYS):
        s = s0 + tl.arange(0, KEYS)
        scores = tl.zeros((ROWS, KEYS), WIDE)
        for h0 in range(0, width, BLOCK):
            h = h0 + tl.arange(0, BLOCK)
            x = activate(tokens(asked_1, first, t, h, b, width, WIDE), ACTIVATION)
            a = tokens(input_2, first, s, h, b, width, WIDE)
            scores += dot(x, tl.trans(a), OPERAND, WIDE, PRECISION)
        decayed = scores * tokens(weigh, first, t, s, b, b, WIDE)
        z -= dot(decayed, tokens(error_2, first, s, o, b, d_out, WIDE), OPERAND, WIDE, PRECISION)
    if KEEP:
        keep(asked_2, first, t, o, b, d_out, z)
    if NORM:
        of_gain = gains(gain, at % rows, o, d_out, OUT, NORM, WIDE)
        residual = tokens(queries, first, t, o, b, d_in, WIDE)
        z = residual + normalise(z, o < d_out, d_out, eps)[0] * of_gain[None, :]
    keep(y, first, t, o, b, d_out, z)

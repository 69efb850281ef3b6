"""What the kernels of the memory do with tiles: loading, storing, multiplying, and picking what the gates weigh.

A chunk's tokens lie together, ``b`` of them: ``first`` is the number of the chunk's first token, counted over all
chunks and rows. What lies outside of a matrix is loaded as zero and not stored.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_BFLOAT16 = tl.constexpr(tl.bfloat16)


@triton.jit
def _rounded(x, LOST: tl.constexpr):
    """float32 without its last bits, to the nearest, to even where two are as near: bfloat16 loses 16, TF32 13.

    For the interpreter, which leaves TF32 out, cuts bfloat16 off, and multiplies its bits as if it were whole numbers.
    """
    bits = x.to(tl.int32, bitcast=True)
    half = (1 << (LOST - 1)) - 1
    return ((bits + half + ((bits >> LOST) & 1)) & -(1 << LOST)).to(tl.float32, bitcast=True)


@triton.jit
def load(x, row, column, rows, columns, WIDE: tl.constexpr):
    """A tile of a matrix of ``columns`` columns."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(WIDE)


@triton.jit
def store(x, row, column, rows, columns, values):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(x + row[:, None] * columns + column[None, :], values, mask=inside)


@triton.jit
def tokens(x, first, t, column, b, columns, WIDE: tl.constexpr):
    """Some columns of a chunk's tokens."""
    return load(x + first * columns, t, column, b, columns, WIDE)


@triton.jit
def keep(x, first, t, column, b, columns, values):
    store(x + first * columns, t, column, b, columns, values)


@triton.jit
def dot(a, b, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Operands in their type, sums in the wide one."""
    if _INTERPRETED:
        if OPERAND == _BFLOAT16:
            a, b = _rounded(a, 16), _rounded(b, 16)
        elif PRECISION == "tf32":
            a, b = _rounded(a, 13), _rounded(b, 13)
        else:
            a, b = a.to(OPERAND), b.to(OPERAND)
        product = tl.dot(a, b, input_precision="ieee", out_dtype=WIDE)
    else:
        product = tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION, out_dtype=WIDE)
    return product


@triton.jit
def share(matrix, first, t, b, part, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """What each token weighs for one part of the state (0 weights, 1 momentum), as a column."""
    return tl.load(matrix + (first + t) * PARTS + part, mask=t < b, other=0.0).to(WIDE)[:, None]


@triton.jit
def of_part(values, part, WIDE: tl.constexpr):
    """One number for each token, in the column of its part of the state."""
    return tl.where(tl.arange(0, 2) == part, 1.0, 0.0).to(WIDE)[None, :] * values[:, None]


@triton.jit
def gains(gain, row, o, d_out, OUT: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr):
    """The gain of a row, or ones."""
    found = tl.full((OUT,), 1.0, WIDE)
    if NORM:
        found = tl.load(gain + row * d_out + o, mask=o < d_out, other=0.0).to(WIDE)
    return found

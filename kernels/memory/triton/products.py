"""Products of batches of matrices on Triton kernels, with what comes before and after them in the same launch.

A memory that is written in products of the whole batch (``batched.py``) takes a few of them for each chunk, one chunk
after the other, so that the time of a launch counts. The operands are rounded, or split into parts of bfloat16, in
registers (``tiles.dot``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import launch
from .schedule import on_matrix_units, tile
from .tiles import activate, coefficient, dot, slope
from .write_backward_kernels import over_tokens

PROGRAMS = 128
"""About as many as a large GPU has multiprocessors."""


class Products:
    """Products with rounded operands; ``products``: what ``schedule.operands`` said."""

    def __init__(self, products: dict[str, Any]) -> None:
        half = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}.get(products["OPERAND"])
        self.largest = torch.finfo(half or torch.float64).max
        self._products = products

    def __call__(
        self, a: Tensor, b: Tensor, to: Tensor | None = None, *, onto: Tensor | None = None, sign: int = 1,
        weights: Tensor | None = None, times: Tensor | None = None, last: int = 0, each: Tensor | None = None,
        fine: bool = False, also: Tensor | None = None, z: Tensor | None = None, through: Tensor | None = None,
        activation: int = 0,
    ) -> Tensor:  # fmt: skip
        """``onto + sign times (sum_p weights_p (a b_p))``.

        Args:
            a: ``[batch, rows, depth]``.
            b: ``[batch, depth, columns]``, or of several parts ``[batch, parts, depth, columns]``.
            to: where to store the result, ``[batch, rows, columns]``; may be ``onto``. Matrices are contiguous.
            onto: what is added, as ``to``.
            sign: 1 or -1.
            weights: ``[batch, rows, parts]``: the factor of each row.
            times: ``[batch, rows, columns]``: the factor of each number; those right of column ``row + last`` are
                zero, whatever the product is.
            last: of ``times``.
            each: where to store the products ``a b_p``, ``[batch, rows, parts, columns]``.
            fine: one that needs all digits.
            also: where to store the activation of the result, or with ``z`` the result times the activation's slope
                there, plus ``through``. All three are as ``to``, contiguous.
            z, through: of ``also``.
            activation: its number (``ACTIVATION_NUMBERS``).
        """
        b = b if b.dim() == 4 else b.unsqueeze(1)
        (batch, rows, depth), (parts, columns) = a.shape, b.shape[1::2]
        if to is None:
            to = a.new_empty(batch, rows, columns)
        for x in (to, onto):
            assert x is None or x[0].is_contiguous()
        dense = [None if x is None else x.contiguous() for x in (weights, times)]
        fixed = product_tiles(batch, rows, columns, depth, self._products, parts) | self._kind(a, fine)
        tiles = triton.cdiv(rows, fixed["ROWS"]) * triton.cdiv(columns, fixed["COLUMNS"])
        launch(
            product_kernel, (batch * tiles,), a, b, *dense, onto, to, each, also, z, through,
            rows, columns, depth, last, *a.stride(), *b.stride(), 0 if onto is None else onto.stride(0), to.stride(0),
            PARTS=parts, SIGN=sign, ACTIVATION=activation, **fixed,
        )  # fmt: skip
        return to

    def update(
        self, errors: Tensor, inputs: Tensor, weights: Tensor, to: Tensor, *, mix: Tensor | None = None,
        stack: Tensor | None = None, sign: int = 1,
    ) -> None:  # fmt: skip
        """Set ``to``, ``[batch, parts, out, in]``, to ``mix stack + sign (weights errors)^T inputs``. It is fine.

        Args:
            errors: ``[batch, b, out]``.
            inputs: ``[batch, b, in]``.
            weights: ``[batch, b, parts]``.
            to: contiguous.
            mix: ``[batch, parts, parts]``.
            stack: as ``to``; contiguous.
            sign: 1 or -1.
        """
        (batch, depth, rows), columns = errors.shape, inputs.shape[2]
        assert to.is_contiguous() and (stack is None or stack.is_contiguous())
        fixed = product_tiles(batch, rows, columns, depth, self._products) | self._kind(errors, True)
        tiles = triton.cdiv(rows, fixed["ROWS"]) * triton.cdiv(columns, fixed["COLUMNS"])
        launch(
            update_kernel, (batch * tiles,), errors.contiguous(), inputs.contiguous(), weights.contiguous(),
            None if mix is None else mix.contiguous(), stack, to, rows, columns, depth,
            PARTS=weights.shape[2], SIGN=sign, **fixed,
        )  # fmt: skip

    def state_backward(
        self, pairs: Sequence[tuple[Tensor, Tensor]], to: Tensor, anchor: Tensor | None, mix: Tensor | None,
        after: Tensor | None,
    ) -> None:  # fmt: skip
        """Add the sum of ``left^T right`` to the weights of ``to``, and ``mix^T after``, if given, to all of it.

        Args:
            pairs: one or two, ``[batch, b, out]`` and ``[batch, b, in]``.
            to: ``[batch, parts, out, in]``, contiguous.
            anchor: ``[batch, out, in]``, contiguous: what the products are added to instead.
            mix: ``[batch, parts, parts]``.
            after: as ``to``.
        """
        (left, right), *others = ([x.contiguous() for x in pair] for pair in pairs)
        batch, parts, rows, columns = to.shape
        assert all(x is None or x.is_contiguous() for x in (to, anchor, after))
        fixed = product_tiles(batch, rows, columns, left.shape[1], self._products) | self._kind(to, False)
        tiles = triton.cdiv(rows, fixed["ROWS"]) * triton.cdiv(columns, fixed["COLUMNS"])
        launch(
            state_backward_kernel, (batch * tiles,), left, right, *(others[0] if others else (None, None)),
            None if mix is None else mix.contiguous(), after, to, anchor, rows, columns, left.shape[1], PARTS=parts,
            **fixed,
        )  # fmt: skip

    def _kind(self, like: Tensor, fine: bool) -> dict[str, Any]:
        kind = "FINE" if fine else "OPERAND", "FINE_PRECISION" if fine else "PRECISION"
        return dict(
            OPERAND=self._products[kind[0]], PRECISION=self._products[kind[1]],
            WIDE=wide(like),
        )  # fmt: skip

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``torch.matmul`` of two tensors with the same batch ``[., .]``; differentiable."""
        y: Tensor = _Matmul.apply(self, a, b)
        return y


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Products, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.product = product
        return product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return None, _Matmul.apply(ctx.product, grad, b.mT), _Matmul.apply(ctx.product, a.mT, grad)


def wide(like: Tensor) -> Any:
    """The dtype of sums."""
    return tl.float64 if like.dtype == torch.float64 else tl.float32


def product_tiles(
    batch: int, rows: int, columns: int, depth: int, products: dict[str, Any], parts: int = 1
) -> dict[str, int]:
    """The tiles of a product and its launch: narrower ones for few programs, and more warps for sums of ``parts``."""
    most = 64 if on_matrix_units(products) and products["UNIT_ROWS"] == 64 else 32
    across = tile(columns, most)
    if batch * triton.cdiv(rows, most) * triton.cdiv(columns, across) < PROGRAMS:
        across = min(across, 32)
    warps = 8 if parts > 1 and most == 64 else 4
    return dict(ROWS=tile(rows, most), COLUMNS=across, DEPTH=tile(depth, most), num_warps=warps, num_stages=2)


# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The matrix of a program, and the rows and columns of its tile."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    number = tl.program_id(0) % tiles
    m = (number // across) * ROWS + tl.arange(0, ROWS)
    n = (number % across) * COLUMNS + tl.arange(0, COLUMNS)
    return (tl.program_id(0) // tiles).to(tl.int64), m, n


@triton.jit(do_not_specialize=("rows", "depth", "last"))
def product_kernel(
    left, right, weights, times, onto, to, each, also, z, through,
    rows, columns, depth, last,
    left_batch, left_row, left_column, right_batch, right_part, right_row, right_column, onto_batch, to_batch,
    PARTS: tl.constexpr, SIGN: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a product (``Products.__call__``)."""
    at, m, n = _place(rows, columns, ROWS, COLUMNS)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    place = m[:, None] * columns + n[None, :]
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for part in tl.static_range(PARTS):
        product = tl.zeros((ROWS, COLUMNS), WIDE)
        x_m = left + at * left_batch + m[:, None] * left_row
        y_n = right + at * right_batch + part * right_part + n[None, :] * right_column
        for k0 in range(0, depth, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            known = k < depth
            x = tl.load(x_m + k[None, :] * left_column, mask=(m < rows)[:, None] & known[None, :], other=0.0)
            y = tl.load(y_n + k[:, None] * right_row, mask=known[:, None] & (n < columns)[None, :], other=0.0)
            product += dot(x.to(WIDE), y.to(WIDE), OPERAND, WIDE, PRECISION)
        if each is not None:
            of_part = ((at * rows + m) * PARTS + part)[:, None] * columns + n[None, :]
            tl.store(each + of_part, product, mask=inside)
        if weights is not None:
            product *= coefficient(weights, at * rows, m, rows, part, PARTS, WIDE)
        total += product
    if times is not None:
        factor = tl.load(times + at * rows * columns + place, mask=inside, other=0.0).to(WIDE)
        total = tl.where(n[None, :] <= m[:, None] + last, total * factor, 0.0)
    if SIGN < 0:
        total = -total
    if onto is not None:
        total += tl.load(onto + at * onto_batch + place, mask=inside, other=0.0).to(WIDE)
        tl.debug_barrier()  # it may be ``to``
    tl.store(to + at * to_batch + place, total, mask=inside)
    if also is not None:
        here = at * rows * columns + place
        if z is None:
            total = activate(total, ACTIVATION)
        else:
            total *= slope(tl.load(z + here, mask=inside, other=0.0).to(WIDE), ACTIVATION)
        if through is not None:
            total += tl.load(through + here, mask=inside, other=0.0).to(WIDE)
        tl.store(also + here, total, mask=inside)


@triton.jit
def _store_part(total, mix, stack, to, at, part, place, inside, size,
                PARTS: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    if SIGN < 0:
        total = -total
    if mix is not None:
        for other in tl.static_range(PARTS):
            weight = tl.load(mix + (at * PARTS + part) * PARTS + other).to(WIDE)
            total += weight * tl.load(stack + (at * PARTS + other) * size + place, mask=inside, other=0.0).to(WIDE)
    tl.store(to + (at * PARTS + part) * size + place, total, mask=inside)


@triton.jit(do_not_specialize=("depth",))
def update_kernel(
    errors, inputs, weights, mix, stack, to,
    rows, columns, depth,
    PARTS: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of all parts of a state (``Products.update``)."""
    at, m, n = _place(rows, columns, ROWS, COLUMNS)
    first = at * depth
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    momentum = tl.zeros((ROWS, COLUMNS), WIDE)
    for k0 in range(0, depth, DEPTH):
        k = k0 + tl.arange(0, DEPTH)
        known = (k < depth)[:, None]
        d = tl.load(errors + (first + k)[:, None] * rows + m[None, :], mask=known & (m < rows)[None, :], other=0.0)
        x = tl.load(
            inputs + (first + k)[:, None] * columns + n[None, :], mask=known & (n < columns)[None, :], other=0.0
        )
        d, x = d.to(WIDE), x.to(WIDE)
        weighted = d * coefficient(weights, first, k, depth, 0, PARTS, WIDE)
        total += dot(tl.trans(weighted), x, OPERAND, WIDE, PRECISION)
        if PARTS == 2:
            weighted = d * coefficient(weights, first, k, depth, 1, PARTS, WIDE)
            momentum += dot(tl.trans(weighted), x, OPERAND, WIDE, PRECISION)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    place, size = m[:, None] * columns + n[None, :], rows * columns
    _store_part(total, mix, stack, to, at, 0, place, inside, size, PARTS, SIGN, WIDE)
    if PARTS == 2:
        _store_part(momentum, mix, stack, to, at, 1, place, inside, size, PARTS, SIGN, WIDE)


@triton.jit(do_not_specialize=("depth",))
def state_backward_kernel(
    left, right, left_2, right_2, mix, after, to, anchor,
    rows, columns, depth,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    OPERAND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of all parts of a state (``Products.state_backward``)."""
    at, m, n = _place(rows, columns, ROWS, COLUMNS)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    place, size = m[:, None] * columns + n[None, :], rows * columns
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    total = over_tokens(total, left, right, at * depth, m, n, depth, rows, columns, DEPTH, OPERAND, WIDE, PRECISION)
    if left_2 is not None:
        total = over_tokens(
            total, left_2, right_2, at * depth, m, n, depth, rows, columns, DEPTH, OPERAND, WIDE, PRECISION
        )
    if anchor is not None:
        before = tl.load(anchor + at * size + place, mask=inside, other=0.0).to(WIDE)
        tl.debug_barrier()
        tl.store(anchor + at * size + place, before + total, mask=inside)
    for part in tl.static_range(PARTS):
        here = to + (at * PARTS + part) * size + place
        value = tl.load(here, mask=inside, other=0.0).to(WIDE)
        if mix is not None:
            for other in tl.static_range(PARTS):
                weight = tl.load(mix + (at * PARTS + other) * PARTS + part).to(WIDE)
                value += weight * tl.load(after + (at * PARTS + other) * size + place, mask=inside, other=0.0).to(WIDE)
        if part == 0 and anchor is None:
            value += total
        tl.debug_barrier()
        tl.store(here, value, mask=inside)

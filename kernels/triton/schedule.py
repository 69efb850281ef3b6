"""How a kernel of the memory is cut into tiles, and what it multiplies: one rule, to launch it and to compile it ahead.

A program keeps tiles of tokens x head, tokens x hidden units and head x hidden units in registers, of which a
multiprocessor has 64 Ki of 32 bits, and a few of them in shared memory on their way into a matrix unit. So:

* ``ROWS``: the tokens that a program works on at a time; a longer chunk takes several rounds. 32, and 16 in the
  backward of writing, which has twice as many tiles of them, and in that of reading with heads above 64.
* ``KEYS``: the tokens of the chunk that a query is compared with at a time: up to 64.
* ``BLOCK``: hidden units at a time, while the state streams by: up to 32.

No length of a sequence goes in: a model compiles each kernel once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def tile(size: int, most: int) -> int:
    """The tile for ``size`` numbers: a power of two, of 16 at least, which is what matrix units take."""
    return min(most, max(16, triton.next_power_of_2(size)))


def schedule(kernel: str, b: int, d_in: int, width: int, d_out: int) -> dict[str, Any]:
    """The tiles of ``kernel`` (its function's name) and its launch, for chunks of ``b`` tokens."""
    few = kernel == "write_backward_kernel" or (kernel == "read_backward_kernel" and max(d_in, d_out) > 64)
    return dict(
        ROWS=tile(b, 16 if few else 32), KEYS=tile(b, 64),
        IN=tile(d_in, 128), OUT=tile(d_out, 128), BLOCK=tile(width, 32),
        num_warps=8, num_stages=1,
    )  # fmt: skip


def operands(dtype: torch.dtype, given: torch.dtype | None = None) -> dict[str, Any]:
    """What matrix products take: of a model in half precision (``given``), that; sums are of ``dtype`` all the same.

    float32 goes by ``torch.set_float32_matmul_precision``: as it is where that says ``"highest"``, as TF32 with
    ``"high"``, rounded to bfloat16 with ``"medium"``. ``FINE`` are the products that so few digits are too little for:
    float32 as three products of bfloat16, which beside the others is as good as exact.
    """
    # of the settings that say so, those that are always there to be read: the general one raises where others were set
    cuda: str = torch.backends.cuda.matmul.fp32_precision
    cpu: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if dtype == torch.float64:
        operand, precision = tl.float64, "ieee"
    elif given == torch.float16:
        operand, precision = tl.float16, "ieee"
    elif given == torch.bfloat16 or cpu == "bf16":
        operand, precision = tl.bfloat16, "ieee"
    else:
        operand, precision = tl.float32, "tf32" if cuda == "tf32" else "ieee"
    exact = operand == tl.float64 or (operand, precision) == (tl.float32, "ieee")
    fine = (operand, precision) if exact else (tl.float32, "bf16x3")
    return dict(OPERAND=operand, PRECISION=precision, FINE=fine[0], FINE_PRECISION=fine[1])

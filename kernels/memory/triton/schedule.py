"""How a kernel of the memory is cut into tiles, and what it multiplies: one rule, to launch it and to compile it ahead.

A program keeps tiles of tokens x head, tokens x hidden units and head x hidden units in registers, of which a
multiprocessor has 64 Ki of 32 bits, and a few of them in shared memory on their way into a matrix unit. So:

* ``ROWS``: the tokens that a program works on at a time; a longer chunk takes several rounds. 32, and 16 in the
  backward of writing, which has twice as many tiles of them, in those of reading with heads above 64, and beside a
  state in registers.
* ``KEYS``: the tokens of the chunk that a query is compared with at a time: up to 64.
* ``BLOCK``: hidden units at a time, while the state streams by: up to 32.

Writing and its backward have two schedules. *Streamed*, the state passes by in blocks, for every chunk again.
*Resident*, it stays in registers from chunk to chunk (``WIDTH``: all hidden units at once), where it fits.

No length of a sequence goes in: a model compiles each kernel once.

Environment: ``TITANS_BUILD_SCHEDULE=streamed`` or ``resident`` takes that one, to test and to measure it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from ...dispatch import BackendError

VARIABLE = "TITANS_BUILD_SCHEDULE"
SCHEDULES = ("auto", "resident", "streamed")
REGISTERS = 256 * 2**10
"""Bytes of a multiprocessor's registers."""
ROOM = {False: REGISTERS * 3 // 8, True: REGISTERS // 4}
"""Bytes that the tiles of a state may take of them, forward and (``True``) backward, where tokens take up more."""
RESIDENT = {"write_kernel": "write_resident_kernel", "write_backward_kernel": "write_backward_resident_kernel"}
"""The kernels that have two schedules: by the name of the streamed one, the resident one's."""


def tile(size: int, most: int | None = None) -> int:
    """The tile for ``size`` numbers: a power of two, of 16 at least, which is what matrix units take."""
    whole: int = max(16, triton.next_power_of_2(size))
    return whole if most is None else min(most, whole)


def schedule(
    kernel: str, b: int, d_in: int, width: int, d_out: int, *, layers: int = 2, parts: int = 2
) -> dict[str, Any]:
    """The tiles of ``kernel`` (its function's name) and its launch, for chunks of ``b`` tokens."""
    backward, stays = kernel.startswith("write_backward"), kernel in RESIDENT.values()
    reads_back = kernel in ("read_backward_kernel", "answer_backward_kernel")
    few = backward or stays or (reads_back and max(d_in, d_out) > 64)
    # half the room: half the warps, and a multiprocessor takes two programs
    small = stays and held(layers, parts, d_in, width, d_out, backward=backward) <= ROOM[backward] // 2
    return dict(
        ROWS=tile(b, 16 if few else 32), KEYS=tile(b, 64),
        IN=tile(d_in, 128), OUT=tile(d_out, 128), BLOCK=tile(width, 32), WIDTH=tile(width),
        num_warps=4 if small else 8, num_stages=1,
    )  # fmt: skip


def held(
    layers: int, parts: int, d_in: int, width: int, d_out: int, *, backward: bool, wide: torch.dtype = torch.float32
) -> int:
    """Bytes of the whole tiles that the resident schedule keeps: of each layer ``parts``, and those beside them.

    Forward, the weights that a chunk began with; backward, these and their gradient.
    """
    over, onto, out = tile(d_in), tile(width), tile(d_out)
    return (parts + (2 if backward else 1)) * onto * (out + (over if layers == 2 else 0)) * wide.itemsize


def resident(
    layers: int,
    parts: int,
    d_in: int,
    width: int,
    d_out: int,
    products: dict[str, Any],
    *,
    backward: bool,
    wide: torch.dtype = torch.float32,
) -> bool:
    """Whether the state stays in registers while a row's chunks are written (or ``backward``): the rule.

    It does where its tiles fit ``ROOM``, and a matrix unit takes the products' operands. With momentum that is one
    layer of up to 64 x 64, two of up to 64 x 64 forward and of up to 32 x 64 backward. A product in full float32 is not
    made by a matrix unit, but out of registers, which have no room for its operands beside the state.

    Raises:
        BackendError: the environment names no schedule, or asks to keep a state larger than the registers.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in SCHEDULES:
        raise BackendError(f"{VARIABLE}={asked}: no such schedule; expected {', '.join(SCHEDULES)}")
    if asked == "auto":
        room = held(layers, parts, d_in, width, d_out, backward=backward, wide=wide) <= ROOM[backward]
        return room and (products["OPERAND"] in (tl.bfloat16, tl.float16) or products["PRECISION"] == "tf32")
    most = held(layers, parts, d_in, width, d_out, backward=True, wide=wide)
    if asked == "resident" and most > REGISTERS:
        raise BackendError(
            f"{VARIABLE}={asked}: the tiles of this memory take {most // 1024} KiB of registers in backward, and a "
            f"multiprocessor has {REGISTERS // 1024}; expected auto or streamed"
        )
    return asked == "resident"


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

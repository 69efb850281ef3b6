"""How a kernel of the memory is cut into tiles, and the operands of its products: one rule for launching and for
compiling ahead of time.

A program keeps tiles of tokens x head, tokens x hidden units and head x hidden units in registers, of which a
multiprocessor has 64 Ki of 32 bits, and a few of them in shared memory on their way into a matrix unit. So:

* ``TOKENS``: the tokens that a program works on at a time; a longer chunk takes several rounds. 64, because that is the
  least number of rows of Hopper's matrix units; 16 with the state in registers and for shorter chunks, where operands
  are swapped so that the rows are hidden units (``tiles.dot``).
* ``FEW``: tokens at a time where there are many tiles of tokens x head: the loss.
* ``KEYS``: the tokens of the chunk that a query is compared with at a time: up to 64.
* ``BLOCK``: hidden units at a time, with a streamed state: up to 64. Heads above 64 have 32 in writing and with 64
  tokens, so that few registers are spilled.
* ``IN``: columns of the input at a time: up to 64 in writing, else the whole head.

Float32 and float64, which no matrix unit takes, and GPUs before Hopper have smaller tiles.

Writing and its backward have two schedules. *Streamed*, the state is read in blocks, for every chunk again. *Resident*,
it stays in registers from chunk to chunk (``WIDTH``: all hidden units at once), where it fits.

The length of a sequence is not a parameter, and the chunk is that of the memory, not of a piece at the end of a
sequence: a model compiles each kernel once.

A memory of one matrix has a third one. *Fused*, it is written and read in one launch (``linear_kernels.py``), which
takes all tokens of a chunk at once.

Environment: ``TITANS_BUILD_SCHEDULE=streamed``, ``resident`` or ``fused`` picks a schedule, for tests and measurements.
``TITANS_BUILD_FINE=off`` takes one product where three keep the digits of a chunk's gradients.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from ...dispatch import BackendError
from ..network_torch import LOSS_NUMBERS
from ..state import Objective

VARIABLE = "TITANS_BUILD_SCHEDULE"
FINE_VARIABLE = "TITANS_BUILD_FINE"
SCHEDULES = ("auto", "resident", "streamed", "fused")
REGISTERS = 256 * 2**10
"""Bytes of a multiprocessor's registers."""
ROOM = {False: REGISTERS * 3 // 8, True: REGISTERS // 4}
"""Bytes of them that the tiles of a state may take, forward and (``True``) backward, where tokens take more."""
FUSED_SIZE, FUSED_ROWS = 64, 64
"""The largest chunks and heads of the fused schedule, and the rows from which on it is chosen."""
RESIDENT = {"write_kernel": "write_resident_kernel", "write_backward_kernel": "write_backward_resident_kernel"}
"""The kernels that have two schedules: by the name of the streamed one, the resident one's."""


def loss_constants(objective: Objective) -> dict[str, Any]:
    """What a kernel that computes errors is compiled for."""
    _, p, delta, smooth, _ = objective
    return dict(
        LOSS=LOSS_NUMBERS[objective.kind, objective.smooth is not None, objective.form],
        POWER=float(p),
        DELTA=float(delta),
        SMOOTH=float(smooth or 0.0),
    )


def tile(size: int, most: int | None = None) -> int:
    """The tile for ``size`` numbers: a power of two, of 16 at least, which is what matrix units take."""
    whole: int = max(16, triton.next_power_of_2(size))
    return whole if most is None else min(most, whole)


def schedule(
    kernel: str, b: int, d_in: int, width: int, d_out: int, products: dict[str, Any] | None = None, *,
    layers: int = 2, parts: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """The tiles of ``kernel`` (its function's name) and its launch, for a memory with chunks of ``b`` tokens.

    ``products``: what :func:`operands` said; ``None`` for a kernel without products of matrices.
    """
    if kernel.startswith("linear"):
        return dict(TOKENS=tile(b), OUT=tile(d_out), WIDTH=tile(width), num_warps=8, num_stages=1)
    backward, is_resident = kernel.startswith("write_backward"), kernel in RESIDENT.values()
    if products is not None and on_matrix_units(products) and products["UNIT_ROWS"] == 64:
        tokens = 16 if is_resident else 64
        many = tile(b, tokens) == 64 or is_resident or kernel in RESIDENT  # tiles of tokens, or of the state
        block = 32 if max(d_in, d_out) > 64 and many else 64
    else:
        few = backward or is_resident or ("backward" in kernel and max(d_in, d_out) > 64)
        tokens, block = 16 if few else 32, 32
    # half the room: half the warps, and a multiprocessor takes two programs
    small = is_resident and state_bytes(layers, parts, d_in, width, d_out, backward=backward) <= ROOM[backward] // 2
    writes = "write" in kernel and not is_resident
    return dict(
        TOKENS=tile(b, tokens), FEW=16, KEYS=tile(b, 64), IN=tile(d_in, 64 if writes else 128), OUT=tile(d_out, 128),
        BLOCK=tile(width, block), WIDTH=tile(width), num_warps=4 if small else 8, num_stages=1,
    )  # fmt: skip


def on_matrix_units(products: dict[str, Any]) -> bool:
    """Whether matrix units take the operands: half precision or TF32, and not float32 or float64."""
    return products["OPERAND"] in (tl.bfloat16, tl.float16) or products["PRECISION"] == "tf32"


def unit_rows() -> int:
    """The rows of a product that suit the current GPU's matrix units: 64 from NVIDIA's Hopper on, else 16 and more."""
    if not torch.cuda.is_available():  # the interpreter: as on the GPU that the tiles are made for
        return 64
    return 64 if torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0) else 16


def state_bytes(
    layers: int, parts: int, d_in: int, width: int, d_out: int, *, backward: bool, wide: torch.dtype = torch.float32
) -> int:
    """Bytes of the tiles that the resident schedule keeps: ``parts`` of each layer, the weights that a
    chunk began with, and backward their gradient."""
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
    """Whether the state stays in registers while the chunks of a head are written (or ``backward``).

    It does where its tiles fit ``ROOM`` and a matrix unit takes the products' operands. With momentum that is one layer
    of up to 64 x 64, or two of up to 64 x 64 forward and up to 32 x 32 backward. A product in full float32 is not done
    by a matrix unit, and its operands need the registers.

    Raises:
        BackendError: the environment names no schedule, or asks to keep a state larger than the registers.
    """
    chosen = _chosen()
    if chosen in ("auto", "fused"):
        room = ROOM[backward] // (layers if backward else 1)  # two layers have more tiles of tokens, too
        fits = state_bytes(layers, parts, d_in, width, d_out, backward=backward, wide=wide) <= room
        return fits and on_matrix_units(products)
    most = state_bytes(layers, parts, d_in, width, d_out, backward=True, wide=wide)
    if chosen == "resident" and most > REGISTERS:
        raise BackendError(
            f"{VARIABLE}={chosen}: the tiles of this memory take {most // 1024} KiB of registers in backward, and a "
            f"multiprocessor has {REGISTERS // 1024}; expected auto or streamed"
        )
    return chosen == "resident"


def fused(rows: int, layers: int, chunk: int, d_in: int, d_out: int, plain: bool, products: dict[str, Any]) -> bool:
    """Whether all chunks are written and read in one launch, with a program for each of the ``rows``.

    ``plain``: without a window, a gated network, thresholds for each token, and reads at the anchor.

    With few rows, reads of all chunks at once keep more multiprocessors busy.

    Raises:
        BackendError: the environment names no schedule, or asks for this one where it cannot be had.
    """
    can = plain and layers == 1 and max(chunk, d_in, d_out) <= FUSED_SIZE
    chosen = _chosen()
    if chosen == "fused" and not can:
        raise BackendError(
            f"{VARIABLE}=fused: takes memories of one layer, without a window, thresholds for each token and reads at "
            f"the anchor, with heads and chunks of up to {FUSED_SIZE}; got {layers} layers, heads of "
            f"{max(d_in, d_out)} and chunks of {chunk}; expected auto, resident or streamed"
        )
    suits = rows >= FUSED_ROWS and on_matrix_units(products) and products["UNIT_ROWS"] == 64
    return can and (chosen == "fused" or (chosen == "auto" and suits))


def _chosen() -> str:
    chosen = os.environ.get(VARIABLE) or "auto"
    if chosen not in SCHEDULES:
        raise BackendError(f"{VARIABLE}={chosen}: no such schedule; expected {', '.join(SCHEDULES)}")
    return chosen


def operands(dtype: torch.dtype, given: torch.dtype | None = None) -> dict[str, Any]:
    """The operands of matrix products: half precision if the model is (``given``); sums have ``dtype`` in any case.

    float32 goes by ``torch.set_float32_matmul_precision``: unchanged with ``"highest"``, TF32 with ``"high"``,
    rounded to bfloat16 with ``"medium"``. ``FINE`` is for products that need more digits: three bfloat16 products each,
    or with ``TITANS_BUILD_FINE=off`` one, like the others.

    Raises:
        BackendError: the environment says neither on nor off.
    """
    # the general setting raises where these were set separately
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
    chosen = os.environ.get(FINE_VARIABLE) or "on"
    if chosen not in ("on", "off"):
        raise BackendError(f"{FINE_VARIABLE}={chosen}: expected on or off")
    fine = (operand, precision) if exact or chosen == "off" else (tl.float32, "bf16x3")
    return dict(
        OPERAND=operand, PRECISION=precision, FINE=fine[0], FINE_PRECISION=fine[1], UNIT_ROWS=unit_rows()
    )  # fmt: skip

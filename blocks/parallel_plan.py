"""How each block gets what it needs of earlier tokens where ranks share a sequence, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..kernels.memory import memory_flops
from .block import Block, child_blocks
from .memory import NeuralMemory
from .parallel_memory import affine_parts, halo, is_affine, sums_chunks

CONTEXTS = ("auto", "affine", "chunk", "pipelined")
"""The values of ``context``."""
FLOPS_PER_BYTE = 4000.0
"""Products that a device computes while it sends a byte: 4e14 FLOP/s and 1e11 bytes/s."""


class Step(NamedTuple):
    """A block that has no blocks inside, or that runs them itself."""

    name: str
    block: Block
    way: str
    """``"local"``, ``"window"``, ``"pipelined"``, ``"affine"``, ``"chunk"`` or ``"gathered"``."""
    flops: float
    """Of a rank's forward pass of a row, with what is sent in the same unit."""


def plan(layers: Iterable[Block], ranks: int, time: int, context: str = "auto") -> list[Step]:
    """The steps of a sequence of ``time`` tokens, in order. ``"auto"``: those that take the shorter time."""
    length = time // ranks
    if context != "auto":
        return list(_steps(layers, ranks, length, (context,)))
    plans = [list(_steps(layers, ranks, length, ways)) for ways in (("affine", "chunk"), ())]
    return min(plans, key=lambda steps: elapsed(steps, ranks))


def elapsed(steps: Iterable[Step], ranks: int) -> float:
    """The time at which the last rank is done. A rank goes on to the next step as soon as it can."""
    clocks = [0.0] * ranks
    for step in steps:
        if step.way == "pipelined":
            before = 0.0
            for rank, clock in enumerate(clocks):
                clocks[rank] = before = max(before, clock) + step.flops
        elif step.way in ("local", "window"):
            clocks = [clock + step.flops for clock in clocks]
        else:  # every rank waits for all
            clocks = [max(clocks) + step.flops] * ranks
    return max(clocks)


def sharding_of(block: Block) -> str | None:
    """``Block.sharding``, if the blocks inside say how they are sharded, too."""
    inside = all(sharding_of(child) is not None for child in child_blocks(block))
    return block.sharding if inside else None


def _steps(layers: Iterable[Block], ranks: int, length: int, ways: tuple[str, ...]) -> Iterator[Step]:
    for number, layer in enumerate(layers):
        for name, block in _leaves(layer, f"layers.{number}"):
            yield _step(name, block, ranks, length, ways)


def _leaves(block: Block, name: str) -> Iterator[tuple[str, Block]]:
    names = {module: path for path, module in block.named_modules()}
    inside = list(child_blocks(block))
    if block.sharding != "local" or not inside:
        yield name, block
        return
    for child in inside:
        yield from _leaves(child, f"{name}.{names[child]}")


def _step(name: str, block: Block, ranks: int, length: int, ways: tuple[str, ...]) -> Step:
    sharding, past = sharding_of(block), block.past()
    if sharding is None:
        return Step(name, block, "gathered", block.flops(length * ranks))
    flops = float(block.flops(length))
    if sharding == "local":
        return Step(name, block, "local", flops)
    if past is not None and past <= length:
        return Step(name, block, "window", float(block.flops(length + past)))
    found = [Step(name, block, "pipelined", flops)]
    if isinstance(block, NeuralMemory) and halo(block) <= length:
        if "affine" in ways and is_affine(block):
            found.append(Step(name, block, "affine", flops + _affine_flops(block, ranks, length)))
        if "chunk" in ways and sums_chunks(block):
            found.append(Step(name, block, "chunk", flops + _chunk_flops(block, ranks, length)))
    return min(found[1:] or found, key=lambda step: step.flops)


def _affine_flops(block: NeuralMemory, ranks: int, length: int) -> float:
    """What the map of a rank's tokens costs: more rows of the matrix, the maps of all ranks, and reading."""
    ((out, into),) = block.shapes
    size = into * affine_parts(block, length % block.chunk == 0)
    operation = [memory_flops([(rows, into)], min(block.chunk, length), block.momentum) for rows in (out, out + size)]
    computed = length * (operation[1] - operation[0] + 2 * size * out) + (ranks - 1) * 2 * out * size * size
    return block.heads * (computed + (ranks - 1) * FLOPS_PER_BYTE * 4 * size * (out + size))


def _chunk_flops(block: NeuralMemory, ranks: int, length: int) -> float:
    """What rounds of chunks cost: the ranks that have no tokens of a chunk wait, and each sends what it adds."""
    operation = memory_flops(block.shapes, min(block.chunk, length), block.momentum)
    waits, time = -length, ranks * length
    for start in range(0, time, block.chunk):
        stop = min(start + block.chunk, time)
        waits += max(min(stop, end) - max(start, end - length) for end in range(length, time + 1, length))
    sent = FLOPS_PER_BYTE * 4 * sum(out * into for out, into in block.shapes) * (1 + block.momentum)
    return block.heads * (waits * operation + -(-time // block.chunk) * (ranks - 1) * sent)

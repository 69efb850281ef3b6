"""How each block gets what it needs of earlier tokens where ranks share a sequence, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..kernels.memory import memory_flops
from .block import Block, child_blocks
from .flops import write_flops
from .memory import NeuralMemory
from .parallel_memory import affine_parts, halo, is_affine, sums_chunks

CONTEXTS = ("auto", "affine", "chunk", "pipelined")
"""The values of ``context``."""
TOGETHER = ("affine", "chunk", "gathered")
"""Ways in which every rank waits for all."""
FULL = 8192
"""Rows times the width of a model that keep a GPU busy."""
FLOPS_PER_BYTE = 4000.0
"""FLOPs of a device while it sends a byte: 4e14 FLOP/s and 1e11 bytes/s, of a GPU. Plans for CPUs use it, too."""


class Step(NamedTuple):
    """A block that has no blocks inside, or that runs them itself, in the forward pass of a rank with one row."""

    name: str
    block: Block
    way: str
    """``"local"``, ``"window"``, ``"pipelined"``, ``"affine"``, ``"chunk"`` or ``"gathered"``."""
    flops: float
    waits: float = 0.0
    """FLOPs for which ranks wait whose turn it is not."""
    sent: float = 0.0
    """Bytes that a rank sends, in float32; to all ranks, if the way is one of ``TOGETHER``."""

    def cost(self, ranks: int) -> float:
        """FLOPs that take as long."""
        copies: float = ranks - 1 if self.way in TOGETHER else 1
        if self.way == "chunk":  # sums, of which each rank adds up a part
            copies = 2 * (ranks - 1) / ranks
        return self.flops + self.waits + FLOPS_PER_BYTE * self.sent * copies


def row_groups(rows: int, dim: int, cpu: bool, ranks: int) -> int:
    """The number of groups of rows whose states are sent one after the other: no rank waits for all rows."""
    return max(1, min(rows if cpu else rows * dim // FULL, ranks))


def plan(layers: Iterable[Block], ranks: int, time: int, context: str = "auto", groups: int = 1) -> list[Step]:
    """The steps of a sequence of ``time`` tokens, in order. ``"auto"``: those that take the shorter time.

    ``groups``: the number of groups of rows, if a call has so many rows.
    """
    length = time // ranks
    if context != "auto":
        return list(_steps(layers, ranks, length, (context,)))
    plans = [list(_steps(layers, ranks, length, ways)) for ways in (("affine", "chunk"), ())]
    return min(plans, key=lambda steps: elapsed(steps, ranks, groups=groups))


def elapsed(
    steps: Iterable[Step], ranks: int, cost: Callable[[Step], float] | None = None, *, groups: int = 1
) -> float:
    """The time at which the last rank is done. A rank goes on to the next step as soon as it can."""
    clocks = [0.0] * ranks
    for step in steps:
        time = step.cost(ranks) if cost is None else cost(step)
        if step.way == "pipelined":
            sent = [0.0] * groups  # when the rank before has sent the states of each group
            for rank, clock in enumerate(clocks):
                for group in range(groups):
                    sent[group] = clock = max(sent[group], clock) + time / groups
                clocks[rank] = clock
        elif step.way in TOGETHER:
            clocks = [max(clocks) + time] * ranks
        else:
            clocks = [clock + time for clock in clocks]
    return max(clocks)


def sharding_of(block: Block) -> str | None:
    """``Block.sharding``, if the blocks inside say how they are sharded, too."""
    inside = all(sharding_of(child) is not None for child in child_blocks(block))
    return block.sharding if inside else None


def past_at(block: Block, places: Iterable[int]) -> int | None:
    """``Block.past()`` of tokens at these places of a row. A memory depends on no token before its last reset."""
    past = block.past()
    if past is None or not isinstance(block, NeuralMemory) or type(block).past is not NeuralMemory.past:
        return past
    reset = 1 if block.rule is None or block.rule.reset is None else block.rule.reset
    return max((place % reset for place in places), default=0) + block.conv


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
    sharding, number = sharding_of(block), 4 * block.dim
    past = past_at(block, range(length, length * ranks, length))
    if sharding is None:
        return Step(name, block, "gathered", block.flops(length * ranks), sent=number * length)
    flops = float(block.flops(length))
    if sharding == "local":
        return Step(name, block, "local", flops)
    if past is not None and past <= length:
        return Step(name, block, "window", float(block.flops(length + past)), sent=number * past)
    found, state = [], 0.0
    if isinstance(block, NeuralMemory):
        state = 4.0 * block.heads * sum(out * into for out, into in block.shapes) * (2 + block.momentum)
        before = number * halo(block)
        if "affine" in ways and halo(block) <= length and is_affine(block):
            more, message = _affine(block, ranks, length)
            found.append(Step(name, block, "affine", flops + more, sent=message + before))
        if "chunk" in ways and halo(block) <= length and sums_chunks(block):
            waits, message = _chunks(block, ranks, length)
            found.append(Step(name, block, "chunk", flops, waits, message + before))
    return min(found or [Step(name, block, "pipelined", flops, sent=state)], key=lambda step: step.cost(ranks))


def _affine(block: NeuralMemory, ranks: int, length: int) -> tuple[float, float]:
    """FLOPs of the map of a rank's tokens, and its bytes: more rows of the matrix, the maps of all ranks, reading."""
    ((out, into),) = block.shapes
    size = into * affine_parts(block, length % block.chunk == 0)
    chunk = min(block.chunk, length)
    before, after = (memory_flops([(rows, into)], chunk, block.momentum) for rows in (out, out + size))
    scan = (ranks - 1) * 2 * out * size * size
    return block.heads * (length * (after - before + 2 * size * out) + scan), 4 * block.heads * size * (out + size)


def _chunks(block: NeuralMemory, ranks: int, length: int) -> tuple[float, float]:
    """FLOPs for which ranks wait that have fewer tokens of a chunk than others, and the bytes of what chunks add."""
    # Each chunk takes the time of the rank with most of its tokens. A rank is busy for its own ``length`` tokens, which
    # ``Step.flops`` counts, and waits for the rest.
    waits, time = -length, ranks * length
    for start in range(0, time, block.chunk):
        stop = min(start + block.chunk, time)
        waits += max(min(stop, end) - max(start, end - length) for end in range(length, time + 1, length))
    moves_once = block.rule is not None and block.rule.moves_once
    numbers = sum(out * into for out, into in block.shapes) * (1 + (block.momentum and not moves_once))
    by_channel = block.rule is not None and block.rule.retention.gates == "channel"
    channels = block.gate_sizes["alpha"] if by_channel else 1
    sums = block.heads * (numbers + (2 + channels if moves_once else 1 + 2 * channels))
    last = 3 * block.dim + block.heads * sum(block.gate_sizes.values())
    return waits * block.heads * write_flops(block, length), 4 * (
        -(-time // block.chunk) * sums + time // block.chunk * last
    )

"""What each Triton kernel of the memory cannot do without: FLOPs, bytes, waits, and so the least time on one GPU.

    python benchmarks/kernel_estimate.py [--layers 2] [--dim 64] [--hidden 128] [--chunk 64] [--rows 256]
        [--tokens 32768]

An estimate that needs no GPU, and no measurement: bfloat16 operands, float32 in memory, GELU, momentum, LayerNorm,
clipping, states kept of every chunk. For each kernel, and ``rows`` (batch x heads) sequences of ``tokens``:

* ``GFLOP``: of matrix products, as the formulas have it; what is made of three products of bfloat16 takes three times
  its time.
* ``moved``: every number that comes in or is left behind, once. ``passed``: what the program's loops ask the second
  level of the cache for, in all.
* ``programs``: of the launch; ``an SM``: how many a multiprocessor has room for, by the compiler's count of registers
  and shared memory (``kernel_resources.py``, sm_90).
* ``waits``: loads, one after the other, that a program cannot go on without.
* the least times in ms that follow, of which the longest is what limits.

What it leaves out: how long a product waits for its operands on their way through shared memory, barriers, and spilled
registers. The multiprocessors that have no program do nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NamedTuple

import kernel_resources

from titans_build.kernels.memory.triton import answer_bwd_kernel as memory_answer_backward
from titans_build.kernels.memory.triton import decay_kernel as memory_decay
from titans_build.kernels.memory.triton.schedule import schedule


class Gpu(NamedTuple):
    """An H200, by its data sheet but for the last three."""

    processors: int = 132
    flops: float = 989e12
    memory: float = 4.8e12
    registers: int = 65536
    shared: int = 228 * 1024
    threads: int = 2048
    cache: float = 5.5e12
    """Assumed: bytes a second of the cache's second level, all multiprocessors together ..."""
    port: float = 110e9
    """... and of one alone: 64 bytes a cycle."""
    wait: float = 0.25e-6
    """Assumed: seconds from asking that cache to having a tile."""


class Need(NamedTuple):
    """Of one program per chunk and row, if a sequence is long; numbers of 4 bytes."""

    flops: float
    fine: float
    """Of these, products that are made of three."""
    moved: float
    passed: float
    waits: float
    """Of one program: over a chunk, if it walks the chunks."""
    programs: int
    """For each chunk of each row; 0: one for each row, over all of its chunks."""


def needs(kernel: str, b: int, d: int, w: int, layers: int, s: int, time: int) -> Need:
    """One chunk of ``b`` tokens of one row; ``time``: of the whole row. The loops of the kernels, counted."""
    two = layers == 2
    first, last = (w * d if two else 0), d * w
    state = first + last
    heads, hidden = b * d, b * w * two  # a chunk's tokens times what they are as wide as
    blocks, keys = math.ceil(w / 32), math.ceil(b / 64)
    rounds = math.ceil(b / schedule(kernel, b, d, w, d, layers=layers, parts=s)["ROWS"])
    did = 3 * heads + 4 * hidden  # what writing leaves behind of its tokens
    gates = s * b + s * s
    inputs = hidden if two else heads
    gradients, onward = 2 * b * state + 2 * b * last * two, 2 * s * b * state
    if kernel in ("write_kernel", "write_resident_kernel", "recall_kernel"):
        walked = rounds * (state + last * two) + 4 * heads + did + 2 * hidden
        if kernel == "recall_kernel":
            moved, waits = 2 * heads + did + state, 1 + blocks * (1 + 2 * two)
            return Need(gradients, gradients, moved, walked, waits, rounds)
        moved = 2 * heads + did + gates + s * state
        if kernel == "write_resident_kernel":
            return Need(gradients + onward, gradients, moved, moved, rounds + 1, 0)
        again = s * (layers * blocks * heads + (1 + two) * inputs) + s * (s + 1) * state
        waits = rounds * (1 + blocks * (1 + 2 * two)) + layers * blocks * s * (rounds + 1)
        return Need(gradients + onward, gradients, moved, walked + again, waits, 0)
    if kernel in ("write_backward_kernel", "write_backward_resident_kernel"):
        flops = 2 * onward + 4 * b * last + two * (4 * b * last + 4 * b * first)
        moved = 2 * heads + did + inputs + 2 * heads + hidden + inputs + 2 * heads + 2 * gates + 2 * s * state
        if kernel == "write_backward_resident_kernel":
            return Need(flops, 0, moved, moved, rounds + 2, 0)
        weights = rounds * ((s + 1) * state + last * two) + (s * s + 3 * s + 2) * state
        passed = weights + s * (3 * inputs + 3 * hidden + 3 * heads * two) + 3 * hidden + 2 * inputs + 3 * hidden
        passed += 12 * heads + 3 * hidden + blocks * heads * (1 + 2 * two) + inputs + 2 * hidden
        waits = rounds * (2 + blocks * (s * (1 + two) + 2 + two)) + blocks * (s * layers + 1 + rounds * (1 + 2 * two))
        return Need(flops, 0, moved, passed, waits, 0)
    scores = 4 * b * b * (d + w) if two else 4 * b * b * d
    if kernel == "read_kernel":
        moved = 4 * heads + inputs + 2 * hidden + b * b + gates + s * state + heads + two * b * b
        passed = (
            rounds * (s * state + 2 * heads + inputs + hidden) + two * b * b * (1 + blocks) + 4 * heads + 3 * hidden
        )
        waits = keys * (two + blocks + 1) + blocks * (keys * two + s * layers)
        return Need(onward + scores, 0, moved, passed, waits, rounds)
    if kernel == "read_backward_kernel":
        moved = 6 * heads + inputs + 3 * hidden + 2 * b * b + 2 * layers * b * b + gates + s * state
        passed = rounds * (s * state + 2 * inputs + hidden + 3 * heads) + b * b * (4 * layers + blocks) + 5 * heads
        waits = 1 + keys * (blocks + 1) + blocks * (keys + s * layers) + two * keys * (blocks + 2)
        return Need(onward + 1.5 * scores, 0, moved, passed + 3 * hidden, waits, rounds)
    if kernel == "read_backward_state_kernel":
        moved = 2 * layers * b * b + 4 * heads + 3 * hidden + inputs + s * state
        passed = b * b * (1 + blocks * layers + two) + keys * (2 * heads + 2 * hidden) + 2 * heads + 2 * hidden
        passed += s * (layers * blocks * heads + 2 * hidden) + s * state
        waits = keys * rounds * (1 + blocks * layers + two) + blocks * s * rounds * layers
        return Need(onward + scores, 0, moved, passed, waits, 1)
    if kernel == "decay_kernel":
        return Need(0, 0, (1 + s) * b * b + 3 * b + 2 * gates, (1 + s) * b * b + 3 * b + 2 * gates, b, 1)
    if kernel == "decay_backward_kernel":
        return Need(0, 0, (1 + s) * b * b + 6 * b + 2 * gates, (1 + s) * b * b + 6 * b + 2 * gates, b, 1)
    if kernel == "step_kernel":  # one token; a chunk is as many calls
        moved = b * 2 * (s + 1) * state
        return Need(12 * b * state, 0, moved, moved, 4 * blocks, b)
    # queries of weights that stay as they are: a chunk's share of the row's
    share = b / time
    if kernel == "answer_kernel":
        moved, passed = 2 * heads + share * state, 2 * heads + rounds * state
        return Need(2 * b * state, 0, moved, passed, layers * blocks, rounds)
    if kernel == "answer_backward_kernel":
        moved, passed = 4 * heads + share * state, 4 * heads + 2 * rounds * state
        return Need(5 * b * state, 0, moved, passed, 2 * layers * blocks, rounds)
    stretch, _ = memory_answer_backward.stretches(time)
    moved, passed = 2 * heads + 2 * b / stretch * state, blocks * 2 * heads + 2 * b / stretch * state
    return Need(4 * b * state, 0, moved, passed, stretch / b * rounds, 0)


def line(row: dict[str, Any], need: Need, gpu: Gpu, chunks: int, rows: int, sizes: tuple[int, int, int]) -> str:
    """A line of the table, of a kernel's resources and needs; ``sizes``: of a chunk, a head and the hidden layer."""
    kernel, warps = row["kernel"].rsplit(".")[1], row["warps"]
    b, _, w = sizes
    room = min(
        gpu.registers // (32 * warps * row["registers"]),
        gpu.threads // (32 * warps),
        gpu.shared // (row["shared"] + 1024),
    )
    programs, waits = (rows * chunks * need.programs, need.waits) if need.programs else (rows, need.waits * chunks)
    if kernel.startswith("decay"):
        programs = math.ceil(programs / memory_decay.decay_tiles(b)["MANY"])
    if kernel == "answer_backward_weights_kernel":
        programs, waits = rows * math.ceil(w / 32) * memory_answer_backward.stretches(chunks * b)[1], need.waits
    launches = b * chunks if kernel == "step_kernel" else 1  # a token waits for the one before it
    programs //= launches
    busy = min(programs, gpu.processors)
    turns = math.ceil(programs / (gpu.processors * room)) * launches
    many = rows * chunks
    times = {
        "products": many * (need.flops + 2 * need.fine) / (gpu.flops * busy / gpu.processors),
        "memory": many * need.moved * 4 / min(gpu.memory, busy * gpu.port),
        "cache": many * need.passed * 4 / min(gpu.cache, busy * gpu.port),
        "waits": turns * waits * gpu.wait,
    }
    limit = max(times, key=lambda name: times[name])
    cells = (
        f"`{kernel}`", f"{need.flops * many / 1e9:.0f}", *(f"{n * 4 / 1024:.0f}" for n in (need.moved, need.passed)),
        row["registers"], row["shared"] // 1024, programs, room, f"{waits:.0f}",
        *(f"{1e3 * time:.2f}" for time in times.values()), limit,
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


HEAD = (
    "kernel", "GFLOP", "moved, KiB a chunk", "passed, KiB a chunk", "registers", "shared, KiB", "programs", "an SM",
    "waits", "products, ms", "memory, ms", "cache, ms", "waits, ms", "limit",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, choices=(1, 2), default=2)
    sizes = (("dim", 64), ("hidden", 128), ("chunk", 64), ("rows", 256), ("tokens", 32768))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args(arguments)
    b, d, w = asked.chunk, asked.dim, asked.dim if asked.layers == 1 else asked.hidden
    print(f"| {' | '.join(HEAD)} |\n|---|{'--:|' * (len(HEAD) - 2)}---|")
    for kernel, fixed, known in kernel_resources.kernels(d, w, b, "bfloat16", asked.layers):
        if kernel.__module__.rsplit(".", 1)[1].startswith("memory_"):
            row = kernel_resources.compiled(kernel, fixed, known, "sm_90")
            need = needs(kernel.__name__, b, d, w, asked.layers, 2, asked.tokens)
            print(line(row, need, Gpu(), asked.tokens // b, asked.rows, (b, d, w)), flush=True)


if __name__ == "__main__":
    sys.exit(main())

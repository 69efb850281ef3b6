"""Forward FLOPs of the built-in blocks (a multiply-add counts 2), for ``Block.flops``."""

from __future__ import annotations

import functools
from typing import cast

from ..kernels.memory import memory_flops
from ..kernels.memory.learner.updates import Muon
from .attention import Attention
from .block import Block, count_flops
from .combinators import Chain, Gate, Layer, Persistent, Residual
from .context import Context
from .feedforward import FeedForward
from .layers import LayerNorm, RMSNorm
from .memory import NeuralMemory

GATING = 10
"""For each feature: two norms, a sigmoid and a product."""


def every_flops(block: Block, length: int, step: int) -> int:
    """FLOPs if only the outputs at every ``step``-th token are used."""
    if step == 1 or "flops" in vars(block) or type(block).flops is not Block.flops:
        return block.flops(length)
    return _every_flops(block, length, step)


@functools.singledispatch
def _every_flops(block: Block, length: int, step: int) -> int:
    return block.flops(length)


@functools.singledispatch
def read_flops(block: Block, length: int) -> int:
    """FLOPs of ``read``. For other classes: their method ``read_flops``, or 0 without one."""
    count = getattr(block, "read_flops", None)
    return 0 if count is None else cast(int, count(length))


@count_flops.register
def _(block: NeuralMemory, length: int) -> int:
    projections = block.qkv.weight.numel() + block.controls.weight.numel() + 2 * block.output.weight.numel()
    convolution = 2 * 3 * block.dim * block.conv
    weights = sum(out * width for out, width in block.shapes)
    memory = 2 * weights if block.use == "read" else write_flops(block, length)
    return length * (2 * projections + convolution + block.heads * memory)


def write_flops(block: NeuralMemory, length: int) -> int:
    """Of the operation, for each token and head."""
    rule, weights = block.rule, sum(out * width for out, width in block.shapes)
    chunk = min(block.chunk, length)
    found = memory_flops(block.shapes, chunk, block.momentum)
    if block.retrieve == "anchor":  # read at one matrix, without scores of queries and keys
        found = memory_flops(block.shapes, 0, block.momentum) - 2 * weights * block.momentum
    if rule is not None and isinstance(rule.optimizer, Muon):
        sides = [sorted(shape) for shape in block.shapes]
        iteration = sum(4 * short * short * long + 2 * short**3 for short, long in sides)
        found += rule.optimizer.steps * iteration // (chunk if rule.moves_once else 1)
    return found


@read_flops.register
def _(block: NeuralMemory, length: int) -> int:
    # projection of the query, gate, output, and the network
    weights = sum(out * width for out, width in block.shapes)
    return 2 * length * (3 * block.output.weight.numel() + block.heads * weights)


@count_flops.register
def _(block: Attention, length: int) -> int:
    return _every_flops(block, length, 1)


@_every_flops.register
def _(block: Attention, length: int, step: int) -> int:
    """The matrix products: projections, then scores and values of every key visible to a query."""
    queries = length // step
    whole = min(queries, (length if block.window is None else block.window) // step)
    # the first queries see step, 2 step, ... keys, the others a window's
    pairs = step * whole * (whole + 1) // 2 + (queries - whole) * (block.window or 0)
    key_value = 2 * block.kv_heads * block.head_dim * block.dim
    query_out = block.qkv.weight.numel() - key_value + block.out.weight.numel()
    return 2 * (length * key_value + queries * query_out) + 4 * block.dim * pairs


@count_flops.register
def _(block: FeedForward, length: int) -> int:
    return 2 * length * (block.up.weight.numel() + block.down.weight.numel())


@count_flops.register
def _(block: RMSNorm, length: int) -> int:
    return 4 * block.dim * length  # square, add, scale, gain


@count_flops.register
def _(block: LayerNorm, length: int) -> int:
    return 6 * block.dim * length  # a mean and its subtraction too


@count_flops.register
def _(block: Chain, length: int) -> int:
    return sum(child.flops(length) for child in block.of)


@read_flops.register
def _(block: Chain, length: int) -> int:
    return sum(read_flops(child, length) for child in block.of)


@count_flops.register
def _(block: Residual, length: int) -> int:
    return _every_flops(block, length, 1)


@_every_flops.register
def _(block: Residual, length: int, step: int) -> int:
    return every_flops(block.of, length, step) + length // step * block.dim


@read_flops.register
def _(block: Residual, length: int) -> int:
    return read_flops(block.of, length) + length * block.dim


def _gating_flops(block: Gate, length: int) -> int:
    return len(block.branches) * GATING // 2 * block.dim * length


@count_flops.register
def _(block: Gate, length: int) -> int:
    return sum(child.flops(length) for child in block.branches) + _gating_flops(block, length)


@read_flops.register
def _(block: Gate, length: int) -> int:
    return sum(read_flops(child, length) for child in block.branches) + _gating_flops(block, length)


@count_flops.register
def _(block: Persistent, length: int) -> int:
    return cast(int, block.of.flops(block.tokens.shape[0] + length))


@read_flops.register
def _(block: Persistent, length: int) -> int:
    return read_flops(block.of, length)


@count_flops.register
def _(block: Layer, length: int) -> int:
    return sum(child.flops(length) for child in [*block.norms, *block.blocks])


@count_flops.register
def _(block: Context, length: int) -> int:
    # in each segment attention runs over two tokens for every one, after the persistent tokens
    segments, rest = divmod(length, block.segment)
    persistent = 0 if block.persistent is None else len(block.persistent)
    attend = segments * every_flops(block.attend, persistent + 2 * block.segment, 2)
    if rest:
        attend += every_flops(block.attend, persistent + 2 * rest, 2)
    # ``memory.flops`` is that of writing y_j and reading it back; h_j is one read more
    return block.memory.flops(length) + read_flops(block.memory, length) + attend + GATING * block.dim * length

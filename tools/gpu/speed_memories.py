"""The memories that are timed: the operation, the block, others of their kind, and one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...kernels.memory import MemoryState, titans_memory
from ...kernels.memory.cost import memory_flops
from ...kernels.memory.tokens import Tokens
from ...registry import create
from .baselines import autocast, linear_memories, titans_pytorch
from .parity import scheduled
from .sizes import Sizes
from .timing import Case, Run, backends, passes


def memories(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The memory operation, chunk by chunk, every path, and PyTorch's also through its compiler."""
    for length in sizes.lengths:
        for d, expansion, layers in sizes.widths:
            shape = _shape(sizes.heads, length, d, expansion, layers)
            shapes = layer_shapes(d, expansion, layers)
            useful = sizes.heads * length * memory_flops(shapes, sizes.chunk)
            facts = dict(time=length, chunk=sizes.chunk, layers=layers, width=d, grad=True)
            for backend in backends("memory", device, torch.float32, **facts):
                slow = backend != "triton" and device.type == "cuda"
                if slow and length > 8192:
                    continue  # ten times slower: the shorter ones tell
                main = (d, expansion, layers) in sizes.widths[:2] or layers == 1
                rank = (6 if slow else 0 if main else 5) + (layers == 1)
                for compiled in (False, True) if backend == "torch" and length == sizes.lengths[0] else (False,):
                    for both in (True, False):
                        make = _memory(device, dtype, sizes, length, shapes, backend, both, compiled)
                        direction, name = "both" if both else "forward", backend + ", compiled" * compiled
                        yield Case(
                            "memory", name, shape, direction, make, useful * (3 if both else 1),
                            tokens=sizes.heads * length, operation="memory", rank=rank,
                        )  # fmt: skip
                if backend == "triton" and length == sizes.lengths[0]:
                    for schedule in ("resident", "streamed"):
                        make = _memory(device, dtype, sizes, length, shapes, backend, True, False, schedule)
                        yield Case(
                            "memory", f"triton, {schedule}", shape, "both", make, useful * 3,
                            tokens=sizes.heads * length, operation="memory", rank=5,
                        )  # fmt: skip


def _shape(rows: int, length: int, d: int, expansion: int, layers: int) -> str:
    return f"{rows} x {length}, d {d}, " + (f"expansion {expansion}" if layers > 1 else "one layer")


def blocks(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The memory block, with its projections, and titans-pytorch's memory, which has some too; of two layers."""
    heads = min(4, sizes.heads)
    rows = sizes.heads // heads
    for length in sizes.lengths:
        if length > max(8192, sizes.lengths[0]):
            continue
        for d, expansion, layers in sizes.widths[:2]:
            if layers != 2:
                continue
            shape = _shape(sizes.heads, length, d, expansion, layers)
            spec = {"type": "memory", "heads": heads, "depth": 2, "expansion": expansion, "chunk": sizes.chunk}

            def ours(length: int = length, d: int = d, spec: dict[str, Any] = spec) -> tuple[Any, list[Tensor]]:
                block = create(spec, dim=heads * d).to(device)
                x = torch.randn(rows, length, heads * d, device=device)

                def forward() -> Tensor:
                    with autocast(device, dtype):
                        return block(x)[0]

                return forward, [x, *block.parameters()]

            def theirs(length: int = length, d: int = d, expansion: int = expansion) -> tuple[Any, list[Tensor]]:
                return titans_pytorch(device, dtype, rows, length, heads, d, expansion, sizes.chunk)

            for backend, start in (("auto", ours), ("titans-pytorch", theirs)):
                for both in (True, False):
                    yield Case(
                        "memory block", backend, shape, "both" if both else "forward", _started(start, both),
                        tokens=sizes.heads * length, rank=3,
                    )  # fmt: skip


def rules(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Other linear memories, of states as large as those of one layer."""
    for length in sizes.lengths:
        for d, expansion, layers in sizes.widths:
            if layers > 1:
                continue
            for name, start in linear_memories(device, dtype, sizes.heads, length, d).items():
                for both in (True, False):
                    shape, direction = _shape(sizes.heads, length, d, expansion, layers), "both" if both else "forward"
                    rank = 4 if "gated" in name else 7
                    make = _started(start, both)
                    yield Case("memory", name, shape, direction, make, tokens=sizes.heads * length, rank=rank)


def _started(start: Callable[[], tuple[Callable[[], Tensor], list[Tensor]]], both: bool) -> Callable[[], Run]:
    def make() -> Run:
        torch.manual_seed(0)
        forward, leaves = start()
        for leaf in leaves:
            leaf.requires_grad_(both)
        return passes(forward, leaves, both)

    return make


def layer_shapes(d: int, expansion: int, layers: int) -> list[tuple[int, int]]:
    """``(out, in)`` of each layer."""
    widths = [d, *[d * expansion] * (layers - 1), d]
    return [(out, in_) for in_, out in pairwise(widths)]


def _tokens(device: torch.device, dtype: torch.dtype, rows: int, length: int, d: int) -> Tokens:
    shape = (1, length, rows)
    q, k, v = (torch.randn(*shape, d, device=device) for _ in range(3))
    gates = (torch.sigmoid(torch.randn(shape, device=device) + bias) for bias in (-3, 1, -6))
    theta, eta, alpha = gates
    return Tokens(normalize(q, dim=-1), normalize(k, dim=-1), v, 0.1 * theta, eta, alpha).map(lambda x: x.to(dtype))


def _answers(tokens: Tokens, state: MemoryState, chunk: int, gain: Tensor, backend: str) -> Tensor:
    q, k, v, theta, eta, alpha = tokens
    return titans_memory(q, k, v, theta, eta, alpha, state, chunk=chunk, norm=gain, backend=backend)[0]


def _memory(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, length: int, shapes: list[tuple[int, int]], backend: str,
    both: bool, compiled: bool, schedule: str = "auto",
) -> Callable[[], Run]:  # fmt: skip
    def make() -> Run:
        torch.manual_seed(0)
        d = shapes[0][1]
        tokens = _tokens(device, dtype, sizes.heads, length, d)
        weights = [torch.randn(1, sizes.heads, out, in_, device=device) * in_**-0.5 for out, in_ in shapes]
        gain = torch.ones(sizes.heads, d, device=device, dtype=dtype)
        leaves = [*(x for x in tokens if x is not None), gain, *weights]
        for leaf in leaves:
            leaf.requires_grad_(both)

        def forward() -> Tensor:
            return _answers(tokens, MemoryState.fresh(tuple(weights)), sizes.chunk, gain, backend)

        return scheduled(schedule)(passes(torch.compile(forward) if compiled else forward, leaves, both))

    return make


def decoding(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """One token of many rows: the state is read once and written once, and that is what has to be paid for."""
    for d, expansion, layers in sizes.widths:
        shapes = layer_shapes(d, expansion, layers)
        moved = sizes.stepping * sum(out * in_ for out, in_ in shapes) * 6 * 4  # weights, momentum, anchor: in and out
        facts = dict(time=1, chunk=sizes.chunk, layers=layers, width=d, grad=False)
        shape = f"{sizes.stepping} x 1, d {d}, " + (f"expansion {expansion}" if layers > 1 else "one layer")
        for backend in backends("memory", device, torch.float32, **facts):
            make = _step(device, dtype, sizes, shapes, backend)
            yield Case(
                "memory step", backend, shape, "forward", make, moved=moved, tokens=sizes.stepping, operation="memory",
                rank=2,
            )  # fmt: skip


def _step(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, shapes: list[tuple[int, int]], backend: str
) -> Callable[[], Run]:
    def make() -> Run:
        torch.manual_seed(0)
        d = shapes[0][1]
        tokens = _tokens(device, dtype, sizes.stepping, 1, d)
        weights = [torch.randn(1, sizes.stepping, out, in_, device=device) * in_**-0.5 for out, in_ in shapes]
        gain = torch.ones(sizes.stepping, d, device=device, dtype=dtype)
        state = MemoryState.fresh(tuple(weights))
        return passes(lambda: _answers(tokens, state, sizes.chunk, gain, backend), [], False)

    return make

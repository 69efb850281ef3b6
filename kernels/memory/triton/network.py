"""The memory network on the Triton kernels: what ``chunk_network`` does, in a launch or two for each thing it does."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import launch
from ..activation import ACTIVATIONS
from ..buffers import Adjoint, Scratch, Work
from ..chunk_network import ChunkNetwork, ReadGrad, WriteGrad
from ..decay import ChunkDecay
from ..read_torch import EPS
from .decay import triton_decay
from .network_kernel import NUMBERS
from .read_bwd_kernel import read_backward_kernel, read_backward_state_kernel
from .read_kernel import read_kernel
from .resident_bwd_kernel import write_backward_resident_kernel
from .resident_kernel import write_resident_kernel
from .schedule import operands, resident, schedule
from .write_bwd_kernel import write_backward_kernel
from .write_kernel import recall_kernel, write_kernel


class TritonNetwork(ChunkNetwork):
    """A network of one or two layers.

    One layer stands in the second's place: its inputs are the keys and the queries, and nothing is activated.
    """

    def __init__(
        self,
        activation: str,
        gain: Tensor | None,
        clip: float | None,
        scratch: Scratch,
        *,
        products: dict[str, Any] | None = None,
    ) -> None:
        """``products``: what ``schedule.operands`` said when forward began, for backward to do the same."""
        # the kernels find a row's gain by its number: with one head, that of every row may be one piece of memory
        super().__init__(activation, None if gain is None else gain.contiguous(), clip, scratch)
        self._number, self._products = NUMBERS[activation], products

    decay = staticmethod(triton_decay)

    def advance(
        self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: Work, anchor: list[Tensor] | None
    ) -> None:
        written.inputs[0] = keys
        chunks, rows, b, _ = keys.shape
        sizes = self._sizes(keys, written)
        kernel = write_resident_kernel if self._stays(sizes, written, backward=False) else write_kernel
        self._run(
            kernel, (rows,), b, sizes, written,
            keys, values, self.gain, decay.mix.contiguous(), decay.write, *_two(anchor, keys), *_two(written.stacks),
            written.inputs[-1], *_two(written.hidden), *_two(written.raw), *_two(written.errors),
            chunks, rows, b, *sizes, self.clip or 0.0, EPS,
            CLIP=self.clip is not None, ANCHORED=anchor is not None,
        )  # fmt: skip

    def recall(
        self, keys: Tensor, values: Tensor, written: Work, anchor: list[Tensor] | None, hidden_known: bool
    ) -> None:
        written.inputs[0] = keys
        chunks, rows, b, _ = keys.shape
        sizes = self._sizes(keys, written)
        self._run(
            recall_kernel, (chunks * rows,), b, sizes, written,
            keys, values, self.gain, *_two(anchor, keys), *_two(written.stacks), written.inputs[-1],
            *_two(written.hidden), *_two(written.raw), *_two(written.errors), rows, b, *sizes, self.clip or 0.0, EPS,
            CLIP=self.clip is not None, ANCHORED=anchor is not None,
        )  # fmt: skip

    def read(
        self, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        chunks, rows, b, _ = queries.shape
        y = torch.empty_like(written.hidden[-1])
        sizes = self._sizes(queries, written)
        hidden = asked[0] if asked else self.scratch("asked 0", *written.hidden[0].shape)
        self._run(
            read_kernel, (chunks * rows,), b, sizes, written,
            queries, written.inputs[0], self.gain, decay.read.contiguous(), decay.carry.contiguous(),
            *_two(written.stacks), written.inputs[-1], *_two(written.errors), self._scores("decayed 0", queries), y,
            hidden if len(written.stacks) == 2 else queries, asked[-1] if asked else y, rows, b, *sizes, EPS,
            KEEP=bool(asked),
        )  # fmt: skip
        return y, asked

    def read_backward(
        self, grad_y: Tensor, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor], grad: Adjoint
    ) -> ReadGrad:
        chunks, rows, b, _ = queries.shape
        sizes = self._sizes(queries, written)
        weigh, carry = decay.read.contiguous(), decay.carry.contiguous()
        to_queries, to_weigh, to_carry = map(torch.empty_like, (queries, weigh, carry))
        tiles = schedule(read_backward_kernel.__name__, b, *sizes)
        blocks = triton.cdiv(b, tiles["ROWS"])
        to_gain = None if self.gain is None else queries.new_empty(chunks, rows, blocks, grad_y.shape[-1])
        below = asked[0] if len(asked) == 2 else queries
        pushed = [self.scratch(f"pushed {l}", *x.shape) for l, x in enumerate(asked)]
        between = [self._scores(f"{name} {l}", queries) for name in ("decayed", "felt") for l in range(2)]
        self._run(
            read_backward_kernel, (chunks * rows, blocks), b, sizes, written,
            grad_y, queries, written.inputs[0], self.gain, weigh, carry, *_two(written.stacks), written.inputs[-1],
            *_two(written.errors), below, asked[-1], to_queries, to_weigh, to_carry, to_gain,
            *_two(pushed), *between, rows, b, *sizes, EPS,
        )  # fmt: skip
        self._run(
            read_backward_state_kernel, (chunks * rows,), b, sizes, written,
            queries, carry, below, *_two(pushed), *between, grad.inputs[0], grad.inputs[-1], *_two(grad.errors),
            *_two(grad.stacks), b, *sizes,
        )  # fmt: skip
        return ReadGrad(to_queries, to_weigh, to_carry, None if to_gain is None else to_gain.sum((0, 2)).unsqueeze(1))

    def write_backward(
        self,
        keys: Tensor,
        values: Tensor,
        decay: ChunkDecay,
        written: Work,
        grad: Adjoint,
        anchor: list[Tensor] | None,
        grad_anchor: list[Tensor] | None,
    ) -> WriteGrad:
        chunks, rows, b, _ = keys.shape
        mix = decay.mix.contiguous()
        to_values, to_write, to_mix = map(torch.empty_like, (values, decay.write, mix))
        to_gain = None if self.gain is None else torch.empty_like(self.gain)
        sizes = self._sizes(keys, written)
        stays = self._stays(sizes, written, backward=True)
        kernel = write_backward_resident_kernel if stays else write_backward_kernel
        self._run(
            kernel, (rows,), b, sizes, written,
            keys, values, self.gain, mix, decay.write, *_two(anchor, keys), *_two(written.stacks),
            written.inputs[-1], *_two(written.hidden), *_two(written.raw), *_two(written.errors),
            *_two(grad.stacks), grad.inputs[0], grad.inputs[-1], *_two(grad.errors), to_values, to_write, to_mix,
            to_gain, *_two(grad_anchor, keys), chunks, rows, b, *sizes, self.clip or 0.0, EPS,
            CLIP=self.clip is not None, ANCHORED=anchor is not None,
        )  # fmt: skip
        return WriteGrad(to_values, to_write, to_mix, to_gain)

    @staticmethod
    def _sizes(x: Tensor, written: Work) -> tuple[int, int, int]:
        """``d_in``, ``width``, ``d_out``."""
        out, width = written.stacks[-1].shape[3:]
        return x.shape[3], width, out

    def _stays(self, sizes: tuple[int, int, int], written: Work, *, backward: bool) -> bool:
        """Whether the state stays in registers."""
        stack = written.stacks[0]
        return resident(
            len(written.stacks), stack.shape[2], *sizes, self._operands(written), backward=backward, wide=stack.dtype
        )

    def _operands(self, written: Work) -> dict[str, Any]:
        return self._products or operands(written.stacks[0].dtype)

    def _scores(self, name: str, queries: Tensor) -> Tensor:
        """Room for a number for each query and key."""
        return self.scratch(name, *queries.shape[:3], queries.shape[2])

    def _run(
        self, kernel: Any, grid: tuple[int, ...], b: int, sizes: tuple[int, int, int], written: Work, *arguments: Any,
        **flags: bool,
    ) -> None:  # fmt: skip
        """A launch with what every kernel is compiled for; each takes of it what it has a name for."""
        layers, parts = len(written.stacks), written.stacks[0].shape[2]
        wide = written.stacks[0].dtype == torch.float64
        tiles = schedule(kernel.__name__, b, *sizes, layers=layers, parts=parts)
        fixed: dict[str, Any] = dict(
            **flags, **tiles, LAYERS=layers, PARTS=parts, ACTIVATION=self._number if layers == 2 else 0,
            NORM=self.gain is not None, WIDE=tl.float64 if wide else tl.float32, **self._operands(written),
        )  # fmt: skip
        if kernel in (read_kernel, recall_kernel):
            grid = (*grid, triton.cdiv(b, tiles["ROWS"]))
        options = ("num_warps", "num_stages")
        launch(kernel, grid, *arguments, **{n: x for n, x in fixed.items() if n in kernel.arg_names or n in options})


def _two(layers: list[Tensor] | None, none: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The two layers' tensors; one layer stands in the second's place. ``none`` stands for what is not read."""
    if layers is None:
        return none, none
    return layers[0], layers[-1]


assert ACTIVATIONS.keys() == NUMBERS.keys()

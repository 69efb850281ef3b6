"""The memory network on the Triton kernels: what ``chunk_network`` does, in one launch for each thing it does."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import memory as kernels
from .activation import ACTIVATIONS
from .buffers import Adjoint, Scratch, Work
from .chunk_network import ChunkNetwork, ReadGrad, WriteGrad
from .decay import ChunkDecay
from .reading import EPS

_NUMBERS = {"identity": 0, "relu": 1, "silu": 2, "gelu": 3}
_PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


class TritonNetwork(ChunkNetwork):
    """A network of one or two layers; ``recall``, which is a few large products, stays with PyTorch."""

    def __init__(self, activation: str, gain: Tensor | None, clip: float | None, scratch: Scratch) -> None:
        super().__init__(activation, gain, clip, scratch)
        self._number = _NUMBERS[activation]

    def advance(
        self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: Work, anchor: list[Tensor] | None
    ) -> None:
        written.inputs[0] = keys
        chunks, rows, b, _ = keys.shape
        sizes, flags = self._shape(keys, values, written)
        kernels.write_kernel[(rows,)](
            keys, values, self.gain, decay.mix.contiguous(), decay.write, *self._two(anchor, keys),
            *self._two(written.stacks), self._second(written.inputs), *self._two(written.hidden),
            *self._two(written.raw), *self._two(written.errors), chunks, rows, b, *sizes, self.clip or 0.0, EPS,
            CLIP=self.clip is not None, ANCHORED=anchor is not None, **flags,
        )  # fmt: skip

    def read(
        self, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        chunks, rows, b, _ = queries.shape
        y = torch.empty_like(written.hidden[-1])
        sizes, flags = self._shape(queries, y, written)
        kernels.read_kernel[(chunks * rows,)](
            queries, written.inputs[0], self.gain, decay.read.contiguous(), decay.carry.contiguous(),
            *self._two(written.stacks), self._second(written.inputs), *self._two(written.errors), y,
            *self._two(asked or None, y), rows, b, *sizes, EPS, KEEP=bool(asked), **flags,
        )  # fmt: skip
        return y, asked

    def read_backward(
        self, grad_y: Tensor, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor], grad: Adjoint
    ) -> ReadGrad:
        chunks, rows, b, _ = queries.shape
        weigh, carry = decay.read.contiguous(), decay.carry.contiguous()
        to_queries, to_weigh, to_carry = map(torch.empty_like, (queries, weigh, carry))
        to_gain = None if self.gain is None else queries.new_empty(chunks, rows, grad_y.shape[-1])
        sizes, flags = self._shape(queries, grad_y, written)
        kernels.read_backward_kernel[(chunks * rows,)](
            grad_y, queries, written.inputs[0], self.gain, weigh, carry, *self._two(written.stacks),
            self._second(written.inputs), *self._two(written.errors), *self._two(asked), to_queries, grad.inputs[0],
            to_weigh, to_carry, to_gain, *self._two(grad.stacks), self._second(grad.inputs), *self._two(grad.errors),
            rows, b, *sizes, EPS, **flags,
        )  # fmt: skip
        return ReadGrad(to_queries, to_weigh, to_carry, None if to_gain is None else to_gain.sum(0).unsqueeze(1))

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
        sizes, flags = self._shape(keys, values, written)
        kernels.write_backward_kernel[(rows,)](
            keys, values, self.gain, mix, decay.write, *self._two(anchor, keys), *self._two(written.stacks),
            self._second(written.inputs), *self._two(written.hidden), *self._two(written.raw),
            *self._two(written.errors), *self._two(grad.stacks), grad.inputs[0], self._second(grad.inputs),
            *self._two(grad.errors), to_values, to_write, to_mix, to_gain, *self._two(grad_anchor, keys),
            chunks, rows, b, *sizes, self.clip or 0.0, EPS,
            CLIP=self.clip is not None, ANCHORED=anchor is not None, **flags,
        )  # fmt: skip
        return WriteGrad(to_values, to_write, to_mix, to_gain)

    @staticmethod
    def _two(layers: list[Tensor] | None, none: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The two layers' tensors; one layer stands in the second's place. ``none`` stands for what is not read."""
        if layers is None:
            return none, none
        return layers[0], layers[-1]

    @staticmethod
    def _second(layers: list[Tensor]) -> Tensor:
        return layers[-1]

    def _shape(self, x: Tensor, y: Tensor, written: Work) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """``d_in``, ``width``, ``d_out``, and what a kernel is compiled for."""
        stack, b, wide = written.stacks[-1], x.shape[2], x.dtype == torch.float64
        d_in, d_out, width = x.shape[3], y.shape[3], stack.shape[4]
        at_least = lambda n: max(16, triton.next_power_of_2(n))  # noqa: E731
        flags = dict(
            LAYERS=len(written.stacks), PARTS=stack.shape[2], ACTIVATION=self._number, NORM=self.gain is not None,
            TIME=at_least(b), IN=at_least(d_in), OUT=at_least(d_out), BLOCK=min(32, at_least(width)),
            OPERAND=tl.float64 if wide else tl.float32, WIDE=tl.float64 if wide else tl.float32,
            PRECISION=_PRECISIONS[torch.get_float32_matmul_precision()], num_warps=8, num_stages=1,
        )  # fmt: skip
        return (d_in, width, d_out), flags


assert ACTIVATIONS.keys() == _NUMBERS.keys()

"""Memories that the kernels do not take (heads above 128, three layers or more, long chunks), in batched products.

The mathematics is that of ``ChunkNetwork``. The operands of its products are in half precision where the model is, with
sums in float32; the gradients of a chunk and what they add to the state are three products each, because what is lost
there is lost for all later tokens. The decays come from the Triton kernel, which makes a chunk's ``b x b`` matrices in
``b^2`` steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..channels_torch import ChannelNetwork
from ..chunk_torch import ChunkNetwork, Scratch
from ..chunkwise_torch import chunkwise_memory
from ..decay_torch import ChunkDecay
from ..network_torch import ACTIVATIONS, memory_network
from ..state import CHANNELS, MemoryState, Options, Tokens
from .channels import triton_channel_scores
from .decay import triton_decay
from .schedule import operands


def batched_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for any number of layers."""
    kind = BatchedChannelNetwork if CHANNELS in options.rare(tokens) else BatchedNetwork
    network = functools.partial(kind, products=_products(tokens.q.dtype, options.half), chunk=options.chunk)
    return chunkwise_memory(tokens, state, norm, mask, options, network)


def batched_read(
    q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None
) -> Tensor:
    """``read_memory`` for any number of layers; ``half``: what products are rounded to (``half_dtype``)."""
    gain = None if norm is None else norm.unsqueeze(1)
    matmul = Products(_products(weights[0].dtype, half)).matmul
    x = q.to(weights[0].dtype).transpose(1, 2)
    return memory_network(x, weights, ACTIVATIONS[activation], gain, matmul).transpose(1, 2).to(q.dtype)


def _products(dtype: torch.dtype, half: str | None) -> dict[str, Any]:
    return operands(dtype, None if half is None else getattr(torch, half))


class Products:
    """Products of batches of matrices with rounded operands; ``products``: what ``schedule.operands`` said."""

    def __init__(self, products: dict[str, Any]) -> None:
        self._half = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}.get(products["OPERAND"])
        self.largest = torch.finfo(self._half or torch.float64).max
        self._thrice = products["FINE_PRECISION"] == "bf16x3"

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, fine: bool = False) -> Tensor:
        if fine and self._thrice:
            (a, a_rest), (b, b_rest) = _halves(a), _halves(b)
            a, b = torch.cat([a, a, a_rest], -1), torch.cat([b, b_rest, b], -2)
        elif self._half is not None:
            a, b = a.to(self._half), b.to(self._half)
        else:
            return torch.bmm(a, b, out=out)
        if a.is_cuda:
            return torch.bmm(a, b, torch.float32, out=out)
        return torch.bmm(a.float(), b.float(), out=out)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``torch.matmul`` of two tensors with the same batch; differentiable."""
        y: Tensor = _Matmul.apply(self, a, b)
        return y


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as the sum of two bfloat16 numbers, which have 16 of its 24 digits."""
    high = x.bfloat16()
    return high, (x - high.float()).bfloat16()


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.product = product
        return product(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return None, _Matmul.apply(ctx.product, grad, b.mT), _Matmul.apply(ctx.product, a.mT, grad)


class BatchedNetwork(ChunkNetwork):
    """``products``: what ``schedule.operands`` said in forward; ``chunk``: that of the memory."""

    def __init__(
        self, options: Options, gain: Tensor | None, scratch: Scratch, *, products: dict[str, Any], chunk: int
    ) -> None:
        super().__init__(options, gain, scratch)
        self._product, self._chunk = Products(products), chunk
        self.matmul, self.largest = self._product.matmul, self._product.largest

    def matrices(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
    ) -> ChunkDecay:
        if self.at_anchor:
            return super().matrices(theta, eta, alpha, valid, read_after)
        return triton_decay(theta, eta, alpha, valid, read_after, self._chunk)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, fine: bool = False) -> Tensor:
        return self._product(a, b, out, fine=fine)

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, alpha: float = 1, *, fine: bool = False) -> None:
        to.add_(self.product(a, b, fine=fine), alpha=alpha)


class BatchedChannelNetwork(BatchedNetwork, ChannelNetwork):
    """The same with decays by channel."""

    channel_scores = staticmethod(triton_channel_scores)

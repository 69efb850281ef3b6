"""Memories that no fused kernel takes (heads above 128, three layers or more, long chunks), in batched products.

The mathematics is that of ``ChunkNetwork``. Chunks are written one after the other, so that the number of launches for
each counts: a product of all rows is one launch (``products.py``), and so is what is computed between two products
(``batched_kernels.py``). The operands of products are in half precision where the model is, with sums in float32; the
gradients of a chunk and what they add to the state are three products each, because what is lost there is lost for all
later tokens. The decays come from the Triton kernel, which makes a chunk's ``b x b`` matrices in ``b^2`` steps.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ...triton_runtime import launch
from ..channels_torch import ChannelNetwork
from ..chunk_torch import ChunkNetwork, Ends, Scratch, Written, WrittenGrad
from ..chunkwise_torch import chunkwise_memory
from ..decay_torch import ChunkDecay
from ..network_torch import ACTIVATION_NUMBERS, ACTIVATIONS, memory_network
from ..state import CHANNELS, MemoryState, Options, Tokens
from .batched_kernels import (
    clip_backward_kernel,
    clip_kernel,
    error_backward_kernel,
    error_kernel,
    hidden_backward_kernel,
    hidden_kernel,
    hidden_second_kernel,
    inner_kernel,
)
from .channels import triton_channel_decay, triton_channel_scores
from .decay import triton_decay
from .products import Products, wide
from .schedule import loss_constants, operands, tile

TOKENS = 4
"""Of a program that has all numbers of a token: few, because rows are few where heads are wide."""


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


class BatchedNetwork(ChunkNetwork):
    """``products``: what ``schedule.operands`` said in forward; ``chunk``: that of the memory."""

    def __init__(
        self, options: Options, gain: Tensor | None, scratch: Scratch, *, products: dict[str, Any], chunk: int
    ) -> None:
        # the kernels find the gain by the number of batch row and head; that of an expanded tensor would not be there
        super().__init__(options, None if gain is None else gain.contiguous(), scratch)
        self.products, self._chunk = Products(products), chunk
        self.matmul, self.largest = self.products.matmul, self.products.largest
        self._hidden = dict(ACTIVATION=ACTIVATION_NUMBERS[options.activation], GATED=int(self.gated))
        self._curved = self.gated or self.activation.second is not None

    def matrices(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
    ) -> ChunkDecay:
        if self.at_anchor:
            return super().matrices(theta, eta, alpha, valid, read_after)
        return triton_decay(theta, eta, alpha, valid, read_after, self._chunk)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, fine: bool = False) -> Tensor:
        return self.products(a, b, out, fine=fine)

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, alpha: float = 1, *, fine: bool = False) -> None:
        self.products(a, b, to, onto=to, sign=int(alpha), fine=fine)

    # -- write ---------------------------------------------------------------------------------------------------

    def _differentiate(
        self, values: Tensor, weights: list[Tensor], to: Written, gain: Tensor | None, outputs_known: bool = False
    ) -> None:
        last = len(weights) - 1
        for l, weight in enumerate(weights):
            after = to.inputs[l + 1] if l < last else None
            if not outputs_known:
                self.products(to.inputs[l], weight.mT, to.outputs[l], fine=True, **self._then(after))
            if after is not None and (outputs_known or self.gated):
                self._for_hidden(hidden_kernel, after, to.outputs[l], after)
        self._for_errors(
            error_kernel, to, to.outputs[last], to.inputs[0], values, to.deltas[0] if to.deltas else None, gain,
            to.unclipped[last],
        )  # fmt: skip
        for l in range(last - 1, -1, -1):
            g = to.upstream[l] if to.upstream else self.scratch("upstream", *to.inputs[l + 1].shape)
            below = self._then(to.unclipped[l], to.outputs[l])
            self.products(to.unclipped[l + 1], weights[l + 1], g, fine=True, **below)
            if self.gated:
                self._for_hidden(hidden_backward_kernel, g, g, to.outputs[l], None, to.unclipped[l])
        if self.clip is not None:
            self.clip_errors(to)

    def clip_errors(self, to: Written) -> None:
        if len(to.errors) > 2:
            super().clip_errors(to)
        else:
            self._for_clip(clip_kernel, to, to.errors[0], to.errors[-1])

    def advance(self, l: int, i: int, now: Written, decay: ChunkDecay, after: Tensor) -> None:
        self.products.update(
            now.errors[l], now.inputs[l], decay.write[i], after, mix=decay.mix[i], stack=now.stacks[l], sign=-1
        )

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, queries: Tensor, decay: ChunkDecay, written: Written, query_activations: list[Tensor]) -> Tensor:
        state = written.at(slice(None))
        read, (carry, errors) = decay.read.flatten(0, 1), self._confine(decay.carry.flatten(0, 1), state.errors)
        x = z = queries.flatten(0, 1)
        for l, (stack, a, d) in enumerate(zip(state.stacks, state.inputs, errors)):
            if l:
                x = self._activated(z, stack.shape[3])
            buffer = self.scratch(f"z {l % 2}", *x.shape[:2], stack.shape[2])
            z = query_activations[l].flatten(0, 1) if query_activations else buffer
            self.products(x, stack.mT, z, weights=carry, fine=True)
            scores = self.products(x, a.mT, times=read, last=self.last_read)
            self.add_product(z, scores, d, -1, fine=True)
        return self.read_output(queries, z, kept=bool(query_activations))

    def read_backward(
        self,
        grad_y: Tensor,
        queries: Tensor,
        decay: ChunkDecay,
        written: Written,
        query_activations: list[Tensor],
        grad: WrittenGrad,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        state = written.at(slice(None))
        read, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        g, grad_gain = self.output_backward(grad_y, query_activations)
        g = g.flatten(0, 1)
        grad_read, grad_carry = torch.zeros_like(read), torch.zeros_like(carry)
        for l in range(len(state.stacks) - 1, -1, -1):
            stack, a, d = state.stacks[l], state.inputs[l], state.errors[l]
            z = query_activations[l - 1].flatten(0, 1) if l else queries.flatten(0, 1)
            x = self._activated(z, a.shape[2]) if l else z
            self.products.update(g, x, carry, grad.stacks[l][:-1].flatten(0, 1))
            back = self.scratch("back", *x.shape[:2], stack.shape[1] * x.shape[2])
            grad_x = self.scratch(f"grad x {l % 2}", *x.shape)
            self.products(g, stack, grad_x, weights=carry, each=back, fine=True)
            self.add_inner(grad_carry, x, back)
            scores = self.product(x, a.mT, self.scratch("scores", *read.shape))
            grad_scores = self.products(g, d.mT, self.scratch("grad scores", *read.shape), sign=-1, fine=True)
            grad_read.addcmul_(grad_scores, scores)
            self.products(scores.mul_(read).mT, g, grad.errors[l].flatten(0, 1), sign=-1)
            self.product(grad_scores.mul_(read).mT, x, grad.inputs[l].flatten(0, 1))
            self.add_product(grad_x, grad_scores, a, fine=True)
            g = grad_x
            if l:
                g = self.scratch("vjp", *z.shape)
                self._for_hidden(hidden_backward_kernel, grad_x, grad_x, z, None, g)
        g = g.view(queries.shape)
        if self.gain is not None:
            g += grad_y
        return g, grad_read.view(decay.read.shape), grad_carry.view(decay.carry.shape), grad_gain

    def _activated(self, z: Tensor, width: int) -> Tensor:
        """The inputs of a layer, in a buffer."""
        x = self.scratch("x", *z.shape[:2], width)
        self._for_hidden(hidden_kernel, x, z, x)
        return x

    # -- backward of write -----------------------------------------------------------------------------------------

    def write_backward(
        self,
        keys: Tensor,
        values: Tensor,
        decay: ChunkDecay,
        written: Written,
        grad: WrittenGrad,
        anchor: list[Tensor] | None,
        grad_anchor: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        last, like = len(written.stacks) - 1, self.scratch
        grad_values = torch.empty_like(values)
        grad.deltas[:] = map(torch.empty_like, written.deltas)
        ends = self.ends(decay, written, grad)
        grad_gain = None
        if self.gain is not None:
            grad_gain = self.gain.new_zeros(values.shape[1], self._programs(values)[1], values.shape[3])
        for i in range(len(keys) - 1, -1, -1):
            now = written.at(i)
            weights = anchor if anchor is not None and i == 0 else [stack[:, 0] for stack in now.stacks]
            grad_inputs, grad_errors = [x[i] for x in grad.inputs], [x[i] for x in grad.errors]
            for l in range(last + 1):
                ends.backward(l, i)
            if self.clip is not None:
                self._clip_backward(now, grad_errors, grad_inputs)

            # errors run down the layers, so their gradient runs up ...
            through: list[Tensor | None] = []
            grad_upstream: list[Tensor] = []
            for l, (g, upstream) in enumerate(zip(grad_errors[:-1], now.upstream)):
                through.append(like(f"through errors {l}", *g.shape) if self._curved else None)
                grad_upstream.append(like(f"grad upstream {l}", *upstream.shape))
                self._for_hidden(
                    hidden_second_kernel, upstream, g, now.outputs[l], upstream, through[l], grad_upstream[l]
                )
                self.add_product(grad_errors[l + 1], grad_upstream[l], weights[l + 1].mT)
            # ... and then the inputs' gradient runs down
            g = like("grad output", *now.outputs[last].shape)
            self._for_errors(
                error_backward_kernel, now, grad_errors[last], now.unclipped[last], now.outputs[last], keys[i],
                values[i], now.deltas[0] if now.deltas else None, self.gain, g, grad_inputs[0], grad_values[i],
                grad.deltas[0][i] if grad.deltas else None, grad_gain,
            )  # fmt: skip
            for l in range(last, -1, -1):
                pairs = [(g, now.inputs[l]), *([(now.unclipped[l], grad_upstream[l - 1])] if l else [])]
                of_anchor = None if grad_anchor is None or i else grad_anchor[l]
                mix = (decay.mix[i], grad.stacks[l][i + 1]) if isinstance(ends, _Ends) else (None, None)
                self.products.state_backward(pairs, grad.stacks[l][i], of_anchor, *mix)
                x = grad_inputs[l]
                if l:
                    z, curved = now.outputs[l - 1], through[l - 1]
                    below = like(f"grad output {l - 1}", *z.shape)
                    self.products(g, weights[l], x, onto=x, **self._then(below, z, curved))
                    if self.gated:
                        self._for_hidden(hidden_backward_kernel, x, x, z, curved, below)
                    g = below
                else:
                    self.add_product(x, g, weights[l])
        return grad_values, *ends.gradients(), None if grad_gain is None else grad_gain.sum(1, keepdim=True)

    def ends(self, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> Ends:
        return _Ends(self, decay, written, grad)

    def _clip_backward(self, now: Written, grad_errors: list[Tensor], grad_inputs: list[Tensor]) -> None:
        if len(grad_errors) > 2:
            super()._clip_backward(now, grad_errors, grad_inputs)
        else:
            self._for_clip(clip_backward_kernel, now, grad_errors[0], grad_inputs[0], grad_errors[-1], grad_inputs[-1])

    # -- launches --------------------------------------------------------------------------------------------------

    def _then(self, also: Tensor | None, z: Tensor | None = None, through: Tensor | None = None) -> dict[str, Any]:
        """For a product's launch: what follows from the result at a hidden layer, unless that has two products."""
        activation = self._hidden["ACTIVATION"]
        return {} if self.gated or also is None else dict(also=also, z=z, through=through, activation=activation)

    def _for_hidden(self, kernel: Any, like: Tensor, *tensors: Tensor | None) -> None:
        """``like``: ``[..., units]``."""
        width, tokens = like.shape[-1], like.numel() // like.shape[-1]
        tiles = dict(TOKENS=16, BLOCK=tile(width, 128))
        launch(
            kernel, (triton.cdiv(tokens, tiles["TOKENS"]) * triton.cdiv(width, tiles["BLOCK"]),), *tensors, tokens,
            width, **self._hidden, **tiles, WIDE=wide(like),
        )  # fmt: skip

    @staticmethod
    def add_inner(to: Tensor, x: Tensor, parts: Tensor, sign: int = 1) -> None:
        """Add to ``to`` ``[..., parts]`` the inner products of ``x`` ``[..., units]`` with ``[..., parts * units]``."""
        width, tokens = x.shape[-1], x.numel() // x.shape[-1]
        launch(
            inner_kernel, (triton.cdiv(tokens, TOKENS),), x, parts, to, tokens, width, PARTS=to.shape[-1], SIGN=sign,
            TOKENS=TOKENS, BLOCK=tile(width, 128), WIDE=wide(to),
        )  # fmt: skip

    @staticmethod
    def _programs(like: Tensor) -> tuple[int, int]:
        """The tokens of a program of the loss, and the programs of a row."""
        tokens = max(1, min(TOKENS, 8192 // tile(like.shape[-1])))
        return tokens, triton.cdiv(like.shape[-2], tokens)

    def _for_errors(self, kernel: Any, now: Written, *tensors: Tensor | None) -> None:
        rows, b, d_out = now.unclipped[-1].shape
        tokens, programs = self._programs(now.unclipped[-1])
        launch(
            kernel, (rows, programs), *tensors, b, d_out, NORM=self.gain is not None, TOKENS=tokens, OUT=tile(d_out),
            WIDE=wide(now.unclipped[-1]), DELTAS=bool(now.deltas), **loss_constants(self.objective),
        )  # fmt: skip

    def _for_clip(self, kernel: Any, now: Written, *tensors: Tensor) -> None:
        (d_1, *_, d_2), (a_1, *_, a_2) = ([x[0], x[-1]] for x in (now.unclipped, now.inputs))
        tokens = d_2.numel() // d_2.shape[-1]
        launch(
            kernel, (triton.cdiv(tokens, TOKENS),), d_1, a_1, d_2, a_2, *tensors, tokens,
            *(x.shape[-1] for x in (d_1, a_1, d_2, a_2)), LAYERS=len(now.unclipped), CLIP=self.clip, TOKENS=TOKENS,
            BLOCK=128, WIDE=wide(d_2),
        )  # fmt: skip


class _Ends(Ends):
    """With the sums over the state's parts in the products; the states' own gradients are left to the weights'."""

    def __init__(self, net: BatchedNetwork, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> None:
        self.net, self.decay, self.written, self.grad, self._batched = net, decay, written, grad, net
        parts = decay.mix.shape[-1]
        self._grad_weighted = [
            net.scratch(f"grad weighted {l}", *x.shape[:-1], parts * x.shape[-1]) for l, x in enumerate(written.errors)
        ]

    def backward(self, l: int, i: int) -> None:
        product, grad, weights = self._batched.products, self.grad, self.decay.write[i]
        inputs, errors, end = self.written.inputs[l][i], self.written.errors[l][i], grad.stacks[l][i + 1]
        of_errors, of_inputs = grad.errors[l][i], grad.inputs[l][i]
        product(inputs, end.mT, of_errors, onto=of_errors, sign=-1, weights=weights, each=self._grad_weighted[l][i])
        product(errors, end, of_inputs, onto=of_inputs, sign=-1, weights=weights)

    def gradients(self) -> tuple[Tensor, Tensor]:
        grad_write, grad_mix = torch.zeros_like(self.decay.write), torch.zeros_like(self.decay.mix)
        for l, errors in enumerate(self.written.errors):
            self._batched.add_inner(grad_write, errors, self._grad_weighted[l], sign=-1)
            start = self.written.stacks[l][: len(errors)].flatten(3).flatten(0, 1)
            grad_mix.flatten(0, 1).baddbmm_(self.grad.stacks[l][1:].flatten(3).flatten(0, 1), start.mT)
        return grad_write, grad_mix


class BatchedChannelNetwork(ChannelNetwork, BatchedNetwork):
    """The same with decays by channel."""

    channel_decay = staticmethod(triton_channel_decay)

    def channel_scores(self, x: Tensor, a: Tensor, keep: Tensor, added: Tensor, delay: int) -> Tensor:
        return triton_channel_scores(x, a, keep, added, delay, self._chunk + self.past)

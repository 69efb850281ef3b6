"""The memory network on the Triton kernels: each method of ``ChunkNetwork`` in a launch or two."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import launch
from ..chunk_torch import ChunkNetwork, Scratch, Written, WrittenGrad
from ..chunkwise_torch import chunkwise_memory
from ..decay_torch import ChunkDecay
from ..network_torch import ACTIVATION_NUMBERS
from ..state import CHANNELS, MemoryState, Options, Tokens
from .batched import BatchedChannelNetwork
from .decay import triton_decay
from .linear import LinearMemory
from .read_kernels import read_backward_kernel, read_backward_state_kernel, read_kernel
from .schedule import fused, loss_constants, operands, resident, schedule
from .write_backward_kernels import write_backward_kernel, write_backward_resident_kernel
from .write_kernels import rewrite_kernel, write_kernel, write_resident_kernel


def triton_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    """``titans_memory`` for one or two layers."""
    products = operands(state.weights[0].dtype, None if options.half is None else getattr(torch, options.half))
    batch, _, heads, d_in = tokens.q.shape
    plain = not options.rare(tokens) and options.read != "anchor"
    if fused(batch * heads, len(state.weights), options.chunk, d_in, tokens.v.shape[3], plain, products):
        whole = functools.partial(LinearMemory.apply, products, options.chunk)
        return chunkwise_memory(tokens, state, norm, mask, options, whole=whole)
    kind = TritonChannelNetwork if CHANNELS in options.rare(tokens) else TritonNetwork
    network = functools.partial(kind, products=products, chunk=options.chunk)
    return chunkwise_memory(tokens, state, norm, mask, options, network)


class TritonNetwork(ChunkNetwork):
    """A network of one or two layers.

    One layer takes the second's place: its inputs are the keys and the queries, and there is no activation.
    ``products``: what ``schedule.operands`` said in forward, so that backward does the same. ``chunk``: that of the
    memory, which tiles go by; a sequence may begin and end with less.
    """

    takes_outputs = False
    by_channel = False
    """Whether decays are by channel."""

    def __init__(
        self, options: Options, gain: Tensor | None, scratch: Scratch, *, products: dict[str, Any], chunk: int
    ) -> None:
        # the kernels find the gain by the number of batch row and head; that of an expanded tensor would not be there
        super().__init__(options, None if gain is None else gain.contiguous(), scratch)
        self._number, self._products, self._chunk = ACTIVATION_NUMBERS[options.activation], products, chunk

    def matrices(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
    ) -> ChunkDecay:
        return triton_decay(theta, eta, alpha, valid, read_after, self._chunk)

    def write(
        self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: Written, anchor: list[Tensor] | None
    ) -> None:
        written.inputs[0] = keys
        chunks, batch_heads, b, _ = keys.shape
        sizes = self._sizes(keys, written)
        kernel = write_resident_kernel if self._resident(sizes, written, backward=False) else write_kernel
        self._run(
            kernel, (batch_heads,), b, sizes, written,
            keys, values, self._deltas(written), self.gain, decay.mix.contiguous(), decay.write.contiguous(),
            *_two(anchor, keys), *_two(written.stacks), written.inputs[-1], *_two(written.outputs),
            *_two(written.unclipped), *_two(written.errors),
            chunks, batch_heads, b, *sizes,
            CLIP=self.clip, ANCHORED=anchor is not None,
        )  # fmt: skip

    def rewrite(
        self, keys: Tensor, values: Tensor, written: Written, anchor: list[Tensor] | None, outputs_known: bool
    ) -> None:
        written.inputs[0] = keys
        chunks, batch_heads, b, _ = keys.shape
        sizes = self._sizes(keys, written)
        self._run(
            rewrite_kernel, (chunks * batch_heads,), b, sizes, written,
            keys, values, self._deltas(written), self.gain, *_two(anchor, keys), *_two(written.stacks),
            written.inputs[-1],
            *_two(written.outputs), *_two(written.unclipped), *_two(written.errors), batch_heads, b, *sizes,
            CLIP=self.clip, ANCHORED=anchor is not None,
        )  # fmt: skip

    def read(self, queries: Tensor, decay: ChunkDecay, written: Written, query_activations: list[Tensor]) -> Tensor:
        chunks, batch_heads, b, _ = queries.shape
        sizes = self._sizes(queries, written)
        y = queries.new_empty(*queries.shape[:3], sizes[2])
        z_1 = query_activations[:1] or [self.scratch("z 0", *queries.shape[:3], written.outputs[0].shape[3])]
        z_2 = query_activations or [y]
        self._run(
            read_kernel, (chunks * batch_heads,), b, sizes, written,
            queries, written.inputs[0], self.gain, decay.read.contiguous(), decay.carry.contiguous(),
            *_two(written.stacks), written.inputs[-1], *_two(written.errors), self._scores("scores 0", decay), y,
            z_1[0] if len(written.stacks) == 2 else queries, z_2[-1], batch_heads, b, decay.read.shape[3], *sizes,
            KEEP=bool(query_activations),
        )  # fmt: skip
        return y

    def read_backward(
        self,
        grad_y: Tensor,
        queries: Tensor,
        decay: ChunkDecay,
        written: Written,
        query_activations: list[Tensor],
        grad: WrittenGrad,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        chunks, batch_heads, b, _ = queries.shape
        sizes = self._sizes(queries, written)
        read, carry = decay.read.contiguous(), decay.carry.contiguous()
        grad_queries, grad_read, grad_carry = map(torch.empty_like, (queries, read, carry))
        blocks = triton.cdiv(b, schedule(read_backward_kernel.__name__, self._chunk, *sizes, self._products)["TOKENS"])
        grad_gain = None if self.gain is None else self.gain.new_empty(chunks, batch_heads, blocks, grad_y.shape[-1])
        z_1 = query_activations[0] if len(query_activations) == 2 else queries
        grad_z = _two([self.scratch(f"grad z {l}", *x.shape) for l, x in enumerate(query_activations)])
        scores = [self._scores(f"{name} {l}", decay) for name in ("scores", "grad scores") for l in range(2)]
        self._run(
            read_backward_kernel, (chunks * batch_heads, blocks), b, sizes, written,
            grad_y, queries, written.inputs[0], self.gain, read, carry, *_two(written.stacks), written.inputs[-1],
            *_two(written.errors), z_1, query_activations[-1], grad_queries, grad_read, grad_carry, grad_gain,
            *grad_z, *scores, batch_heads, b, read.shape[3], *sizes,
        )  # fmt: skip
        self._run(
            read_backward_state_kernel, (chunks * batch_heads,), b, sizes, written,
            queries, carry, z_1, *grad_z, *scores, grad.inputs[0], grad.inputs[-1], *_two(grad.errors),
            *_two(grad.stacks), b, read.shape[3], *sizes,
        )  # fmt: skip
        return grad_queries, grad_read, grad_carry, None if grad_gain is None else grad_gain.sum((0, 2)).unsqueeze(1)

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
        chunks, batch_heads, b, _ = keys.shape
        mix = decay.mix.contiguous()
        grad_values, grad_write, grad_mix = map(torch.empty_like, (values, decay.write, mix))
        grad_gain = None if self.gain is None else torch.empty_like(self.gain)
        grad.deltas[:] = map(torch.empty_like, written.deltas)
        sizes = self._sizes(keys, written)
        is_resident = self._resident(sizes, written, backward=True)
        kernel = write_backward_resident_kernel if is_resident else write_backward_kernel
        self._run(
            kernel, (batch_heads,), b, sizes, written,
            keys, values, self._deltas(written), self.gain, mix, decay.write.contiguous(), *_two(anchor, keys),
            *_two(written.stacks), written.inputs[-1], *_two(written.outputs), *_two(written.unclipped),
            *_two(written.errors),
            *_two(grad.stacks), grad.inputs[0], grad.inputs[-1], *_two(grad.errors), grad_values,
            self._deltas(grad), grad_write, grad_mix, grad_gain, *_two(grad_anchor, keys),
            chunks, batch_heads, b, *sizes,
            CLIP=self.clip, ANCHORED=anchor is not None,
        )  # fmt: skip
        return grad_values, grad_write, grad_mix, grad_gain

    @staticmethod
    def _deltas(of: Written | WrittenGrad) -> Tensor | None:
        return of.deltas[0] if of.deltas else None

    @staticmethod
    def _sizes(x: Tensor, written: Written) -> tuple[int, int, int]:
        """``d_in``, ``width``, ``d_out``."""
        out, width = written.stacks[-1].shape[3:]
        return x.shape[3], width, out

    def _resident(self, sizes: tuple[int, int, int], written: Written, *, backward: bool) -> bool:
        stack = written.stacks[0]
        return not (self.gated or self.by_channel) and resident(
            len(written.stacks), stack.shape[2], *sizes, self._products, backward=backward, wide=stack.dtype
        )

    def _scores(self, name: str, decay: ChunkDecay) -> Tensor:
        """A number for each query and key."""
        return self.scratch(name, *decay.read.shape)

    def _run(
        self, kernel: Any, grid: tuple[int, ...], b: int, sizes: tuple[int, int, int], written: Written,
        *arguments: Any, **flags: bool | float | None,
    ) -> None:  # fmt: skip
        """A launch with everything a kernel may be compiled for; each takes what it has a parameter for."""
        stack = written.stacks[0]
        layers, parts = len(written.stacks), stack.shape[2]
        tiles = schedule(kernel.__name__, self._chunk, *sizes, self._products, layers=layers, parts=parts)
        fixed = dict(
            LAYERS=layers, PARTS=parts, ACTIVATION=self._number if layers == 2 else 0, NORM=self.gain is not None,
            DELTAS=bool(written.deltas), GATED=int(self.gated), BY_CHANNEL=self.by_channel,
            WIDE=tl.float64 if stack.dtype == torch.float64 else tl.float32, **loss_constants(self.objective), **tiles,
            **self._products, **flags,
        )  # fmt: skip
        if kernel in (read_kernel, rewrite_kernel):
            grid = (*grid, triton.cdiv(b, tiles["TOKENS"]))
        known = (*kernel.arg_names, "num_warps", "num_stages")
        launch(kernel, grid, *arguments, **{name: x for name, x in fixed.items() if name in known})


class TritonChannelNetwork(TritonNetwork):
    """The same with decays by channel: the kernels write, and reads are batched products around ``channel_scores``."""

    by_channel = True

    def __init__(self, options: Options, gain: Tensor | None, scratch: Scratch, **others: Any) -> None:
        super().__init__(options, gain, scratch, **others)
        self._batched = BatchedChannelNetwork(options, gain, scratch, **others)

    def decay(self, *given: Any) -> ChunkDecay:
        return self._batched.decay(*given)

    def read(self, *given: Any) -> Tensor:
        return self._batched.read(*given)

    def read_backward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self._batched.read_backward(*given)


def _two(layers: list[Tensor] | None, none: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """The two layers' tensors; one layer takes the second's place. ``none`` stands for what is not read."""
    return (none, none) if layers is None else (layers[0], layers[-1])

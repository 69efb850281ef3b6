"""The mathematics of a group of chunks in PyTorch: writing, reading, and the derivatives of both.

Tensors are ``[chunks, batch_heads, b, width]``, where ``batch_heads = batch * heads``. The error ``d_l`` is half the
gradient of the loss with respect to ``z_l``; the factor 2 is in the decay matrices. The state of a layer is one stack
``[batch_heads, s, out, in]``: weights, then momentum. With a window, a chunk's keys, values, errors and inputs are
those of its own tokens and of the ``past`` before them: ``past + b`` in place of ``b``. A gated network has two layers;
the first has both products, one above the other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .decay_torch import ChunkDecay, chunk_decay, end_decay, windowed
from .network_torch import (
    ACTIVATIONS,
    EPS,
    delta_vjp,
    gated,
    gradient_norm,
    half_error,
    half_error_vjp,
    layer_norm_vjp,
    length,
)
from .state import Options

SCRATCH_BYTES = 128 * 2**20
"""Work buffers up to this size are kept for the next call."""


class Scratch:
    """Named work buffers that are reused: on a CPU, a fresh page costs more than the arithmetic done on it."""

    _local = threading.local()

    def __init__(self, like: Tensor) -> None:
        self._empty = like.new_empty(0)
        self._buffers: dict[str, Tensor] = {}

    @classmethod
    def of(cls, like: Tensor) -> Scratch:
        """Buffers in the dtype and on the device of ``like``: this thread's, on a CPU.

        On other devices those of one call, from PyTorch's allocator, which knows streams and captured graphs.
        """
        if not like.is_cpu:
            return cls(like)
        known = cls._local.__dict__.setdefault("known", {})
        key = like.dtype
        if key not in known:
            known[key] = cls(like)
        return known[key]

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialized contiguous tensor; the next call with this name reuses its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = self._empty.new_empty(size)
        return buffer[:size].view(shape)

    def release(self) -> None:
        """The call is over: buffers larger than ``SCRATCH_BYTES`` together are freed."""
        if sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values()) > SCRATCH_BYTES:
            self._buffers.clear()


class Written(NamedTuple):
    """What writing a group computes for its reads and its backward. Lists have an entry for each layer."""

    stacks: list[Tensor]
    """The state at every chunk start and at the end: ``[chunks + 1, batch_heads, s, out, in]``."""
    inputs: list[Tensor]
    """``a_l``: ``[chunks, batch_heads, b, in]``; the first are the keys themselves and are set by the writer."""
    outputs: list[Tensor]
    """``z_l`` before the activation, and the last layer's output: ``[chunks, batch_heads, b, out]``."""
    upstream: list[Tensor]
    """``d_{l+1} W_{l+1}``, before the slope at ``z_l``: of layers below the last; for backward only."""
    deltas: list[Tensor]
    """Thresholds for each token in place of the objective's, ``[chunks, batch_heads, b, 1]``, if there are any."""
    unclipped: list[Tensor]
    """``d_l`` before clipping: ``[chunks, batch_heads, b, out]``; those of ``errors`` where nothing is clipped."""
    errors: list[Tensor]
    """``d_l``."""

    @classmethod
    def allocate(
        cls, chunks: int, batch_heads: int, b: int, stacks: Sequence[Sequence[int]], scratch: Scratch, *,
        backward: bool, clip: bool
    ) -> Written:  # fmt: skip
        """For chunks of ``b`` tokens and states of the shapes ``[batch_heads, s, out, in]``, from ``scratch``."""
        shapes = [shape[-3:] for shape in stacks]
        token = lambda name, l, width: scratch(f"{name} {l}", chunks, batch_heads, b, width)  # noqa: E731
        outs = list(enumerate(out for _, out, _ in shapes))
        unclipped = [token("unclipped", l, out) for l, out in outs]
        return cls(
            [scratch(f"stack {l}", chunks + 1, batch_heads, *shape) for l, shape in enumerate(shapes)],
            [token("input", l, width) for l, (_, _, width) in enumerate(shapes)],
            [token("output", l, out) for l, out in outs],
            [token("upstream", l, width) for l, (_, _, width) in enumerate(shapes[1:])] if backward else [],
            [],
            unclipped,
            [token("error", l, out) for l, out in outs] if clip else unclipped,
        )

    def first(self, chunks: int) -> Written:
        """The same buffers for a smaller group."""
        unclipped = [x[:chunks] for x in self.unclipped]
        errors = unclipped if self.errors is self.unclipped else [x[:chunks] for x in self.errors]
        inputs, outputs, upstream, deltas = ([x[:chunks] for x in part] for part in self[1:5])
        stacks = [x[: chunks + 1] for x in self.stacks]
        return Written(stacks, inputs, outputs, upstream, deltas, unclipped, errors)

    def at(self, i: int | slice) -> Written:
        """Chunk ``i``, or several as one batch of ``chunks * batch_heads``; stacks are those at chunk starts."""
        pick = (lambda x: x[i]) if isinstance(i, int) else (lambda x: x[i].flatten(0, 1))
        unclipped = [pick(x) for x in self.unclipped]
        errors = unclipped if self.errors is self.unclipped else [pick(x) for x in self.errors]
        inputs, outputs, upstream, deltas = ([pick(x) for x in part] for part in self[1:5])
        stacks = [pick(x[: len(self.unclipped[0])]) for x in self.stacks]
        return Written(stacks, inputs, outputs, upstream, deltas, unclipped, errors)


class WrittenGrad(NamedTuple):
    """Gradients of a group's stacks, inputs and errors: reads set them, writes add to them, and set the deltas'."""

    stacks: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]
    deltas: list[Tensor]

    @classmethod
    def allocate(cls, written: Written, scratch: Scratch) -> WrittenGrad:
        like = lambda name, part: [scratch(f"grad {name} {l}", *x.shape) for l, x in enumerate(part)]  # noqa: E731
        return cls(like("stack", written.stacks), like("input", written.inputs), like("error", written.errors), [])

    def first(self, chunks: int) -> WrittenGrad:
        """The same buffers for a smaller group."""
        inputs, errors = ([x[:chunks] for x in part] for part in (self.inputs, self.errors))
        return WrittenGrad([x[: chunks + 1] for x in self.stacks], inputs, errors, [])


class ChunkNetwork:
    """The memory network ``M``; ``gain`` ``[batch_heads, 1, d]`` is given when ``M(x) = x + LN(net(x)) * gain``."""

    matmul: Callable[[Tensor, Tensor], Tensor] = staticmethod(torch.matmul)
    """Of reads at the anchor; differentiable."""
    largest = torch.finfo(torch.float64).max
    """What an operand of a product may be without becoming infinite."""
    takes_outputs = True
    """Whether ``rewrite`` takes outputs that were kept, and does not compute them again."""

    def __init__(self, options: Options, gain: Tensor | None, scratch: Scratch) -> None:
        self.activation = (gated if options.gated else ACTIVATIONS.__getitem__)(options.activation)
        self.gated, self.clip, self.objective = options.gated, options.clip, options.objective
        self.gain, self.scratch, self.past = gain, scratch, options.window - 1
        self.last_read = self.past - (options.read == "before")
        self.at_anchor = options.read == "anchor"

    def decay(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, gamma: Tensor | None
    ) -> ChunkDecay:
        """The coefficients of a group's chunks; differentiable."""
        last_read = self.last_read - self.past
        found = self.matrices(theta, eta, alpha, valid, last_read == 0)
        return found if gamma is None else windowed(found, gamma, last_read)

    def matrices(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, read_after: bool
    ) -> ChunkDecay:
        """The same without a window."""
        return (end_decay if self.at_anchor else chunk_decay)(theta, eta, alpha, valid, read_after)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, fine: bool = False) -> Tensor:
        """``a b`` of batches of matrices; ``fine``: one that needs all digits."""
        return torch.bmm(a, b, out=out)

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, alpha: float = 1, *, fine: bool = False) -> None:
        """``to += alpha a b``."""
        to.baddbmm_(a, b, alpha=alpha)

    # -- write ---------------------------------------------------------------------------------------------------

    def write(
        self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: Written, anchor: list[Tensor] | None
    ) -> None:
        """Write chunk after chunk from ``written.stacks[l][0]`` on; fills everything in ``written``."""
        written.inputs[0] = keys
        for i in range(len(keys)):
            now = written.at(i)
            weights = anchor if i == 0 and anchor is not None else [stack[:, 0] for stack in now.stacks]
            self._differentiate(values[i], weights, now, self.gain)
            for l, buffer in enumerate(written.stacks):
                self.advance(l, i, now, decay, buffer[i + 1])

    def advance(self, l: int, i: int, now: Written, decay: ChunkDecay, after: Tensor) -> None:
        """Set ``after`` to the stack of layer ``l`` at the end of chunk ``i``, which ``now`` is."""
        torch.bmm(decay.mix[i], now.stacks[l].flatten(2), out=after.flatten(2))
        weighted = self._times(decay.write[i], now.errors[l], "weighted")
        self.add_product(after.flatten(1, 2), weighted.mT, now.inputs[l], -1, fine=True)

    def rewrite(
        self, keys: Tensor, values: Tensor, written: Written, anchor: list[Tensor] | None, outputs_known: bool
    ) -> None:
        """Fill what ``write`` fills, all chunks in one batch, given the state at every chunk start."""
        written.inputs[0] = keys
        if anchor is not None:
            self._differentiate(values[0], anchor, written.at(0), self.gain, outputs_known)
        rest = slice(0 if anchor is None else 1, None)
        chunks = len(keys[rest])
        if chunks:
            batch = written.at(rest)
            gain = None if self.gain is None else self.gain.repeat(chunks, 1, 1)
            weights = [stack[:, 0] for stack in batch.stacks]
            self._differentiate(values[rest].flatten(0, 1), weights, batch, gain, outputs_known)

    def _differentiate(
        self, values: Tensor, weights: list[Tensor], to: Written, gain: Tensor | None, outputs_known: bool = False
    ) -> None:
        """Keys forward through ``weights``, half errors back; fills ``to`` apart from its stacks."""
        last = len(weights) - 1
        for l, weight in enumerate(weights):
            if l:
                self.activation.value(to.outputs[l - 1], out=to.inputs[l])
            if not outputs_known:
                self.product(to.inputs[l], weight.mT, to.outputs[l], fine=True)
        z, delta = to.outputs[last], to.deltas[0] if to.deltas else None
        if gain is None:
            half_error(z, values, self.objective, delta, out=to.unclipped[last])
        else:
            n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
            predicted = torch.addcmul(to.inputs[0], n, gain)
            g = half_error(predicted, values, self.objective, delta, out=predicted).mul_(gain)
            to.unclipped[last].copy_(layer_norm_vjp(g, n, inverse))
        for l in range(last - 1, -1, -1):
            g = to.upstream[l] if to.upstream else self.scratch("upstream", *to.inputs[l + 1].shape)
            self.product(to.unclipped[l + 1], weights[l + 1], g, fine=True)
            self.activation.vjp(g, to.outputs[l], out=to.unclipped[l])
        if self.clip is not None:
            self.clip_errors(to)

    def clip_errors(self, to: Written) -> None:
        """Set ``to.errors`` to the errors of gradients that are scaled down to a norm of ``clip``."""
        assert self.clip is not None
        norm = gradient_norm(to.unclipped, to.inputs)
        # a norm that is not finite makes the step NaN
        scale = (self.clip / norm.clamp(min=self.clip)).add_(norm, alpha=0).unsqueeze(-1)
        for unclipped, error in zip(to.unclipped, to.errors):
            torch.mul(unclipped, scale, out=error)

    def _times(self, coefficients: Tensor, x: Tensor, name: str) -> Tensor:
        """``x`` times each part's coefficient: ``[..., b, s]`` and ``[..., b, out]`` -> ``[..., b, s * out]``."""
        s = coefficients.shape[-1]
        to = self.scratch(name, *x.shape[:-1], s, x.shape[-1])
        return torch.mul(coefficients.unsqueeze(-1), x.unsqueeze(-2), out=to).flatten(-2)

    # -- read ----------------------------------------------------------------------------------------------------

    def read(self, queries: Tensor, decay: ChunkDecay, written: Written, query_activations: list[Tensor]) -> Tensor:
        """All of the group's queries, each at the weights after its token (or before it).

        ``query_activations``: where to keep each layer's output ``Z_l`` ``[chunks, batch_heads, b, out]``, or ``[]``.
        """
        state = written.at(slice(None))
        read, (carry, errors) = decay.read.flatten(0, 1), self._confine(decay.carry.flatten(0, 1), state.errors)
        x = z = queries.flatten(0, 1)
        new = lambda name, width: self.scratch(name, *x.shape[:2], width)  # noqa: E731
        for l, (stack, a, d) in enumerate(zip(state.stacks, state.inputs, errors)):
            s, out, width = stack.shape[1:]
            if l:
                x = self.activation.value(z, out=new("x", width))
            z = query_activations[l].flatten(0, 1) if query_activations else new(f"z {l % 2}", out)
            if width < out:
                # the coefficients of the state's parts are multiplied in where the layer is narrow
                for part in range(s):
                    weighted = torch.mul(x, carry[..., part : part + 1], out=new("weighted x", width))
                    if part:
                        self.add_product(z, weighted, stack[:, part].mT, fine=True)
                    else:
                        self.product(weighted, stack[:, part].mT, z, fine=True)
            else:
                carried = self.product(x, stack.flatten(1, 2).mT, new("carried", s * out), fine=True)
                carried = carried.unflatten(-1, (s, out))
                torch.mul(carried[:, :, 0], carry[..., :1], out=z)
                if s == 2:
                    z.addcmul_(carried[:, :, 1], carry[..., 1:])
            # zero for later keys, also where a score or a step size is not finite
            scores = self.product(x, a.mT, new("scores", a.shape[1])).mul_(read).tril_(self.last_read)
            self.add_product(z, scores, d, -1, fine=True)
        return self.read_output(queries, z, kept=bool(query_activations))

    def read_output(self, queries: Tensor, z: Tensor, *, kept: bool) -> Tensor:
        """What is read, from the last layer's output, which may be ``kept``."""
        y = z.view(queries.shape[:-1] + z.shape[-1:])
        if self.gain is None:
            return y.clone() if kept else y
        return torch.addcmul(queries, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], self.gain)

    def _confine(self, carry: Tensor, errors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``carry`` and ``errors`` with which an error that is not finite makes reads NaN from its token on alone.

        Errors of later tokens are multiplied by zero, and zero times infinity is NaN.
        """
        sizes = torch.stack([torch.linalg.vector_norm(d, math.inf, dim=-1) for d in errors])
        # a scalar beyond the range of a dtype is infinity there, which infinity would not exceed
        lost = ~(sizes <= min(self.largest, torch.finfo(sizes.dtype).max)).all(0)
        if lost.is_cpu and not bool(lost.any()):  # which another device would be waited for
            return carry, errors
        from_then_on = lost.cumsum(-1)[..., self.past :] > 0
        if self.last_read < self.past:
            from_then_on = F.pad(from_then_on[:, :-1], (1, 0))
        errors = [d.masked_fill(lost.unsqueeze(-1), 0.0) for d in errors]
        return carry.masked_fill(from_then_on.view(*from_then_on.shape, *[1] * (carry.dim() - 2)), math.nan), errors

    def read_backward(
        self,
        grad_y: Tensor,
        queries: Tensor,
        decay: ChunkDecay,
        written: Written,
        query_activations: list[Tensor],
        grad: WrittenGrad,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of the queries, of ``decay.read``, ``decay.carry`` and gain; sets ``grad`` but the last stacks."""
        state = written.at(slice(None))
        read, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        g, grad_gain = self.output_backward(grad_y, query_activations)
        g = g.flatten(0, 1)
        grad_read, grad_carry = torch.zeros_like(read), torch.zeros_like(carry)
        for l in range(len(state.stacks) - 1, -1, -1):
            stack, a, d = state.stacks[l], state.inputs[l], state.errors[l]
            z = query_activations[l - 1].flatten(0, 1) if l else queries.flatten(0, 1)
            x = self.activation.value(z, out=self.scratch("x", *z.shape[:2], a.shape[2])) if l else z
            weighted = self._times(carry, g, "weighted")
            self.product(weighted.mT, x, grad.stacks[l][:-1].flatten(0, 1).flatten(1, 2), fine=True)
            grad_x = self.scratch(f"grad x {l % 2}", *x.shape)
            for part in range(stack.shape[1]):
                back = self.product(g, stack[:, part], self.scratch("back", *x.shape), fine=True)
                grad_carry[..., part] += torch.mul(x, back, out=self.scratch("product", *x.shape)).sum(-1)
                if part:
                    grad_x.addcmul_(back, carry[..., part : part + 1])
                else:
                    torch.mul(back, carry[..., :1], out=grad_x)
            scores = self.product(x, a.mT, self.scratch("scores", *read.shape))
            grad_scores = self.product(g, d.mT, self.scratch("grad scores", *read.shape), fine=True).neg_()
            grad_read.addcmul_(grad_scores, scores)
            self.product(scores.mul_(read).mT, g, grad.errors[l].flatten(0, 1)).neg_()
            grad_scores.mul_(read)
            self.product(grad_scores.mT, x, grad.inputs[l].flatten(0, 1))
            self.add_product(grad_x, grad_scores, a, fine=True)
            g = self.activation.vjp(grad_x, z, out=self.scratch("vjp", *z.shape)) if l else grad_x
        g = g.view(queries.shape)
        if self.gain is not None:
            g += grad_y
        return g, grad_read.view(decay.read.shape), grad_carry.view(decay.carry.shape), grad_gain

    def output_backward(self, grad_y: Tensor, query_activations: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """From the gradient of ``y`` to that of the last layer's output, without the residual, and of the gain."""
        if self.gain is None:
            return grad_y, None
        z = query_activations[-1]
        n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
        return layer_norm_vjp(grad_y * self.gain, n, inverse), (grad_y * n).sum((0, 2)).unsqueeze(1)

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
        """Chunk by chunk in reverse, from the gradient of the state after the group in ``grad.stacks[l][-1]``.

        Returns the gradients of the values, of ``decay.write``, ``decay.mix`` and the gain. Afterwards
        ``grad.stacks[l][0]`` is the gradient of the state before the group and ``grad.inputs[0]`` that of the keys.
        Adds to ``grad_anchor`` where the first chunk has an anchor of its own.
        """
        layers = len(written.stacks)
        grad_gain = None if self.gain is None else torch.zeros_like(self.gain)
        grad_values = torch.empty_like(values)
        grad.deltas[:] = map(torch.empty_like, written.deltas)
        ends = self.ends(decay, written, grad)
        # z_l is not needed once its slope and curvature are known, nor is upstream
        slopes: list[Tensor] = []
        curvatures: list[Tensor | None] = [None] * (layers - 1)
        for l, (z, upstream) in enumerate(zip(written.outputs, written.upstream)):
            if self.activation.second is not None:
                second = self.activation.second(z, self.scratch("second", *z.shape), self.scratch("square", *z.shape))
                curvatures[l] = second.mul_(self._for_both(upstream)) if self.gated else upstream.mul_(second)
            slopes.append(self.activation.vjp(self.scratch("ones", *upstream.shape).fill_(1), z, out=z))
        for i in range(len(keys) - 1, -1, -1):
            now = written.at(i)
            weights = anchor if anchor is not None and i == 0 else [stack[:, 0] for stack in now.stacks]
            grad_start = [buffer[i] for buffer in grad.stacks]
            grad_weights = grad_anchor if grad_anchor is not None and i == 0 else [x[:, 0] for x in grad_start]
            grad_inputs, grad_errors = [x[i] for x in grad.inputs], [x[i] for x in grad.errors]
            for l in range(layers):
                ends.backward(l, i)
            if self.clip is not None:
                self._clip_backward(now, grad_errors, grad_inputs)

            # errors run down the layers, so their gradient runs up ...
            through_slope: list[Tensor | None] = [None] * (layers - 1)
            grad_upstream: list[Tensor] = []
            for l in range(layers - 1):
                g, curvature = grad_errors[l], curvatures[l]
                if curvature is not None and self.gated:
                    (first, gate), (own, across) = g.chunk(2, -1), curvature[i].chunk(2, -1)
                    through_slope[l] = torch.cat([first * own + gate * across, first * across], -1)
                elif curvature is not None:
                    through_slope[l] = torch.mul(g, curvature[i], out=self.scratch(f"through slope {l}", *g.shape))
                g.mul_(slopes[l][i])
                grad_upstream.append(torch.add(*g.chunk(2, -1)) if self.gated else g)
                self.add_product(grad_errors[l + 1], grad_upstream[-1], weights[l + 1].mT)
            # ... and then the inputs' gradient runs down
            g = self._error_backward(
                keys[i], values[i], now, grad_errors[-1], grad_inputs[0], grad_gain, grad_values[i],
                [x[i] for x in grad.deltas],
            )  # fmt: skip
            for l in range(layers - 1, -1, -1):
                if l < layers - 1:
                    g, curved = self._for_both(grad_inputs[l + 1]).mul_(slopes[l][i]), through_slope[l]
                    if curved is not None:
                        g += curved
                grad_weight = self.product(g.mT, now.inputs[l], self.scratch("grad weight", *weights[l].shape))
                if l:
                    self.add_product(grad_weight, now.unclipped[l].mT, grad_upstream[l - 1])
                grad_weights[l].add_(grad_weight)
                self.add_product(grad_inputs[l], g, weights[l])
        return grad_values, *ends.gradients(), grad_gain

    def ends(self, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> Ends:
        """The backward of :meth:`advance`."""
        return Ends(self, decay, written, grad)

    def _for_both(self, x: Tensor) -> Tensor:
        """``[..., in of a layer]``, for both products of which a gated network multiplies the outputs."""
        return torch.cat([x, x], -1) if self.gated else x

    def _clip_backward(self, now: Written, grad_errors: list[Tensor], grad_inputs: list[Tensor]) -> None:
        """Through ``d = scale * unclipped`` with ``scale = clip / |gradient|`` where that is below one."""
        assert self.clip is not None
        norm = gradient_norm(now.unclipped, now.inputs).clamp_(min=self.clip)
        scale = self.clip / norm
        grad_scale = sum((g * d).sum(-1) for g, d in zip(grad_errors, now.unclipped))
        # d scale / d norm = -scale / norm, and norm^2 is 4 sum |d|^2 |a|^2
        grad_norm = torch.where(scale < 1, -4 * grad_scale * scale, torch.zeros_like(scale))
        for g, h, d, a in zip(grad_errors, grad_inputs, now.unclipped, now.inputs):
            # in this order, because the square of a quotient may underflow
            of_a, of_d = ((length(x) / norm).to(norm.dtype).unsqueeze(-1) for x in (a, d))
            g.mul_(scale.unsqueeze(-1)).addcmul_(d * of_a, of_a * grad_norm.unsqueeze(-1))
            h.addcmul_(a * of_d, of_d * grad_norm.unsqueeze(-1))

    def _error_backward(
        self,
        key: Tensor,
        value: Tensor,
        now: Written,
        g: Tensor,
        grad_key: Tensor,
        grad_gain: Tensor | None,
        grad_value: Tensor,
        grad_delta: list[Tensor],
    ) -> Tensor:
        """From the error to the last layer's output (returned), key, value, gain and delta.

        With a norm the error is ``J (e gain)``, with ``e`` that of the prediction and ``J = (I - 1 1^T / d -
        n n^T / d) / sigma`` LayerNorm's Jacobian at ``z``, which is symmetric.
        """
        gain, z, error, delta = self.gain, now.outputs[-1], now.unclipped[-1], now.deltas[0] if now.deltas else None

        def through_loss(g: Tensor, p: Tensor) -> Tensor:
            grad_p, grad = half_error_vjp(g, p, value, self.objective, delta)
            grad_value.copy_(grad)
            if delta is not None:
                grad_delta[0].copy_(delta_vjp(g, p, value, self.objective, delta))
            return grad_p

        if gain is None or grad_gain is None:
            return through_loss(g, z)
        n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
        predicted = torch.addcmul(key, n, gain)
        e = half_error(predicted, value, self.objective, delta)
        u = e * gain
        grad_u = layer_norm_vjp(g, n, inverse)
        grad_predicted = through_loss(grad_u * gain, predicted)
        p = g * inverse
        # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
        grad_n = grad_predicted * gain
        grad_n.addcmul_(p, (u * n).mean(-1, keepdim=True), value=-1)
        grad_n.addcmul_(u, (p * n).mean(-1, keepdim=True), value=-1)
        grad_gain += (grad_u * e).addcmul_(grad_predicted, n).sum(1, keepdim=True)
        grad_key += grad_predicted
        through_sigma = (p * error).mean(-1, keepdim=True)
        return layer_norm_vjp(grad_n, n, inverse).addcmul_(n, through_sigma, value=-1)


class Ends:
    """Backward through the states at the ends of chunks, ``mix state - (write errors)^T inputs``.

    Adds to the gradients of errors, inputs and the states at the starts of chunks.
    """

    def __init__(self, net: ChunkNetwork, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> None:
        self.net, self.decay, self.written, self.grad = net, decay, written, grad
        self._weighted = [net._times(decay.write, d, f"weighted {l}") for l, d in enumerate(written.errors)]
        self._grad_weighted = [net.scratch(f"grad weighted {l}", *x.shape) for l, x in enumerate(self._weighted)]

    def backward(self, l: int, i: int) -> None:
        """Layer ``l`` at the end of chunk ``i``."""
        grad, weighted, decay = self.grad, self._grad_weighted[l][i], self.decay
        grad_end = grad.stacks[l][i + 1]
        self.net.product(self.written.inputs[l][i], grad_end.flatten(1, 2).mT, weighted)
        for part, g in enumerate(weighted.unflatten(-1, (decay.mix.shape[-1], -1)).unbind(2)):
            grad.errors[l][i].addcmul_(g, decay.write[i, :, :, part : part + 1], value=-1)
        self.net.add_product(grad.inputs[l][i], self._weighted[l][i], grad_end.flatten(1, 2), -1)
        grad.stacks[l][i].flatten(2).baddbmm_(decay.mix[i].mT, grad_end.flatten(2))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of ``decay.write`` and ``decay.mix``, after all chunks."""
        grad_write, grad_mix = torch.zeros_like(self.decay.write), torch.zeros_like(self.decay.mix)
        for l, errors in enumerate(self.written.errors):
            parts = self._grad_weighted[l].unflatten(-1, (grad_mix.shape[-1], -1))
            grad_write -= parts.mul_(errors.unsqueeze(3)).sum(-1)
            start = self.written.stacks[l][: len(errors)].flatten(3).flatten(0, 1)
            grad_mix.flatten(0, 1).baddbmm_(self.grad.stacks[l][1:].flatten(3).flatten(0, 1), start.mT)
        return grad_write, grad_mix

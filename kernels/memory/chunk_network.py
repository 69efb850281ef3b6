"""The memory network over a group of chunks: writing, reading, and the derivatives of both.

Tensors are ``[chunks, rows, b, width]``; errors ``d`` are half gradients, and the factor 2 lives in the decay matrices.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .activation import ACTIVATIONS
from .buffers import Adjoint, Scratch, Work
from .decay import ChunkDecay, chunk_decay
from .read_torch import EPS


class ReadGrad(NamedTuple):
    """Gradients of a group's reads: of the queries, of two parts of ``ChunkDecay``, and of the gain if there is one."""

    queries: Tensor
    read: Tensor
    carry: Tensor
    gain: Tensor | None


class WriteGrad(NamedTuple):
    """Gradients of a group's writes: of the values, of two parts of ``ChunkDecay``, and of the gain if there is one."""

    values: Tensor
    write: Tensor
    mix: Tensor
    gain: Tensor | None


class ChunkNetwork:
    """The memory network ``M``; ``gain`` ``[rows, 1, d]`` is given when ``M(x) = x + LN(net(x)) * gain``."""

    def __init__(self, activation: str, gain: Tensor | None, clip: float | None, scratch: Scratch) -> None:
        self.activation, self.gain, self.clip, self.scratch = ACTIVATIONS[activation], gain, clip, scratch

    decay = staticmethod(chunk_decay)
    """What gates are to writing and reading."""

    # -- write ---------------------------------------------------------------------------------------------------

    def advance(
        self, keys: Tensor, values: Tensor, decay: ChunkDecay, written: Work, anchor: list[Tensor] | None
    ) -> None:
        """Write chunk after chunk, from ``written.stacks[l][0]`` on; fills everything in ``written``."""
        written.inputs[0] = keys
        for i in range(len(keys)):
            now = written.at(i)
            weights = anchor if i == 0 and anchor is not None else [stack[:, 0] for stack in now.stacks]
            self._differentiate(values[i], weights, now, self.gain)
            for buffer, stack, a, d in zip(written.stacks, now.stacks, now.inputs, now.errors):
                after = buffer[i + 1]
                torch.bmm(decay.mix[i], stack.flatten(2), out=after.flatten(2))
                weighed = self._spread(decay.write[i], d, "weighed")
                after.flatten(1, 2).baddbmm_(weighed.mT, a, alpha=-1)

    def _spread(self, coefficients: Tensor, x: Tensor, name: str) -> Tensor:
        """``[..., b, s]`` times ``[..., b, out]`` -> ``[..., b, s * out]``."""
        parts = coefficients.shape[-1]
        spread = self.scratch(name, *x.shape[:-1], parts, x.shape[-1])
        return torch.mul(coefficients.unsqueeze(-1), x.unsqueeze(-2), out=spread).flatten(-2)

    def recall(
        self, keys: Tensor, values: Tensor, written: Work, anchor: list[Tensor] | None, hidden_known: bool
    ) -> None:
        """What ``advance`` fills, in one batch, given the state at every chunk start (and perhaps ``hidden``)."""
        written.inputs[0] = keys
        if anchor is not None:
            self._differentiate(values[0], anchor, written.at(0), self.gain, hidden_known)
        rest = slice(0 if anchor is None else 1, None)
        if len(keys[rest]):
            batch = written.at(rest)
            gain = None if self.gain is None else self.gain.repeat(len(keys[rest]), 1, 1)
            self._differentiate(
                values[rest].flatten(0, 1), [stack[:, 0] for stack in batch.stacks], batch, gain, hidden_known
            )

    def _differentiate(
        self, values: Tensor, weights: list[Tensor], work: Work, gain: Tensor | None, hidden_known: bool = False
    ) -> None:
        """Keys forward through ``weights``, half errors back; fills ``work`` apart from its stacks."""
        last = len(weights) - 1
        for l, weight in enumerate(weights):
            if l:
                self.activation.value(work.hidden[l - 1], out=work.inputs[l])
            if not hidden_known:
                torch.bmm(work.inputs[l], weight.mT, out=work.hidden[l])
        z = work.hidden[last]
        if gain is None:
            torch.sub(z, values, out=work.raw[last])
        else:
            n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
            g = torch.addcmul(work.inputs[0], n, gain).sub_(values).mul_(gain)
            work.raw[last].copy_(layer_norm_pull(g, n, inverse))
        for l in range(last - 1, -1, -1):
            e = work.pulled[l] if work.pulled else self.scratch("pulled", *work.raw[l].shape)
            torch.bmm(work.raw[l + 1], weights[l + 1], out=e)
            self.activation.pull(e, work.hidden[l], out=work.raw[l])
        if self.clip is not None:
            scale = self._scale(work.raw, work.inputs)[0].unsqueeze(-1)
            for raw, error in zip(work.raw, work.errors):
                torch.mul(raw, scale, out=error)

    def _scale(self, errors: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Per token, what brings the surprise's norm (the full gradient's) down to ``clip``."""
        assert self.clip is not None
        error_squares = [square_sum(x) for x in errors]
        input_squares = [square_sum(x) for x in inputs]
        square = cast(Tensor, sum(d * a for d, a in zip(error_squares, input_squares))) * 4
        return self.clip / square.sqrt().clamp_(min=self.clip), square, error_squares, input_squares

    # -- read ----------------------------------------------------------------------------------------------------

    def read(
        self, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """All of the group's queries, each at the weights its token left (or found).

        ``asked``: where each layer's ``Z_l`` ``[chunks, rows, b, out]`` is wanted, or ``[]``.
        """
        work = written.at(slice(None))
        weigh, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        x = z = queries.flatten(0, 1)
        new = lambda name, width: self.scratch(name, *x.shape[:2], width)  # noqa: E731
        for l, (stack, a, d) in enumerate(zip(work.stacks, work.inputs, work.errors)):
            s, out, width = stack.shape[1:]
            if l:
                x = self.activation.value(z, out=new("x", width))
            z = asked[l].flatten(0, 1) if asked else new(f"z {l % 2}", out)
            if width < out:
                # what the state's parts weigh is multiplied in where the layer is narrow
                for part in range(s):
                    weighed = torch.mul(x, carry[..., part : part + 1], out=new("weighed x", width))
                    torch.baddbmm(z, weighed, stack[:, part].mT, beta=min(part, 1), out=z)
            else:
                carried = torch.bmm(x, stack.flatten(1, 2).mT, out=new("carried", s * out)).unflatten(-1, (s, out))
                torch.mul(carried[:, :, 0], carry[..., :1], out=z)
                if s == 2:
                    z.addcmul_(carried[:, :, 1], carry[..., 1:])
            scores = torch.bmm(x, a.mT, out=new("scores", x.shape[1])).mul_(weigh)
            z.baddbmm_(scores, d, alpha=-1)
        y = z.view(queries.shape[:-1] + z.shape[-1:])
        if self.gain is None:
            return (y.clone() if asked else y), asked
        return torch.addcmul(queries, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], self.gain), asked

    def read_backward(
        self, grad_y: Tensor, queries: Tensor, decay: ChunkDecay, written: Work, asked: list[Tensor], grad: Adjoint
    ) -> ReadGrad:
        """Fills ``grad`` (its last stack apart), given each layer's ``Z_l``."""
        work = written.at(slice(None))
        weigh, carry = decay.read.flatten(0, 1), decay.carry.flatten(0, 1)
        g, grad_gain = grad_y, None
        if self.gain is not None:
            z = asked[-1]
            n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
            grad_gain = (grad_y * n).sum((0, 2)).unsqueeze(1)
            g = layer_norm_pull(grad_y * self.gain, n, inverse)
        g = g.flatten(0, 1)
        grad_weigh, grad_carry = torch.zeros_like(weigh), torch.zeros_like(carry)
        for l in range(len(work.stacks) - 1, -1, -1):
            stack, a, d = work.stacks[l], work.inputs[l], work.errors[l]
            z = asked[l - 1].flatten(0, 1) if l else queries.flatten(0, 1)
            x = self.activation.value(z, out=self.scratch("x", *z.shape)) if l else z
            spread = self._spread(carry, g, "spread")
            torch.bmm(spread.mT, x, out=grad.stacks[l][:-1].flatten(0, 1).flatten(1, 2))
            grad_x = self.scratch(f"grad x {l % 2}", *x.shape)
            for part in range(stack.shape[1]):
                back = torch.bmm(g, stack[:, part], out=self.scratch("back", *x.shape))
                grad_carry[..., part] += torch.mul(x, back, out=self.scratch("felt", *x.shape)).sum(-1)
                if part:
                    grad_x.addcmul_(back, carry[..., part : part + 1])
                else:
                    torch.mul(back, carry[..., :1], out=grad_x)
            scores = torch.bmm(x, a.mT, out=self.scratch("scores", *weigh.shape))
            grad_decayed = torch.bmm(g, d.mT, out=self.scratch("decayed", *weigh.shape)).neg_()
            grad_weigh.addcmul_(grad_decayed, scores)
            torch.bmm(scores.mul_(weigh).mT, g, out=grad.errors[l].flatten(0, 1)).neg_()
            grad_scores = grad_decayed.mul_(weigh)
            torch.bmm(grad_scores.mT, x, out=grad.inputs[l].flatten(0, 1))
            grad_x.baddbmm_(grad_scores, a)
            g = self.activation.pull(grad_x, z, out=self.scratch("pulled", *z.shape)) if l else grad_x
        g = g.view(queries.shape)
        if self.gain is not None:
            g += grad_y
        return ReadGrad(g, grad_weigh.view(decay.read.shape), grad_carry.view(decay.carry.shape), grad_gain)

    # -- backward of write -----------------------------------------------------------------------------------------

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
        """Chunk by chunk in reverse, from the gradient of the state after the group in ``grad.stacks[l][-1]``.

        On return ``grad.stacks[l][0]`` is the gradient of the state before the group and ``grad.inputs[0]`` that of
        the keys. Adds to ``grad_anchor`` where the first chunk has an anchor of its own.
        """
        layers, s = len(written.stacks), decay.mix.shape[-1]
        grad_gain = None if self.gain is None else torch.zeros_like(self.gain)
        grad_values = torch.empty_like(values)
        weighed = [self._spread(decay.write, d, f"weighed {l}") for l, d in enumerate(written.errors)]
        back = [self.scratch(f"back {l}", *x.shape) for l, x in enumerate(weighed)]
        # z_l is needed no more once its slope and curvature are known, nor is what was pulled
        slopes: list[Tensor] = []
        curvatures: list[Tensor | None] = [None] * (layers - 1)
        for l, (z, pulled) in enumerate(zip(written.hidden, written.pulled)):
            if self.activation.second is not None:
                curvatures[l] = pulled.mul_(
                    self.activation.second(z, self.scratch("second", *z.shape), self.scratch("square", *z.shape))
                )
            slopes.append(self.activation.pull(self.scratch("second", *z.shape).fill_(1), z, out=z))
        write = decay.write.unsqueeze(-1)
        for i in range(len(keys) - 1, -1, -1):
            now = written.at(i)
            weights = anchor if anchor is not None and i == 0 else [stack[:, 0] for stack in now.stacks]
            before = [buffer[i] for buffer in grad.stacks]
            onto = grad_anchor if grad_anchor is not None and i == 0 else [x[:, 0] for x in before]
            grad_inputs, grad_errors = [x[i] for x in grad.inputs], [x[i] for x in grad.errors]
            for l in range(layers):
                later = grad.stacks[l][i + 1]
                torch.bmm(now.inputs[l], later.flatten(1, 2).mT, out=back[l][i])
                for part, felt in enumerate(back[l][i].unflatten(-1, (s, -1)).unbind(2)):
                    grad_errors[l].addcmul_(felt, write[i, :, :, part], value=-1)
                grad_inputs[l].baddbmm_(weighed[l][i], later.flatten(1, 2), alpha=-1)
                before[l].flatten(2).baddbmm_(decay.mix[i].mT, later.flatten(2))
            if self.clip is not None:
                self._clip_backward(now, grad_errors, grad_inputs)

            # errors run down the layers, so their gradient runs up ...
            below: list[Tensor | None] = [None] * (layers - 1)
            pushed: list[Tensor] = []
            for l in range(layers - 1):
                g = grad_errors[l]
                curved = curvatures[l]
                if curved is not None:
                    below[l] = torch.mul(g, curved[i], out=self.scratch(f"below {l}", *g.shape))
                pushed.append(g.mul_(slopes[l][i]))
                grad_errors[l + 1].baddbmm_(pushed[-1], weights[l + 1].mT)
            # ... and then the inputs' gradient runs down
            g = grad_errors[-1]
            if grad_gain is not None:
                g = self._error_backward(
                    keys[i], values[i], now.hidden[-1], now.raw[-1], g, grad_inputs[0], grad_gain, grad_values[i]
                )
            for l in range(layers - 1, -1, -1):
                if l < layers - 1:
                    g = grad_inputs[l + 1].mul_(slopes[l][i])
                    bent = below[l]
                    if bent is not None:
                        g += bent
                both = torch.bmm(g.mT, now.inputs[l], out=self.scratch("both", *weights[l].shape))
                if l:
                    both.baddbmm_(now.raw[l].mT, pushed[l - 1])
                onto[l].add_(both)
                grad_inputs[l].baddbmm_(g, weights[l])
        if self.gain is None:
            torch.neg(grad.errors[-1], out=grad_values)
        grad_write, grad_mix = torch.zeros_like(decay.write), torch.zeros_like(decay.mix)
        for l in range(layers):
            grad_write -= back[l].unflatten(-1, (s, -1)).mul_(written.errors[l].unsqueeze(3)).sum(-1)
            later, start = (
                grad.stacks[l][1:].flatten(3).flatten(0, 1),
                written.stacks[l][: len(keys)].flatten(3).flatten(0, 1),
            )
            grad_mix.flatten(0, 1).baddbmm_(later, start.mT)
        return WriteGrad(grad_values, grad_write, grad_mix, grad_gain)

    def _clip_backward(self, now: Work, grad_errors: list[Tensor], grad_inputs: list[Tensor]) -> None:
        """Through ``d = scale * raw`` with ``scale = clip / |surprise|`` where that is below one."""
        scale, square, error_squares, input_squares = self._scale(now.raw, now.inputs)
        grad_scale = sum((g * d).sum(-1) for g, d in zip(grad_errors, now.raw))
        # d scale / d square = -scale / (2 square), and square is 4 sum |d|^2 |a|^2
        grad_square = torch.where(scale < 1, -4 * grad_scale * scale / square, torch.zeros_like(scale))
        for g, h, d, a, dd, aa in zip(grad_errors, grad_inputs, now.raw, now.inputs, error_squares, input_squares):
            g.mul_(scale.unsqueeze(-1)).addcmul_(d, (grad_square * aa).unsqueeze(-1))
            h.addcmul_(a, (grad_square * dd).unsqueeze(-1))

    def _error_backward(
        self,
        key: Tensor,
        value: Tensor,
        z: Tensor,
        error: Tensor,
        g: Tensor,
        grad_key: Tensor,
        grad_gain: Tensor,
        grad_value: Tensor,
    ) -> Tensor:
        """From the error ``J ((M(k) - v) * gain)`` to the last layer's output (returned), key, value and gain.

        ``J = (I - 1 1^T / d - n n^T / d) / sigma`` is LayerNorm's Jacobian at ``z``; it is symmetric.
        """
        gain = self.gain
        assert gain is not None
        n, _, inverse = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
        miss = torch.addcmul(key, n, gain).sub_(value)
        pushed = miss * gain
        grad_pushed = layer_norm_pull(g, n, inverse)
        grad_miss = torch.mul(grad_pushed, gain, out=grad_value)
        p = g * inverse
        # the error depends on z through the inner n, through the n of its own projection, and through 1 / sigma
        grad_n = grad_miss * gain
        grad_n.addcmul_(p, (pushed * n).mean(-1, keepdim=True), value=-1)
        grad_n.addcmul_(pushed, (p * n).mean(-1, keepdim=True), value=-1)
        grad_gain += (grad_pushed * miss).addcmul_(grad_miss, n).sum(1, keepdim=True)
        grad_key += grad_miss
        grad_value.neg_()
        through_sigma = (p * error).mean(-1, keepdim=True)
        return layer_norm_pull(grad_n, n, inverse).addcmul_(n, through_sigma, value=-1)


def layer_norm_pull(g: Tensor, n: Tensor, inverse: Tensor) -> Tensor:
    """The vector-Jacobian product of ``z -> n = (z - mean) / sigma``; ``inverse`` is ``1 / sigma``.

    The fused backward is given ``n`` itself, of mean 0 and deviation 1: from ``z`` it would lose digits by
    cancellation where sigma is small.
    """
    mask, none = [True, False, False], None
    pulled = torch.ops.aten.native_layer_norm_backward(
        g, n, n.shape[-1:], torch.zeros_like(inverse), torch.ones_like(inverse), none, none, mask
    )[0]
    return pulled.mul_(inverse)


def square_sum(x: Tensor) -> Tensor:
    """``[..., d] -> [...]``: each vector's squared length."""
    return torch.linalg.vecdot(x, x)

"""Decays for each channel: every column of a layer's matrix has a gate of its own.

With ``keep = 1 - alpha`` of one number for each input channel ``i``, and ``G[t, s]`` the coefficient of the gradient of
write ``s`` in what token ``t`` adds to the weights,

    A_t = keep_t A_{t-1}      m_t = keep_t m_{t-1} + E_t      P_ts = keep_t P_{t-1,s} + G_ts a_s

where ``P_ts`` stands for ``C_ts a_s``. At the end of a chunk ``P_s`` is ``a_s`` times a sum over its tokens, which does
not depend on the inputs. Everything is a product or a sum, as in ``decay_torch.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scan import linear_scan
from .chunk_torch import ChunkNetwork, Ends, Scratch, Written, WrittenGrad
from .decay_torch import ChunkDecay, windowed
from .network_torch import EPS
from .state import Options


def channel_scores(x: Tensor, a: Tensor, keep: Tensor, added: Tensor, delay: int) -> Tensor:
    """The product of each query with each ``P_s`` at its token, or before it: ``[rows, b, writes]``; differentiable.

    Args:
        x: ``[rows, b, in]``.
        a: ``[rows, writes, in]``.
        keep: ``[rows, b, in]``.
        added: ``G``, ``[rows, b, writes]``.
        delay: 1 for reads before the token, else 0.
    """
    scores, P = [], torch.zeros_like(a)
    for t in range(x.shape[1]):
        before, P = P, torch.addcmul(P * keep[:, t, None], added[:, t, :, None], a)
        scores.append((before if delay else P) @ x[:, t, :, None])
    b, writes = added.shape[1:]
    return torch.cat(scores, -1).mT.tril(writes - b - delay)


def channel_decay(keep: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``A`` after each token, the product of what later tokens keep, and ``m``; differentiable.

    ``keep``: ``[chunks, batch_heads, b, channels]``, as the results are. ``added``: ``E``, ``[chunks, batch_heads,
    b]``.
    """

    def scan(gates: Tensor, inputs: Tensor) -> Tensor:
        return linear_scan(gates.flatten(0, 1), inputs.expand_as(gates).flatten(0, 1)).view(gates.shape)

    ones, zeros = torch.ones_like(keep[:, :, :1]), torch.zeros_like(keep[:, :, 1:])
    kept = scan(keep, torch.cat([keep[:, :, :1], zeros], 2))
    later = scan(torch.cat([ones, keep[:, :, 1:].flip(2)], 2), torch.cat([ones, zeros], 2)).flip(2)
    return kept, later, None if added is None else scan(keep, added.unsqueeze(-1))


class ChannelNetwork(ChunkNetwork):
    """A ``ChunkNetwork`` whose decays are by channel. The channels of all layers lie one after the other.

    The fields of its ``ChunkDecay`` are ``read`` ``[..., b, writes]``: ``G``; ``carry`` ``[..., b, 1 + s, channels]``:
    ``keep``, and ``A`` and ``m`` after each token; ``write`` ``[..., writes, channels]``: what the inputs are
    multiplied by in ``P`` at the chunk's end, and with momentum the coefficient in that; ``mix``: the last ``A`` and
    ``m``, and with momentum the last ``E``.
    """

    channel_scores = staticmethod(channel_scores)
    channel_decay = staticmethod(channel_decay)

    def __init__(self, options: Options, gain: Tensor | None, scratch: Scratch, **others: Any) -> None:
        super().__init__(options, gain, scratch, **others)
        self.at_anchor = False  # the matrices are needed all the same
        self.delay = self.past - self.last_read

    def decay(
        self, theta: Tensor, eta: Tensor | None, alpha: Tensor | None, valid: Tensor | None, gamma: Tensor | None
    ) -> ChunkDecay:
        assert alpha is not None
        # with nothing kept, C is H, and m is E
        scalar = self.matrices(theta, eta, torch.ones_like(theta), valid, True)
        if gamma is not None:
            scalar = windowed(scalar, gamma, 0)
        added, keep = scalar.read.tril(self.past), 1 - alpha
        kept, later, moved = self.channel_decay(keep, None if eta is None else scalar.carry[..., 1])
        write, mix, carry = added.mT @ later, kept[:, :, -1], [keep, kept]
        if moved is not None:
            write, carry = torch.cat([write, scalar.write[..., 1:]], -1), [*carry, moved]
            mix = torch.cat([mix, moved[:, :, -1], scalar.mix[..., 1, 1:]], -1)
        return ChunkDecay(added, torch.stack(carry, -2), write, mix)

    def advance(self, l: int, i: int, now: Written, decay: ChunkDecay, after: Tensor) -> None:
        stack, a, d, channels = now.stacks[l], now.inputs[l], now.errors[l], columns(now.stacks, l)
        kept, end = self.at_end(decay, i, now.stacks, l)
        torch.mul(stack[:, 0], kept[:, 0], out=after[:, 0])
        self.add_product(after[:, 0], d.mT, decay.write[i][..., channels] * a, -1, fine=True)
        if kept.shape[1] == 2:
            after[:, 0].addcmul_(stack[:, 1], kept[:, 1])
            torch.mul(stack[:, 1], end, out=after[:, 1])
            self.add_product(after[:, 1], (d * decay.write[i][..., -1:]).mT, a, -1, fine=True)

    @staticmethod
    def at_end(decay: ChunkDecay, i: int, stacks: list[Tensor], l: int) -> tuple[Tensor, Tensor]:
        """``A`` and ``m`` of a layer ``[batch_heads, s, 1, in]``, and ``E`` ``[batch_heads, 1, 1]``, at the end."""
        parts, mix = decay.carry.shape[-2] - 1, decay.mix[i]
        kept = mix[:, : parts * decay.carry.shape[-1]].unflatten(1, (parts, -1))
        return kept[..., columns(stacks, l)].unsqueeze(2), mix[:, -1:, None]

    def ends(self, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> Ends:
        return ChannelEnds(self, decay, written, grad)

    # -- read --------------------------------------------------------------------------------------------------------

    def _carried(self, decay: ChunkDecay) -> Tensor:
        """``A`` and ``m`` of the weights that are read at each token, ``[rows, b, s, channels]``."""
        carry = decay.carry[:, :, :, 1:].flatten(0, 1)
        if self.delay:
            start = torch.zeros_like(carry[:, :1])
            start[:, :, 0] = 1
            carry = torch.cat([start, carry[:, :-1]], 1)
        return carry

    def read(self, queries: Tensor, decay: ChunkDecay, written: Written, query_activations: list[Tensor]) -> Tensor:
        state, added, keep = written.at(slice(None)), decay.read.flatten(0, 1), decay.carry[:, :, :, 0].flatten(0, 1)
        carry, errors = self._confine(self._carried(decay), state.errors)
        x = z = queries.flatten(0, 1)
        for l, (stack, a, d) in enumerate(zip(state.stacks, state.inputs, errors)):
            channels = columns(state.stacks, l)
            x, z = self.activation.value(z) if l else x, x.new_empty(*x.shape[:2], d.shape[-1])
            for part in range(stack.shape[1]):
                weighted = x * carry[:, :, part, channels]
                if part:
                    self.add_product(z, weighted, stack[:, part].mT, fine=True)
                else:
                    self.product(weighted, stack[:, part].mT, z, fine=True)
            scores = self.channel_scores(x, a, keep[..., channels], added, self.delay)
            self.add_product(z, scores, d, -1, fine=True)
            if query_activations:
                query_activations[l].copy_(z.view(query_activations[l].shape))
        y = z.view(*queries.shape[:-1], -1)
        if self.gain is None:
            return y
        return torch.addcmul(queries, torch.native_layer_norm(y, y.shape[-1:], None, None, EPS)[0], self.gain)

    def read_backward(
        self,
        grad_y: Tensor,
        queries: Tensor,
        decay: ChunkDecay,
        written: Written,
        query_activations: list[Tensor],
        grad: WrittenGrad,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        state, added, keep = written.at(slice(None)), decay.read.flatten(0, 1), decay.carry[:, :, :, 0].flatten(0, 1)
        carry = self._carried(decay)
        g, grad_gain = self.output_backward(grad_y, query_activations)
        g, grad_added, grad_kept = g.flatten(0, 1), torch.zeros_like(added), torch.empty_like(carry)
        grad_parts = torch.empty_like(decay.carry.flatten(0, 1))
        for l in range(len(state.stacks) - 1, -1, -1):
            stack, a, d, channels = state.stacks[l], state.inputs[l], state.errors[l], columns(state.stacks, l)
            z = query_activations[l - 1].flatten(0, 1) if l else queries.flatten(0, 1)
            x = self.activation.value(z) if l else z
            of_stack, grad_x = grad.stacks[l][:-1].flatten(0, 1), torch.zeros_like(x)
            for part in range(stack.shape[1]):
                coefficients, back = carry[:, :, part, channels], self.product(g, stack[:, part], fine=True)
                of_stack[:, part] = self.product(g.mT, x * coefficients, fine=True)
                grad_kept[:, :, part, channels] = x * back
                grad_x.addcmul_(back, coefficients)
            with torch.enable_grad():
                leaves = [y.detach().requires_grad_() for y in (x, a, keep[..., channels], added)]
                scores = self.channel_scores(leaves[0], leaves[1], leaves[2], leaves[3], self.delay)
            found = torch.autograd.grad(scores, leaves, self.product(g, d.mT, fine=True).neg_())
            self.product(scores.detach().mT, g, grad.errors[l].flatten(0, 1)).neg_()
            grad_x += found[0]
            grad.inputs[l].flatten(0, 1).copy_(found[1])
            grad_parts[:, :, 0, channels] = found[2]
            grad_added += found[3]
            g = self.activation.vjp(grad_x, z) if l else grad_x
        if self.delay:
            grad_kept = torch.cat([grad_kept[:, 1:], torch.zeros_like(grad_kept[:, :1])], 1)
        grad_parts[:, :, 1:] = grad_kept
        g = g.view(queries.shape)
        if self.gain is not None:
            g = g + grad_y
        return g, grad_added.view(decay.read.shape), grad_parts.view(decay.carry.shape), grad_gain


class ChannelEnds(Ends):
    """Backward through ``ChannelNetwork.advance``."""

    def __init__(self, net: ChunkNetwork, decay: ChunkDecay, written: Written, grad: WrittenGrad) -> None:
        self.net, self.decay, self.written, self.grad = net, decay, written, grad
        self._write, self._mix = torch.zeros_like(decay.write), torch.zeros_like(decay.mix)

    def backward(self, l: int, i: int) -> None:
        written, grad, product = self.written, self.grad, self.net.product
        a, d, channels = written.inputs[l][i], written.errors[l][i], columns(written.stacks, l)
        kept, end = ChannelNetwork.at_end(self.decay, i, written.stacks, l)
        of_kept, of_end = ChannelNetwork.at_end(self.decay._replace(mix=self._mix), i, written.stacks, l)
        start, to, g = written.stacks[l][i], grad.stacks[l][i], grad.stacks[l][i + 1]
        coefficients, of_input = self.decay.write[i][..., channels], product(d, g[:, 0])
        grad.errors[l][i].sub_(product(coefficients * a, g[:, 0].mT))
        grad.inputs[l][i].addcmul_(of_input, coefficients, value=-1)
        self._write[i][..., channels] = of_input.mul_(a).neg_()
        of_kept.copy_((g[:, :1] * start).sum(2, keepdim=True))
        to.addcmul_(g[:, :1], kept)
        if kept.shape[1] == 2:
            last, along = self.decay.write[i][..., -1:], product(a, g[:, 1].mT)
            grad.errors[l][i].addcmul_(along, last, value=-1)
            grad.inputs[l][i].sub_(product(d * last, g[:, 1]))
            self._write[i][..., -1] -= (d * along).sum(-1)
            of_end += (g[:, 1] * start[:, 1]).sum((1, 2), keepdim=True)
            to[:, 1].addcmul_(g[:, 1], end)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._write, self._mix


def columns(stacks: list[Tensor], l: int) -> slice:
    """The channels of layer ``l``."""
    start = sum(x.shape[-1] for x in stacks[:l])
    return slice(start, start + stacks[l].shape[-1])

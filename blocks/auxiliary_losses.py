"""Losses to train with beside a model's own: how well its memories predict what they learn, and how much they write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.memory import read_memory, titans_memory
from .observers import Learned, Observer, recomputing


class AuxiliaryLoss(Observer):
    """A mean over real tokens, heads and memories, of what was found so far."""

    def __init__(self, model: nn.Module, each: Callable[[nn.Module, Learned], Tensor]) -> None:
        """``each``: what a memory's call costs for each token and head, ``[batch, time, heads]``."""
        super().__init__(model)
        self._each = each
        self._like = next(model.parameters(), torch.zeros(()))
        self._found: list[Tensor] = []
        self._count: list[Tensor | int] = []

    def value(self) -> Tensor:
        """The mean so far: a number in float32 or wider; 0 where there is no memory."""
        if not self._found:
            return self._like.new_zeros((), dtype=torch.promote_types(self._like.dtype, torch.float32))
        total = torch.stack([x.to(self._found[0].device) for x in self._found]).sum()
        count = sum(int(count) for count in self._count)
        return total / max(count, 1)

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        each, mask = self._each(memory, learned), _real(learned)
        if mask is not None:
            each = torch.where(mask.unsqueeze(-1), each, 0.0)
        total = each.sum()
        if not recomputing():  # checkpointing wants the same computed, which was counted before
            self._found.append(total)
            self._count.append(each.numel() if mask is None else mask.sum() * each.shape[2])


def memory_loss(model: nn.Module) -> AuxiliaryLoss:
    """The auxiliary loss of a model's memories: the mean of ``|M(k_t) - v_t|^2`` before token t is written.

    Example::

        with tb.memory_loss(model) as aux:
            loss = model(tokens, targets=targets).loss
            (loss + 0.1 * aux.value()).backward()

    ``M`` is each memory as it stands after the tokens before t, a frozen one as it is. Differentiable in everything
    that the model is; outputs and states are what they are otherwise. Calls inside of one ``with`` block count
    together, masked and persistent tokens do not, nor does what reads inside of a context's ``attend``. With activation
    checkpointing, ``backward`` has to be called inside, for the forward pass is then repeated. Costs each memory's
    operation once more; a compiled model runs uncompiled meanwhile.
    """
    return AuxiliaryLoss(model, _missed)


def write_cost(model: nn.Module) -> AuxiliaryLoss:
    """What writing costs: the mean of ``theta_t / max_step + alpha_t``, the shares written and forgotten at each token.

    A memory pays nothing for what it writes and forgets on a short text, and everything on a long one: each token
    that is not worth keeping wears away what is kept. With this beside the loss, times a small factor, gates close
    where they do not help; those that ``gating: hard_sigmoid`` makes close entirely, and what a memory holds then
    outlasts any number of such tokens. A threshold's decisions are not counted. Used as :func:`memory_loss`, and next
    to free.
    """
    return AuxiliaryLoss(model, _written)


def _missed(memory: nn.Module, learned: Learned) -> Tensor:
    (_, k, v, theta, eta, alpha), state, options = learned.tokens, learned.before, learned.options
    if learned.after is None:
        predicted = read_memory(k, state.weights, options.activation, learned.norm)
    else:
        predicted, _ = titans_memory(
            k, k, v, theta, eta, alpha, state, options.chunk, options.activation, learned.norm, _real(learned),
            clip=options.clip, read="before", keep=options.keep, threshold=options.threshold,
        )  # fmt: skip
    wide = state.weights[0].dtype
    return (predicted.to(wide) - v.to(wide)).square().sum(-1)


def _written(memory: nn.Module, learned: Learned) -> Tensor:
    theta, alpha = learned.tokens.theta, learned.tokens.alpha
    share = theta / getattr(memory, "max_step", 1.0)
    return share if alpha is None else share + alpha


def _real(learned: Learned) -> Tensor | None:
    return None if learned.layout is None else learned.layout.filled

"""Auxiliary losses for training: the prediction error of the memories, and how much they write and forget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.memory import read_memory, titans_memory
from ..kernels.memory.learner import Rule, learn_writes, read
from .observers import Learned, Observer, recomputing


class AuxiliaryLoss(Observer):
    """The mean of a loss over the valid tokens, heads and memories of all calls inside the ``with`` block.

    ``each`` returns the loss of one call of a memory for each token and head, ``[batch, time, heads]``.
    """

    def __init__(self, model: nn.Module, each: Callable[[nn.Module, Learned], Tensor]) -> None:
        super().__init__(model)
        meshes = [found for module in self._names if (found := getattr(module, "parallel", None)) is not None]
        if any(mesh.context.size * mesh.tensor.size > 1 for mesh in meshes):
            raise ValueError(
                "auxiliary losses: the ranks of this model share tokens or heads, so each has a part of the loss: "
                "expected one process, or a mesh of data alone"
            )
        self._each = each
        self._like = next(model.parameters(), torch.zeros(()))
        self._sums: list[Tensor] = []
        self._counts: list[Tensor | int] = []

    def value(self) -> Tensor:
        """Return the mean so far, a scalar of dtype float32 or float64. 0 if no memory was called."""
        if not self._sums:
            return self._like.new_zeros((), dtype=torch.promote_types(self._like.dtype, torch.float32))
        total = torch.stack([x.to(self._sums[0].device) for x in self._sums]).sum()
        count = sum(int(count) for count in self._counts)
        return total / max(count, 1)

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        each, mask = self._each(memory, learned), _valid(learned)
        if mask is not None:
            each = torch.where(mask.unsqueeze(-1), each, 0.0)
        total = each.sum()
        if not recomputing():  # activation checkpointing repeats calls that are counted already
            self._sums.append(total)
            self._counts.append(each.numel() if mask is None else mask.sum() * each.shape[2])


def memory_loss(model: nn.Module) -> AuxiliaryLoss:
    """The prediction error of the memories of a model: the mean of ``|M(k_t) - v_t|^2`` before token t is written.

    Example::

        with tb.memory_loss(model) as aux:
            loss = model(tokens, targets=targets).loss
            (loss + 0.1 * aux.value()).backward()

    ``M`` is the memory after the tokens before t. A frozen memory does not change. The loss is differentiable with
    respect to all parameters and inputs. It is the mean over all calls inside one ``with`` block, without masked and
    persistent tokens, and without memories inside the ``attend`` of a ``context``. Outputs and states do not change.
    With activation checkpointing, ``backward`` must be called inside the block, because it repeats the forward pass.
    The memory operation is computed twice. A compiled model runs uncompiled. Raises ``ValueError`` for a model whose
    mesh has ranks of ``context`` or ``tensor``.
    """
    return AuxiliaryLoss(model, _prediction_errors)


def write_cost(model: nn.Module) -> AuxiliaryLoss:
    """The cost of writing: the mean of ``theta_t / max_step + alpha_t``, the step size and the decay of each token.

    Every write and every decay overwrites a part of the memory. Added to the loss with a small factor, this loss closes
    the gates at tokens where they do not reduce the loss. With ``gating: hard_sigmoid`` they close completely, and the
    memory then keeps its content over any number of such tokens. The threshold is not taken into account. Used like
    :func:`memory_loss`, at negligible cost.
    """
    return AuxiliaryLoss(model, _gate_sums)


def _prediction_errors(memory: nn.Module, learned: Learned) -> Tensor:
    state, options = learned.before, learned.options
    if isinstance(options, Rule):
        return _prediction_errors_by(options, memory, learned)
    _, k, v, theta, eta, alpha, *_ = learned.tokens
    if learned.after is None:
        predicted = read_memory(k, state.weights, options.activation, learned.norm)
    else:
        predicted, _ = titans_memory(
            k, k, v, theta, eta, alpha, state, options.chunk, options.activation, learned.norm, _valid(learned),
            clip=options.clip, read="before", keep=options.keep, threshold=options.threshold,
        )  # fmt: skip
    wide = state.weights[0].dtype
    return (predicted.to(wide) - v.to(wide)).square().sum(-1)


def _prediction_errors_by(rule: Rule, memory: Any, learned: Learned) -> Tensor:
    tokens: Any = learned.tokens
    k, v = tokens.k, tokens.v
    if rule.keys > 1:  # each token is asked for what its first key holds
        k, v = k[:, :, 0], v[:, :, 0]
    if learned.after is None:
        predicted = read(rule, k, learned.before, learned.norm)
    else:
        # a rule that moves once a chunk stays that
        reading = dataclasses.replace(rule, read="anchor" if rule.moves_once else "before", query=None)
        predicted, _ = learn_writes(reading, tokens._replace(q=k), learned.before, learned.norm, _valid(learned))
    wide = learned.before.weights[0].dtype
    return (predicted.to(wide) - v.to(wide)).square().sum(-1)


def _gate_sums(memory: nn.Module, learned: Learned) -> Tensor:
    theta, alpha = learned.tokens.theta, learned.tokens.alpha
    theta = theta if theta.dim() == 3 else theta.mean(2)
    alpha = alpha if alpha is None or alpha.dim() == 3 else alpha.mean(3)
    step = theta / getattr(memory, "max_step", 1.0)
    return step if alpha is None else step + alpha


def _valid(learned: Learned) -> Tensor | None:
    return None if learned.layout is None else learned.layout.filled

"""A chunk, or a part of one, of a learner in differentiable PyTorch operators: the equations of ``docs/learners.md``.

Tensors are ``[batch, heads, time, ...]``. The gradient of write ``s`` with respect to matrix ``l`` is the outer product
of the error ``d_ls`` and the input ``a_ls``; both are taken at the anchor. Where weights are linear in the gradients,
they are never made for each token (``sums``). Where they pass through a map of a whole matrix, they are made for each
token (``every_matrix``, or ``moves`` where a map changes later weights), or move once a chunk where nothing reads them
in between (``one_move``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...dispatch import transforming
from ..network_torch import EPS
from .coefficients import Coefficients, coefficients, products, times_steps, window_weights
from .parts import Apply, pull_back
from .rule import Rule
from .state import LearnerState, Writes, where

Matrices = Sequence[Tensor]
MADE_TOGETHER = 2**26
"""Bytes of the weights after each token that are made together."""


# -- the network -------------------------------------------------------------------------------------------------------


def evaluate(rule: Rule, apply: Apply, x: Tensor, gain: Tensor | None, count: int) -> Tensor:
    """``M(x)``: ``[batch, heads, time, d_in] -> [batch, heads, time, d_out]``."""
    z = rule.network.forward(apply, rule.features_of(x), rule.activation, count)
    return z if gain is None else x + layer_norm(z) * gain


def layer_norm(z: Tensor) -> Tensor:
    """LayerNorm in elementary operators.

    The third derivative of ``torch.nn.functional.layer_norm``, which gradients of gradients of a memory need, is wrong
    in PyTorch 2.13.
    """
    centred = z - z.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()


def read_at(rule: Rule, weights: Matrices, x: Tensor, gain: Tensor | None) -> Tensor:
    """``M(x)`` at ``weights``."""
    if rule.module is not None:
        return rule.module.read(weights, x)
    return evaluate(rule, lambda i, a: a @ weights[i].mT, x, gain, len(weights))


class Gradients(NamedTuple):
    """The gradients of ``time`` writes: for each matrix, ``sum_s c_s G_s`` for coefficients ``c``."""

    errors: list[Tensor]
    """``d_l``: ``[batch, heads, time, out]``; of a module, the gradients ``[batch, heads, time, ...]`` themselves."""
    inputs: list[Tensor]
    """``a_l``: ``[batch, heads, time, in]``; of a module, empty."""

    def square(self) -> Tensor:
        """The squared norm of each write's gradient in all matrices together: ``[batch, heads, time]``."""
        if not self.inputs:
            return torch.stack([g.flatten(3).square().sum(-1) for g in self.errors]).sum(0)
        return torch.stack([d.square().sum(-1) * a.square().sum(-1) for d, a in zip(*self)]).sum(0)

    def at(self, t: int) -> Gradients:
        """Those of write ``t``."""
        return Gradients([d[:, :, t : t + 1] for d in self.errors], [a[:, :, t : t + 1] for a in self.inputs])

    def each(self, l: int, coefficients: Tensor, shares: Sequence[Tensor], matrices: Matrices) -> Tensor:
        """``sum_j m_jt S_j - sum_s c_ts G_s`` of matrix ``l`` for each token: ``[batch, heads, time, ...]``.

        ``coefficients``: ``[batch, heads, time, writes]``. ``shares``: for each of the ``matrices`` ``[batch, heads,
        ...]``, ``[batch, heads, time]``.
        """
        d = self.errors[l]
        made = d.unsqueeze(-1) * self.inputs[l].unsqueeze(-2) if self.inputs else d
        terms = torch.cat([*(x.unsqueeze(2) for x in matrices), made], 2)
        weights = torch.cat([*(x.unsqueeze(-1) for x in shares), -coefficients], -1)
        return (weights @ terms.flatten(3)).view(*coefficients.shape[:3], *terms.shape[3:])

    def total(self, l: int, coefficients: Tensor) -> Tensor:
        """``sum_s c_s G_s`` of matrix ``l``. ``coefficients``: ``[batch, heads, time]``, or ``[..., in, time]``."""
        d = self.errors[l]
        if not self.inputs:
            return (coefficients.view(*coefficients.shape, *[1] * (d.dim() - 3)) * d).sum(2)
        a = self.inputs[l]
        weighted = a * coefficients.unsqueeze(-1) if coefficients.dim() == 3 else a * coefficients.mT
        return d.mT @ weighted


def gradients(rule: Rule, weights: Matrices, writes: Writes, gain: Tensor | None) -> Gradients:
    """The gradients of all ``writes`` at ``weights``."""
    parameter = None if writes.parameter is None else writes.parameter.unsqueeze(-1)
    if rule.module is not None:
        found = Gradients(rule.module.gradients(weights, writes.k, writes.v, rule.objective, parameter), [])
    else:
        rows = writes.k.shape[:3]

        def predict(nudges: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            inputs: dict[int, Tensor] = {}

            def apply(i: int, a: Tensor) -> Tensor:
                inputs[i] = a
                return a @ weights[i].mT + nudges[i]

            prediction = evaluate(rule, apply, writes.k, gain, len(weights))
            return prediction, [inputs[i] for i in range(len(weights))]

        # the derivative with respect to a matrix's output is that with respect to something added to it
        zeros = [w.new_zeros(*rows, w.shape[-2]) for w in weights]
        found = Gradients(*pull_back(predict, zeros, lambda p: rule.objective.error(p, writes.v, parameter)))
    return found


def clip(rule: Rule, found: Gradients) -> Gradients:
    """The gradients, those of each write scaled down to ``rule.clip``."""
    if rule.clip is None:
        return found
    # clamped before the root, which has no derivative at 0; a gradient that is not finite stays NaN
    square = found.square()
    scale = rule.clip / square.clamp(min=rule.clip**2).sqrt() + 0 * square
    return found._replace(errors=[d * scale.view(*scale.shape, *[1] * (d.dim() - 3)) for d in found.errors])


def each_step(writes: Writes, found: Gradients) -> tuple[Writes, Gradients]:
    """``theta`` ``[batch, heads, time, matrices]`` as a factor of the gradients, beside a ``theta`` of one."""
    theta = writes.theta.unbind(-1)
    errors = [d * x.view(*x.shape, *[1] * (d.dim() - 3)) for d, x in zip(found.errors, theta)]
    return writes._replace(theta=torch.ones_like(theta[0])), found._replace(errors=errors)


def suppress(rule: Rule, writes: Writes, found: Gradients) -> Writes:
    """A write whose gradient's norm is below the threshold has a step and a forgetting of zero.

    The comparison is not differentiated.
    """
    written = ~(found.square().detach().sqrt() < (rule.threshold or 0.0))
    alpha = writes.alpha
    if alpha is not None:
        alpha = alpha * (written if alpha.dim() == 3 else written.unsqueeze(-1))
    theta = writes.theta * (written if writes.theta.dim() == 3 else written.unsqueeze(-1))
    return writes._replace(theta=theta, alpha=alpha)


def anchor_weights(rule: Rule, writes: Writes, state: LearnerState) -> list[Tensor]:
    """The weights at which the gradients of a chunk are taken."""
    anchor: Sequence[Tensor] = state.anchor
    if rule.retention.first and writes.alpha is not None:  # chunks have one write
        keep = 1 - writes.alpha[:, :, 0]
        anchor = [w * _per_matrix(rule, keep, anchor, i) for i, w in enumerate(anchor)]
    return [rule.retention.link(w) for w in anchor]


# -- rules whose weights are sums over the writes ----------------------------------------------------------------------


def sums(
    rule: Rule, writes: Writes, found: Gradients, window: Tensor, valid: Tensor | None, state: LearnerState,
    gain: Tensor | None,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """Outputs and the state after the last token, from the closed form of a chunk."""
    order = 0 if writes.eta is None else rule.optimizer.order
    c = coefficients(writes, _times(writes.theta, window), valid, order)
    if rule.read == "anchor":
        y = read_at(rule, [rule.retention.link(w) for w in state.anchor], writes.q, gain)
    else:
        read = c if rule.read == "after" else _before(c)
        apply = _layers(rule, read, found, state)
        if rule.retention.linked:
            apply = _scaled(apply, _scales(rule, read, found, state))
        y = evaluate(rule, apply, writes.q, gain, len(state.weights))
    return y, _ended(rule, c, found, state)


def _scaled(apply: Apply, scales: Sequence[Tensor]) -> Apply:
    return lambda i, x: apply(i, x) * scales[i]


def _scales(rule: Rule, read: Coefficients, found: Gradients, state: LearnerState) -> list[Tensor]:
    """``retention.scale`` of each matrix at each token: ``[batch, heads, time, 1]``."""
    scales = []
    for i, w in enumerate(state.weights):

        def scale(part: Coefficients, found: Gradients, state: LearnerState, i: int = i) -> Tensor:
            return rule.retention.scale(_every_matrix(part, found, i, state, state.weights)).squeeze(-1)

        pieces = []
        for start in range(0, read.kept.shape[2], size := tokens_made_together(w)):
            span = slice(start, start + size)
            part = Coefficients(read.kept[:, :, span], [m[:, :, span] for m in read.carried],
                                read.written[:, :, span], [])  # fmt: skip
            pieces.append(made_again(scale, part, found, state))
        scales.append(torch.cat(pieces, 2))
    return scales


def made_again(function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, which makes the weights after each token, and for backward makes them again.

    They take the room of as many states as there are tokens. ``torch.func`` takes no checkpoints.
    """
    if transforming() or not torch.is_grad_enabled():
        return function(*given)
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def tokens_made_together(*weights: Tensor) -> int:
    """The number of tokens, the weights after which are made together."""
    return max(1, MADE_TOGETHER // max(1, sum(w.numel() * w.element_size() for w in weights)))


def solved_sums(
    rule: Rule, writes: Writes, valid: Tensor | None, state: LearnerState
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """``sums`` of many chunks of one write, for one matrix and an error that is linear in the prediction.

    Write ``t`` sees ``p_t = (what the start has at k_t) - sum_{s<t} L_ts d_s``. With ``d = f (p - v)`` this is
    ``(I + f L) d = f (start - v)``: the delta rule's triangular system (DeltaNet, arXiv 2406.06484, sec. 3).
    """
    order = 0 if writes.eta is None else rule.optimizer.order
    window = window_weights(rule, writes, valid, None, None)
    c = coefficients(writes, writes.theta * window, valid, order)
    key = rule.features_of(writes.k)
    error = lambda prediction: rule.objective.error(prediction, writes.v, None)  # noqa: E731
    before = _before(c)
    if rule.retention.first and writes.alpha is not None:
        keep = 1 - (writes.alpha if writes.alpha.dim() == 3 else writes.alpha.mT)
        before = Coefficients(before.kept * keep, [m * keep for m in before.carried],
                              before.written * keep.unsqueeze(-1), before.momentum)  # fmt: skip
    nothing = Gradients([torch.zeros_like(writes.v)], [key])
    start = error(_layers(rule, before, nothing, state)(0, key))
    slope = (error(torch.ones_like(writes.v)) - error(torch.zeros_like(writes.v)))[..., :1]
    if before.written.dim() == 4:
        seen = (key @ key.mT) * before.written
    else:
        seen = torch.einsum("bhtc,bhsc,bhcts->bhts", key, key, before.written)
    system = torch.eye(key.shape[2], dtype=key.dtype, device=key.device) + slope * seen
    errors = torch.linalg.solve_triangular(system, start, upper=False, unitriangular=True)
    found = Gradients([errors], [key])
    y = evaluate(rule, _layers(rule, c if rule.read == "after" else _before(c), found, state), writes.q, None, 1)
    return y, _ended(rule, c, found, state)


def _layers(rule: Rule, read: Coefficients, found: Gradients, state: LearnerState) -> Apply:
    """The products with the matrices that the coefficients ``read`` give each token."""
    start = [rule.retention.enter(w) for w in state.weights]
    stacks = [state.momentum, state.second][: len(read.carried)]
    slices = rule.channels(start) if read.written.dim() == 5 else None

    def apply(i: int, x: Tensor) -> Tensor:
        kept, carried, written = read.kept, read.carried, read.written
        d, a = found.errors[i], found.inputs[i]
        if slices is None:
            z = kept.unsqueeze(-1) * (x @ start[i].mT)
            for m, stack in zip(carried, stacks):
                z = z + m.unsqueeze(-1) * (x @ stack[i].mT)
            return z - ((x @ a.mT) * written) @ d
        z = (x * kept[:, :, slices[i]].mT) @ start[i].mT
        for m, stack in zip(carried, stacks):
            z = z + (x * m[:, :, slices[i]].mT) @ stack[i].mT
        return z - torch.einsum("bhtc,bhsc,bhcts->bhts", x, a, written[:, :, slices[i]]) @ d

    return apply


def _ended(rule: Rule, c: Coefficients, found: Gradients, state: LearnerState) -> LearnerState:
    """The state after the last token."""
    start = [rule.retention.enter(w) for w in state.weights]
    stacks = [state.momentum, state.second][: len(c.carried)]
    slices = rule.channels(start) if c.written.dim() == 5 else None

    def last(x: Tensor, i: int, w: Tensor) -> Tensor:
        x = x[..., -1] if slices is None else x[:, :, slices[i], -1].unsqueeze(-2)
        return x if slices is not None else x.view(*x.shape, *[1] * (w.dim() - 2))

    weights = []
    for i, w in enumerate(start):
        u = last(c.kept, i, w) * w
        for m, stack in zip(c.carried, stacks):
            u = u + last(m, i, w) * stack[i]
        end = c.written[..., -1, :] if slices is None else c.written[:, :, slices[i], -1]
        weights.append(rule.retention.leave(u - found.total(i, end)))
    moved = []
    for parts, end in c.momentum:
        moved.append(
            tuple(
                sum(p.view(*p.shape, *[1] * (w.dim() - 2)) * stack[i] for p, stack in zip(parts, stacks))
                - found.total(i, end)
                for i, w in enumerate(start)
            )
        )
    return _with(state, weights, moved)


def _times(theta: Tensor, window: Tensor) -> Tensor:
    return theta * window if window.dim() == 3 else theta.unsqueeze(-1) * window


def _before(c: Coefficients) -> Coefficients:
    """The coefficients of the weights before each token."""
    down = lambda x, first: torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], -1)  # noqa: E731
    written = torch.cat([torch.zeros_like(c.written[..., :1, :]), c.written[..., :-1, :]], -2)
    return Coefficients(down(c.kept, 1.0), [down(m, 0.0) for m in c.carried], written, c.momentum)


def _with(state: LearnerState, weights: Sequence[Tensor], momentum: Sequence[tuple[Tensor, ...]]) -> LearnerState:
    state = state._replace(weights=tuple(weights))
    if momentum:
        state = state._replace(momentum=momentum[0])
    return state if len(momentum) < 2 else state._replace(second=momentum[1])


# -- rules whose weights pass through maps of whole matrices -----------------------------------------------------------


def every_matrix(
    rule: Rule, writes: Writes, found: Gradients, window: Tensor, valid: Tensor | None, state: LearnerState,
    gain: Tensor | None,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """The weights after each token, ``[batch, heads, time, out, in]``, where maps of a matrix change no later one."""
    retention, optimizer = rule.retention, rule.optimizer
    order = 0 if writes.eta is None else optimizer.order
    start = [retention.enter(w) for w in state.weights]
    if optimizer.linear and retention.gates != "channel":
        c = coefficients(writes, _times(writes.theta, window), valid, order)
        u = [_every_matrix(c, found, i, state, start) for i in range(len(start))]
        after = _ended(rule, c, found, state)  # not the last of u: the derivative of a part is as large as the whole
        weights = [retention.leave(x) for x in u]
    else:
        u, moved = _updates(rule, writes, found, window, valid, state, start, order)
        weights = [retention.leave(x) for x in u]
        # copies: views would keep the weights after every token alive
        after = _with(state, [w[:, :, -1].clone() for w in weights], moved)
    used = weights
    if rule.read == "before":
        used = [torch.cat([w.unsqueeze(2), x[:, :, :-1]], 2) for w, x in zip(state.weights, weights)]
    used = [retention.link(w) for w in used]
    if rule.read == "anchor":
        y = read_at(rule, [retention.link(w) for w in state.anchor], writes.q, gain)
    elif rule.module is not None:
        each = [w.flatten(1, 2) for w in used]
        y = rule.module.read(each, writes.q.flatten(1, 2).unsqueeze(2)).view(*writes.q.shape[:3], -1)
    else:
        y = evaluate(rule, lambda i, x: (used[i] @ x.unsqueeze(-1)).squeeze(-1), writes.q, gain, len(used))
    return y, after


def _every_matrix(c: Coefficients, found: Gradients, i: int, state: LearnerState, start: Matrices) -> Tensor:
    """Matrix ``i`` after each token, by decays that are not by channel: ``[batch, heads, time, ...]``."""
    stacks = [stack[i] for stack in (state.momentum, state.second)[: len(c.carried)]]
    return found.each(i, c.written, [c.kept, *c.carried], [start[i], *stacks])


def _updates(
    rule: Rule, writes: Writes, found: Gradients, window: Tensor, valid: Tensor | None, state: LearnerState,
    start: Matrices, order: int,
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:  # fmt: skip
    """``U`` after each token where steps are updates of the momentum, and the momentum after the last one."""
    optimizer = rule.optimizer
    steps = window if optimizer.scales_update else _times(writes.theta, window)
    decay = products(torch.ones_like(writes.theta) if writes.eta is None else writes.eta)
    real = None if valid is None else valid.to(writes.theta).view(valid.shape[0], 1, 1, -1)
    ends: list[list[Tensor]] = [[] for _ in range(order)]
    results = []
    for i, w in enumerate(start):
        if order == 0:
            s = found.each(i, torch.diag_embed(steps) if steps.dim() == 3 else steps, [], [])
        else:
            along = decay[..., 1:] if real is None else decay[..., 1:] * real
            s = found.each(i, times_steps(along, steps), [decay[..., 0]], [state.momentum[i]])
            ends[0].append(s[:, :, -1].clone())
        if order == 2:
            s = _per_token(decay[..., 0], state.second[i]) + _mix(along, s)
            ends[1].append(s[:, :, -1].clone())
        update = optimizer.update(s)
        if optimizer.scales_update:
            theta = writes.theta
            update = theta.view(*theta.shape, *[1] * (update.dim() - 3)) * update
        if writes.alpha is None or writes.alpha.dim() == 3:
            keep = products(torch.ones_like(writes.theta) if writes.alpha is None else 1 - writes.alpha)
            moved = keep[..., 1:] if real is None else keep[..., 1:] * real
            results.append(_per_token(keep[..., 0], w) + _mix(moved, update))
        else:
            keep = products((1 - writes.alpha[..., rule.channels(start)[i]]).mT)
            moved = keep[..., 1:] if real is None else keep[..., 1:] * real.unsqueeze(2)
            first = w.unsqueeze(2) * keep[..., 0].mT.unsqueeze(-2)
            results.append(first + torch.einsum("bhitr,bhroi->bhtoi", moved, update))
    return results, [tuple(x) for x in ends]


def _per_token(coefficients: Tensor, w: Tensor) -> Tensor:
    """``[batch, heads, time]`` times ``[batch, heads, ...]``: ``[batch, heads, time, ...]``."""
    return (coefficients.unsqueeze(-1) @ w.flatten(2).unsqueeze(2)).view(*coefficients.shape, *w.shape[2:])


def _mix(coefficients: Tensor, x: Tensor) -> Tensor:
    """``sum_r c_tr x_r``: ``[batch, heads, time, time]`` and ``[batch, heads, time, ...]``."""
    return (coefficients @ x.flatten(3)).view(x.shape)


def moves(
    rule: Rule, writes: Writes, found: Gradients, window: Tensor, valid: Tensor | None, state: LearnerState,
    gain: Tensor | None,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """The recurrence token by token, with gradients at the anchor."""
    retention, optimizer = rule.retention, rule.optimizer
    order = 0 if writes.eta is None else optimizer.order
    anchor = [retention.link(w) for w in state.anchor]
    outputs = []
    for t in range(writes.theta.shape[2]):
        at = lambda x, t=t: x[:, :, t]  # noqa: E731
        theta, c = at(writes.theta), at(window)
        now = found.at(t) if window.dim() == 3 else found
        before, terms = state, [state.momentum, state.second][:order]
        weights: list[Tensor] = []
        stepped: list[list[Tensor]] = [[] for _ in range(order)]
        for i, w in enumerate(state.weights):
            per_head = lambda x, w=w: x.view(*x.shape, *[1] * (w.dim() - 2))  # noqa: E731
            step = -now.total(i, c.unsqueeze(-1) if window.dim() == 3 else c)
            if not optimizer.scales_update:
                step = per_head(theta) * step
            for term in range(order):
                step = per_head(at(writes.eta)) * terms[term][i] + step
                stepped[term].append(step)
            step = optimizer.update(step)
            if optimizer.scales_update:
                step = per_head(theta) * step
            u = retention.enter(w)
            if writes.alpha is not None:
                u = u * _per_matrix(rule, 1 - at(writes.alpha), state.weights, i)
            weights.append(_end(rule, u + step, state, i))
        after = _with(state, weights, [tuple(x) for x in stepped])
        if valid is not None:
            real = valid[:, t]
            after = after._replace(
                weights=where(real, after.weights, before.weights),
                momentum=where(real, after.momentum, before.momentum),
                second=where(real, after.second, before.second),
            )
        state = after
        if rule.read == "anchor":
            used: Matrices = anchor
        else:
            used = [retention.link(w) for w in (state if rule.read == "after" else before).weights]
        outputs.append(read_at(rule, used, writes.q[:, :, t : t + 1], gain))
    return torch.cat(outputs, 2), state


def one_move(
    rule: Rule, writes: Writes, found: Gradients, window: Tensor, valid: Tensor | None, state: LearnerState,
    gain: Tensor | None, ends: Tensor | bool,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """One step for a chunk, at its end; before it, the gradients of its tokens add up in ``state.pending``."""
    retention, optimizer = rule.retention, rule.optimizer
    y = read_at(rule, [retention.link(w) for w in state.anchor], writes.q, gain)
    order = 0 if writes.eta is None else optimizer.order
    real = torch.ones_like(writes.theta)
    if valid is not None:
        real = real * valid.unsqueeze(1)
    c = window if optimizer.scales_update else writes.theta * window
    *totals, eta, theta, kept = state.pending
    totals = [total + found.total(i, c) for i, total in enumerate(totals)]
    eta = eta if writes.eta is None else eta + (writes.eta * real).sum(2)
    theta = theta + (writes.theta * real).sum(2)
    if writes.alpha is not None:
        decays = torch.where(real > 0 if writes.alpha.dim() == 3 else real.unsqueeze(-1) > 0, 1 - writes.alpha, 1.0)
        kept = kept * decays.prod(2)
    pending = (*totals, eta, theta, kept)
    if ends is False:
        return y, state._replace(pending=pending)
    terms = [state.momentum, state.second][:order]
    weights: list[Tensor] = []
    stepped: list[list[Tensor]] = [[] for _ in range(order)]
    for i, w in enumerate(state.weights):
        per_head = lambda x, w=w: x.view(*x.shape, *[1] * (w.dim() - 2))  # noqa: E731
        step = -totals[i]
        for term in range(order):
            step = per_head(eta / rule.chunk) * terms[term][i] + step
            stepped[term].append(step)
        step = optimizer.update(step)
        if optimizer.scales_update:
            step = per_head(theta / rule.chunk) * step
        u = retention.enter(w) * _per_matrix(rule, kept, state.weights, i) + step
        weights.append(_end(rule, u, state, i))
    after = _with(state, weights, [tuple(x) for x in stepped])
    after = after._replace(pending=empty_pending(state.weights, kept))
    if ends is True:
        return y, after
    return y, after._replace(
        weights=where(ends, after.weights, state.weights),
        momentum=where(ends, after.momentum, state.momentum),
        second=where(ends, after.second, state.second),
        pending=where(ends, after.pending, pending),
    )


def _per_matrix(rule: Rule, keep: Tensor, weights: Matrices, i: int) -> Tensor:
    """What is kept ``[batch, heads]``, or by channel, in the shape of matrix ``i``."""
    if keep.dim() == 3:
        return keep[..., rule.channels(weights)[i]].unsqueeze(-2)
    return keep.view(*keep.shape, *[1] * (weights[i].dim() - 2))


def _end(rule: Rule, u: Tensor, state: LearnerState, i: int) -> Tensor:
    """The weights of matrix ``i`` that the state holds after a move to ``u``."""
    return rule.retention.leave(rule.retention.project(u, state.initial[i] if rule.retention.uses_initial else None))


def empty_pending(weights: Matrices, kept: Tensor) -> tuple[Tensor, ...]:
    """``LearnerState.pending`` at the start of a chunk; ``kept`` has the shape of the product of what is kept."""
    rows = weights[0].new_zeros(weights[0].shape[:2])
    return (*map(torch.zeros_like, weights), rows, torch.zeros_like(rows), torch.ones_like(kept))


def project_queries(q: Tensor, k: Tensor, projection: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """``Pi_t q_t`` with ``Pi_t`` the sum of ``k k^T / |k|^2`` up to ``t`` (TNT), and the sum after the last token.

    ``q, k``: ``[batch, heads, time, d_in]``, of any length. ``projection``: the sum before. ``valid``:
    ``[batch, time]``.
    """
    unit = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    if valid is not None:
        unit = unit * valid[:, None, :, None]
    finite = unit.isfinite().all(-1, keepdim=True)  # zero times NaN would reach earlier queries
    lost, unit = finite.logical_not().cumsum(2) > 0, unit.masked_fill(~finite, 0.0)
    time = q.shape[2]
    size = max(min(time, 64), 1)  # pieces, whose sums are added up; none without tokens
    pieces = -(-time // size)
    q, unit = (F.pad(x, (0, 0, 0, pieces * size - time)).unflatten(2, (pieces, size)) for x in (q, unit))
    sums = torch.cat([projection.unsqueeze(2), unit.mT @ unit], 2).cumsum(2)
    y = q @ sums[:, :, :-1] + (q @ unit.mT).tril() @ unit
    y, last = y.flatten(2, 3)[:, :, :time], sums[:, :, -1]
    return y.masked_fill(lost, math.nan), last.masked_fill(lost.any(2, keepdim=True), math.nan)

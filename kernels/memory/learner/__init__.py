"""The family of learners: memories that differ in network, objective, retention, optimizer and the like.

``docs/learners.md`` has the equations and the published rules by name.

=================  ====================================================================================================
``parts.py``       the interfaces of the parts, and the catalogues in which they are registered
``networks.py``    memory networks, and features of keys and queries; ``module.py``: any ``torch.nn.Module``
``objectives.py``  what a step decreases
``updates.py``     retentions and optimizers
``rule.py``        the parts together, and which go together
``state.py``       the state, and what a learner is given
``rows.py``        rows, resets and documents: which run side by side, and which by the fused operation
``walk.py``        a sequence chunk by chunk: phases, masks, windows
``chunks.py``      the equations of a chunk; ``coefficients.py``: its gates as matrices
=================  ====================================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...custom_op import OpaqueOperation
from ...dispatch import (
    BackendError,
    expect_tensors,
    full_precision,
    half_dtype,
    needs_grad,
    shows_values,
    transforming,
)
from ..state import MemoryState
from . import networks, objectives, updates  # noqa: F401  (they register the parts)
from .parts import (
    CATALOGUES,
    Features,
    Network,
    Objective,
    Optimizer,
    Retention,
    make_part,
    register_features,
    register_network,
    register_objective,
    register_optimizer,
    register_retention,
)
from .rows import by_place, fits, run_documents, run_row, run_stretches
from .rule import Rule, make_rule, rule_of_text
from .state import LearnerState, Writes
from .walk import Measured, read, start
from .walk import measure as measure_writes

__all__ = [
    "CATALOGUES", "Features", "LearnerState", "Network", "Objective", "Optimizer", "Retention", "Rule", "learn",
    "learn_by", "learn_writes", "make_part", "make_rule", "measure", "read", "register_features",
    "register_network", "register_objective", "register_optimizer", "register_retention", "start",
]  # fmt: skip


def learn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState | LearnerState,
    *,
    chunk: int = 16,
    network: Any = "mlp",
    activation: str | None = "gelu",
    norm: Tensor | None = None,
    objective: Any = "l2",
    optimizer: Any = "momentum",
    retention: Any = "scalar",
    window: int = 1,
    features: Any = None,
    read: str = "after",
    reset: int | None = None,
    keys: int = 1,
    query: str | None = None,
    steps: str = "one",
    gamma: Tensor | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    keep: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | LearnerState]:
    """Write every token into a memory, and read the memory at every token, by any rule of the family.

        S_t = eta_t S_{t-1} - theta_t sum_i gamma_i grad l(M_{a(t)}(k_i), v_i)      W_t = R(A_t(W_{t-1}) + P(S_t))
        y_t = M_t(q_t)

    The sum is over the last ``window`` writes, and ``M_{a(t)}`` the memory at the start of the chunk of token ``t``.
    With the default parts it is :func:`titans_memory`. Differentiable any number of times in every tensor.

    Args:
        q, k: ``[batch, time, heads, d_in]``; v: ``[batch, time, heads, d_out]``.
        theta, eta: step size and momentum decay, ``[batch, time, heads]``; ``eta=None``: no momentum.
        alpha: forgetting, ``[batch, time, heads]``; with ``retention="channel"``
            ``[batch, time, heads, n]``, one for each column of each matrix; ``None``: nothing is forgotten.
        state: ``MemoryState.fresh(weights)``, or the state of the call before.
        chunk: writes per chunk.
        network: ``"linear"``, ``"mlp"``, ``"gated_mlp"``, ``"factorised"``, ``"slots"``, a registered name, a mapping
            with its ``type``, or a ``torch.nn.Module``, whose parameters ``[batch, heads, ...]`` are the weights.
        activation: of the network; ``None``: its own choice.
        norm: ``None``, or a gain ``[heads, d_out]``: ``M(x) = x + LN(net(x)) * gain`` with eps 1e-6.
        objective: ``"l2"`` ``|M(k) - v|^2``, ``"l2_half"``, ``"dot"``, ``"lp"``, ``"huber"``, a name or a mapping.
        optimizer: ``"step"`` (``eta`` is not used), ``"momentum"``, ``"muon"``.
        retention: ``"none"`` (``alpha`` is not used), ``"scalar"``, ``"channel"``, ``"kl"``, ``"lq"``, ``"rows"``,
            ``"soft_threshold"``.
        window: writes whose gradients are in a step.
        features: ``None``, or ``{"type": "polynomial", "degree": 2}``.
        read: ``"after"`` the token was written, ``"before"``, or at the ``"anchor"``: the weights at the start of the
            chunk. A rule whose weights pass through a map of the whole matrix then moves once a chunk.
        reset: tokens after which weights go back to the initial ones and momentum to zero.
        keys: writes per token: ``k``, ``v`` and ``theta`` are ``[batch, time, keys, heads, ...]`` or
            ``[batch, time * keys, heads, ...]``. ``alpha`` acts on the first write of a token.
        query: ``"projected"``: queries are projected on the keys since the reset.
        steps: ``"each"``: ``theta`` is ``[batch, time, heads, matrices]``, a step size for each matrix of the network.
        gamma: weight of each token in every window, ``[batch, time, heads]``; or of each place in the window of each
            token, the token itself first, ``[batch, time, heads, window]``.
        clip, threshold: as of :func:`titans_memory`.
        mask: ``[batch, time]`` bool; a false token changes nothing and its output is zero.
        documents: ``[batch, time]`` int64, the document of each token; each begins from the initial weights, but the
            first of a row goes on from ``state``.
        keep, backend: as of :func:`titans_memory`; ``"general"`` takes every rule.

    Returns:
        ``y`` ``[batch, time, heads, d_out]`` in the dtype of ``q``, and the new state: a ``MemoryState``, or a
        ``LearnerState`` where the rule needs more.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen backend cannot take this rule; the message says why.
    """
    parts = dict(
        chunk=chunk, network=network, activation=activation, objective=objective, optimizer=optimizer,
        retention=retention, window=window, features=features, read=read, reset=reset, keys=keys, query=query,
        steps=steps, clip=clip, threshold=threshold,
    )  # fmt: skip
    return learn_by(
        make_rule(**parts), q, k, v, theta, eta, alpha, state, norm, mask, gamma=gamma, documents=documents, keep=keep,
        backend=backend,
    )  # fmt: skip


def learn_by(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState | LearnerState,
    norm: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: Tensor | None = None,
    parameter: Tensor | None = None,
    documents: Tensor | None = None,
    keep: int | None = None,
    ends: list[int] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState | LearnerState]:
    """:func:`learn` with a rule that is made already, as a block does.

    ``parameter``: of the objective, for each token, ``[batch, time, heads]``. ``ends``: the rows whose state is
    returned, as of :func:`titans_memory`, without ``documents``.
    """
    run = _compiled if torch.compiler.is_compiling() else _learn
    given = (q, k, v, theta, eta, alpha, state, norm, mask, gamma, parameter, documents, keep, ends, backend)
    return run(rule, None, *given)


def _learn(
    rule: Rule, half: str | None, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None,
    alpha: Tensor | None, state: MemoryState | LearnerState, norm: Tensor | None, mask: Tensor | None,
    gamma: Tensor | None, parameter: Tensor | None, documents: Tensor | None, keep: int | None,
    ends: Sequence[int] | None, backend: str,
) -> tuple[Tensor, MemoryState | LearnerState]:  # fmt: skip
    """``half``: of ``half_dtype``, where it was found outside of an operator, which sees no autocast."""
    ends = None if ends is None else list(ends)
    parameter = rule.objective.per_token if parameter is None else parameter
    gates = {"eta": eta, "alpha": alpha, "gamma": gamma, "norm": norm, _PARAMETER: parameter}
    expect_tensors("learn", ("q", q), ("k", k), ("v", v), ("theta", theta),
                   *[(name, x) for name, x in gates.items() if x is not None], one_dtype=False)  # fmt: skip
    for name, x in (("mask", mask), ("documents", documents)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"learn: {name}: expected a tensor, got {type(x).__name__}")
    writes, given, dtype = _writes(rule, q, k, v, theta, eta, alpha, gamma, parameter), type(state), q.dtype
    _check(rule, q, writes, state, norm, mask)
    is_of_memory = rule.options() is not None and fits(rule, norm) and not by_place(gamma)
    if backend not in ("auto", "general") and not is_of_memory:
        raise BackendError(f"learn: backend={backend!r}: takes no rule but that of titans_memory; 'general' takes all")
    compute = torch.promote_types(torch.promote_types(dtype, state.weights[0].dtype), torch.float32)
    writes, norm = writes.map(lambda x: x.to(compute)), None if norm is None else norm.to(compute)
    before = LearnerState(*state).map(lambda x: x.to(compute))
    n = rule.keys
    if n > 1:
        before = before._replace(position=before.position * n)
        mask, documents = (None if x is None else x.repeat_interleave(n, 1) for x in (mask, documents))
    row = functools.partial(run_row, rule, norm=norm, keep=keep, half=half or half_dtype(q), backend=backend)
    stretches = functools.partial(run_stretches, row, rule)
    # a gradient step is taken by autograd, whose graph would stay in results that need no gradients
    parts = [part if isinstance(part, tuple) else (part,) for part in before]
    held = [x for part in parts for x in part if isinstance(x, Tensor)]
    grad = transforming() or needs_grad(*writes, norm, *held) or (torch.is_grad_enabled() and rule.has_parameters)
    with full_precision(q.device.type), torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        if documents is None:
            y, after = stretches(writes, before, mask, ends)
        else:
            y, after = run_documents(stretches, rule, writes, before, mask, documents)
    if n > 1:
        y = y[:, n - 1 if rule.read == "after" else 0 :: n]
        after = after._replace(position=after.position // n)
    more = given is LearnerState or any(map(after.has, after._fields[4:]))
    return y.to(dtype), after if more else after.plain()


def _compiled(rule: Rule, half: str | None, *given: Any) -> tuple[Tensor, MemoryState | LearnerState]:
    """One operator for a compiler, which can neither trace loops over chunks nor values that decide about them.

    A rule with parts that have no name is left out of the graph.
    """
    q, tensors, state, parameter = given[0], rule.tensors, given[6], given[10]
    if rule.text is None or tensors is None:
        outside: tuple[Tensor, MemoryState | LearnerState] = torch.compiler.disable(_learn)(rule, half, *given)
        return outside
    learned = parameter is not None or rule.objective.per_token is not None
    parts = tuple(sorted(rule.parts_of_state))
    y, after = OPERATOR.call("learn", rule.text, tensors, parts, rule.window, learned, half_dtype(q), *given)
    more = isinstance(state, LearnerState) or any(map(after.has, after._fields[4:]))
    return y, after if more else after.plain()


def _operator(
    text: str, tensors: Any, parts: tuple[str, ...], window: int, learned: bool, half: str | None, *given: Any
) -> tuple[Tensor, LearnerState]:
    y, after = _learn(rule_of_text(text).with_tensors(tensors), half, *given)
    return y, LearnerState(*after)


def _outputs(
    text: str, tensors: Any, parts: tuple[str, ...], window: int, learned: bool, half: str | None, q: Tensor,
    k: Tensor, v: Tensor, theta: Tensor, eta: Any, alpha: Tensor | None, state: Any, norm: Any, mask: Any, gamma: Any,
    parameter: Any, documents: Tensor | None, keep: int | None, ends: Sequence[int] | None, backend: str,
) -> tuple[Tensor, LearnerState]:  # fmt: skip
    """Tensors of the shapes and dtypes of what :func:`_operator` returns."""
    channels = () if alpha is None else tuple(alpha.shape[3:])
    compute = torch.promote_types(torch.promote_types(q.dtype, state.weights[0].dtype), torch.float32)
    needed = parts if documents is None else (*parts, "initial")
    after = start(needed, window, LearnerState(*state), k.shape[-1], v.shape[-1], channels, learned)
    after = after.map(lambda x: x.to(compute))
    y = q.new_empty(*q.shape[:3], v.shape[-1])
    return y, after if ends is None else after.rows(lambda x: x[list(ends)])


OPERATOR = OpaqueOperation("learn", {"learn": _operator}, _outputs, [MemoryState, LearnerState], differentiates=True)


def learn_writes(
    rule: Rule,
    writes: Writes,
    state: MemoryState | LearnerState,
    norm: Tensor | None,
    mask: Tensor | None,
    keep: int | None = None,
    ends: list[int] | None = None,
) -> tuple[Tensor, MemoryState | LearnerState]:
    """:func:`learn_by` with the arguments of each token together."""
    q, k, v, theta, eta, alpha, gamma, parameter = writes
    return learn_by(
        rule, q, k, v, theta, eta, alpha, state, norm, mask, gamma=gamma, parameter=parameter, keep=keep,
        ends=ends,
    )  # fmt: skip


def measure(
    rule: Rule,
    writes: Writes,
    state: MemoryState | LearnerState,
    norm: Tensor | None,
    mask: Tensor | None,
    *,
    written: bool = True,
) -> Measured:
    """How surprising each token is when the sequence is written, ``[batch, time, heads]`` each; see ``Measured``.

    The sequence is written once more. ``written=False``: nothing is written, and all tokens are measured at the weights
    of the state. With several keys for each token, norms are those of all its gradients together.
    """
    n = rule.keys
    writes = _writes(rule, *writes)
    state = LearnerState(*state)
    if not written:
        writes = writes._replace(theta=torch.zeros_like(writes.theta), alpha=None)
        state = state._replace(momentum=tuple(map(torch.zeros_like, state.momentum)), anchor=state.weights)
    if n > 1:
        state = state._replace(position=state.position * n)
        mask = None if mask is None else mask.repeat_interleave(n, 1)

    def run(
        writes: Writes, state: LearnerState, mask: Tensor | None, ends: list[int] | None = None
    ) -> tuple[Tensor, LearnerState]:
        found = measure_writes(rule, writes, state, norm, mask)
        pick = lambda x: x if ends is None else x[ends]  # noqa: E731
        return torch.stack([x.to(found.surprise.dtype) for x in found], -1), state.rows(pick)

    surprise, error, suppressed = run_stretches(run, rule, writes, state, mask)[0].unbind(-1)
    found = Measured(surprise, error, suppressed > 0)
    if n == 1:
        return found
    each = [x.unflatten(1, (-1, n)) for x in found]
    return Measured(each[0].square().sum(2).sqrt(), each[1].sum(2), each[2].all(2))


_PARAMETER = "the parameter of the objective"


def _writes(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor | None, alpha: Tensor | None,
    gamma: Tensor | None, parameter: Tensor | None,
) -> Writes:  # fmt: skip
    """The arguments as one sequence of writes: with several keys per token, that many times as long."""
    eta = None if rule.optimizer.order == 0 else eta
    alpha = None if rule.retention.gates == "none" else alpha
    n = rule.keys
    if n == 1:
        return Writes(q, k, v, theta, eta, alpha, gamma, parameter)
    time = q.shape[1]

    def each(name: str, x: Tensor | None, dims: int) -> Tensor | None:
        if x is None:
            return None
        if x.dim() == dims + 1 and x.shape[1:3] == (time, n):
            return x.flatten(1, 2)
        if x.dim() == dims and x.shape[1] == time * n:
            return x
        if name not in "kv" and x.dim() == dims and x.shape[1] == time:
            return x.repeat_interleave(n, 1)
        raise ValueError(f"{name}: expected [batch, {time}, keys={n}, heads, ...] or [batch, {time * n}, heads, ...], "
                         f"got {list(x.shape)}")  # fmt: skip

    if alpha is not None and alpha.shape[1] == time:  # the first write of a token
        later = alpha.new_zeros(alpha.shape[0], time, n - 1, *alpha.shape[2:])
        alpha = torch.cat([alpha.unsqueeze(2), later], 2).flatten(1, 2)
    by_place = gamma is not None and (
        gamma.dim() == 5 or (gamma.dim() == 4 and gamma.shape[1:] != (time, n, q.shape[2]))
    )
    given: Any = {"theta": theta, "eta": eta, _PARAMETER: parameter}
    steps: Any
    steps, decay, parameter = (each(name, x, 3) for name, x in given.items())
    weight = each("gamma", gamma, 4 if by_place else 3)
    keys: Any = each("k", k, 4)
    values: Any = each("v", v, 4)
    return Writes(q.repeat_interleave(n, 1), keys, values, steps, decay, alpha, weight, parameter)


def _check(
    rule: Rule, q: Tensor, writes: Writes, state: MemoryState | LearnerState, norm: Tensor | None, mask: Tensor | None
) -> None:
    if not isinstance(state, (MemoryState, LearnerState)):
        raise TypeError(f"state: expected a MemoryState (MemoryState.fresh(weights)), got {type(state).__name__}")
    named = [(name, x) for name, x in zip((*Writes._fields[:-1], _PARAMETER), writes) if x is not None]
    weights = [(f"state.weights[{i}]", w) for i, w in enumerate(state.weights)]
    expect_tensors("learn", ("q", q), *weights, one_dtype=False)
    if q.dim() != 4:
        raise ValueError(f"q: expected [batch, time, heads, d_in], got {list(q.shape)}")
    batch, time, heads, width = writes.q.shape
    out = writes.v.shape[-1]
    channels = sum(w.shape[-1] for w in state.weights)
    alpha = (batch, time, heads, channels) if rule.retention.gates == "channel" else (batch, time, heads)
    gate = (batch, time, heads)
    expected = dict(q=(*gate, width), k=(*gate, width), v=(*gate, out), theta=gate, eta=gate, alpha=alpha, gamma=gate)
    if rule.steps == "each":
        expected["theta"] = (*gate, len(state.weights))
    if by_place(writes.gamma):
        expected["gamma"] = (*gate, rule.window)
    expected[_PARAMETER] = gate
    for name, x in named:
        if x.shape != expected[name]:
            raise ValueError(f"{name}: expected {list(expected[name])} as of q and state.weights, got {list(x.shape)}")
    for name, w in weights:
        if w.shape[:2] != (batch, heads):
            raise ValueError(f"{name}: expected [batch={batch}, heads={heads}, ...], got {list(w.shape)}")
    if writes.eta is None:
        for name, message in rule.problems("eta is None"):
            raise ValueError(f"{name}: {message}")
    lost = state.beyond(rule.parts_of_state) if isinstance(state, LearnerState) else []
    if lost:
        raise ValueError(f"state: holds {' and '.join(lost)}, which this rule does not know and would lose: expected a "
                         "state that this rule has made, or one at position 0")  # fmt: skip
    problem = rule.refuse_weights(state.weights, width, out)
    if (
        problem is None
        and type(rule.retention).refuse is not Retention.refuse
        and all(map(shows_values, state.weights))
    ):
        problem = rule.retention.refuse(state.weights)
    if problem is not None:
        raise ValueError(f"learn: {problem}")
    if norm is not None and (norm.shape != (heads, out) or width != out or rule.module is not None):
        raise ValueError(f"norm: expected a gain [{heads}, {out}], with d_in = d_out and a network that is no module, "
                         f"got {list(norm.shape)} and d_in={width}")  # fmt: skip
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, time // rule.keys)):
        raise ValueError(f"mask: expected bool {[batch, time // rule.keys]}, got {mask.dtype} {list(mask.shape)}")
    place = state.position
    if place.shape != (batch,) or place.dtype != torch.int64:
        raise ValueError(f"state.position: expected int64 [{batch}], got {place.dtype} {list(place.shape)}")
    if writes.eta is not None and len(state.momentum) != len(state.weights):
        raise ValueError(f"state.momentum: expected {len(state.weights)} tensors, got {len(state.momentum)}")

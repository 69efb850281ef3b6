"""Memories whose rule is not that of Titans: their parts, their gates, and the calls of the operation ``learn``."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import hardsigmoid, silu, softplus

from ..kernels.memory import LearnerState, MemoryState, Options, learner
from ..kernels.memory.learner import Rule, learn_writes, make_part, make_rule
from ..kernels.memory.learner.state import Writes
from ..kernels.norm_gate import l2_norm
from ..kernels.padding import last
from ..kernels.short_conv import convolve, query_key_value

EPS = 1e-6
"""In the unit length of queries and keys."""


def resolve(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a memory with ``optimizer``, ``retention``, ``momentum`` and ``forgetting`` in agreement."""
    fields = dict(fields)
    if fields["optimizer"] is None:
        fields["optimizer"] = "momentum" if fields["momentum"] else "step"
    if fields["retention"] is None:
        fields["retention"] = "scalar" if fields["forgetting"] else "none"
    fields["momentum"] = fields["momentum"] and make_part("optimizer", fields["optimizer"]).order > 0
    fields["forgetting"] = fields["forgetting"] and make_part("retention", fields["retention"]).gates != "none"
    fields["retrieve"] = fields["read"] or fields["retrieve"]
    return fields


def rule_of(fields: dict[str, Any]) -> Rule:
    """The rule of the fields of a memory. Raises ``ValueError`` for parts that do not go together."""
    fields = resolve(fields)
    names = ("network", "activation", "objective", "optimizer", "retention", "window", "features", "reset", "keys",
             "query", "steps", "clip", "threshold", "chunk")  # fmt: skip
    return make_rule(read=fields["retrieve"], **{name: fields[name] for name in names})


def problems(fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """``(field, message)`` for parts that do not go together."""
    if fields["read"] is not None and fields["retrieve"] not in ("after", fields["read"]):
        yield "read", f"is another name of retrieve, which is {fields['retrieve']!r}: give one of them"
        return
    try:
        given, rule = resolve(fields), rule_of(fields)
    except ValueError as error:
        field, _, message = str(error).partition(": ")
        yield field, message
        return
    optimizer, retention = rule.optimizer, rule.retention
    if not given["momentum"]:
        yield from rule.problems("momentum is false: add momentum: true")
    if optimizer.order == 1 and optimizer.linear and not given["momentum"]:
        yield "optimizer", "is steps with momentum, and momentum is false: add momentum: true, or leave optimizer out"
    if fields["learn_momentum"] and not given["momentum"]:
        yield "learn_momentum", "there is no momentum to learn: momentum is false, or the optimizer has none"
    if retention.gates != "none" and retention.linear and not (retention.linked or given["forgetting"]):
        yield "retention", "only decays weights, and forgetting is false: add forgetting: true, or leave retention out"
    if fields["gates"] == "chunk" and fields["keys"] > 1:
        yield "gates", "of a chunk need one key for each token, because chunks count writes"


def gate_sizes(rule: Rule, shapes: list[tuple[int, int]], momentum: bool, forgetting: bool) -> dict[str, int]:
    """The number of gates of each kind for each token and head, in the order of ``controls``."""
    sizes = {"theta": len(shapes) if rule.steps == "each" else rule.keys}
    if momentum:
        sizes["eta"] = 1
    if forgetting:
        sizes["alpha"] = sum(width for _, width in shapes) if rule.retention.gates == "channel" else 1
    if rule.window > 1:
        sizes["gamma"] = 1
    if rule.objective.learned:
        sizes["parameter"] = 1
    return sizes


def inputs(
    memory: Any, projected: Tensor, raw: Tensor, history: Tensor | None, length: Tensor | None
) -> tuple[Writes, Tensor | None]:
    """What the operation is given, from the results of ``qkv`` and ``controls``; and the next convolution's history."""
    rule, heads = memory.rule, memory.heads
    if rule.keys == 1:
        q, k, v, history = query_key_value(projected, memory.convolution, history, heads, length)
    else:
        projected, history = convolved(projected, memory.convolution, history, length)
        parts = silu(projected).unflatten(-1, (1 + 2 * rule.keys, heads, -1))
        qk = l2_norm(parts[:, :, : 1 + rule.keys], EPS)
        q, k, v = qk[:, :, 0], qk[:, :, 1:], parts[:, :, 1 + rule.keys :]
    sigmoid = hardsigmoid if memory.gating == "hard_sigmoid" else torch.sigmoid
    found: dict[str, Tensor] = {}
    sizes = memory.gate_sizes
    for (name, count), part in zip(sizes.items(), raw.split([heads * count for count in sizes.values()], dim=-1)):
        gate = softplus(part) if name == "parameter" else sigmoid(part)
        if name == "theta":
            gate = gate * memory.max_step
            if count > 1:
                gate = gate.unflatten(-1, (heads, count) if rule.steps == "each" else (count, heads))
            found[name] = gate.unsqueeze(-1) if count == 1 and rule.steps == "each" else gate
        elif name == "alpha" and rule.retention.gates == "channel":
            found[name] = gate.unflatten(-1, (heads, count))
        else:
            found[name] = gate
    return Writes(
        q, k, v, found["theta"], *(found.get(name) for name in ("eta", "alpha", "gamma", "parameter"))
    ), history


def gates_of_chunks(
    raw: Tensor, gates: Tensor, position: Tensor, chunk: int, length: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each token's gates as those of the first token of its chunk, and those of the current chunk.

    ``raw``: gates before the sigmoid, ``[batch, time, gates * heads]``. ``gates``: those of the chunk before.
    """
    # causal, and independent of how the sequence is split
    time = torch.arange(raw.shape[1], device=raw.device)
    first = time - (position[:, None] + time) % chunk
    index = first.clamp(min=0).unsqueeze(-1).expand_as(raw)
    raw = torch.where((first >= 0).unsqueeze(-1), raw.gather(1, index), gates.unsqueeze(1))
    past = torch.cat([gates.unsqueeze(1), raw], dim=1)  # those of the state, if there is no new token
    return raw, past[:, -1] if length is None else last(past, length + 1, 1)[:, 0]


def convolved(
    projected: Tensor, weight: Tensor | None, history: Tensor | None, length: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The causal convolution of ``projected`` after ``history``, and the next history; as they are without weights."""
    if weight is None or history is None:
        return projected, history
    past, before = torch.cat((history, projected), dim=1), history.shape[1]
    if before:
        history = past[:, -before:].clone() if length is None else last(past, length + before, before)
    return convolve(past, weight), history


def start(memory: Any, state: MemoryState) -> MemoryState | LearnerState:
    """The state before the first token, with every part that the rule of ``memory`` needs."""
    rule, width = memory.rule, memory.inner // memory.heads
    channels = (memory.gate_sizes["alpha"],) if memory.forgetting and rule.retention.gates == "channel" else ()
    weights = tuple(map(rule.retention.initial, state.weights))
    state = state._replace(weights=weights, anchor=weights)
    given, learned = LearnerState(*state), rule.objective.learned
    made = learner.start(rule.parts_of_state, rule.window, given, width, width, channels, learned)
    return made if any(map(made.has, made._fields[4:])) else state


def recall(memory: Any, q: Tensor, state: MemoryState | LearnerState) -> Tensor:
    """The response to queries at the weights of the state."""
    return learner.read(rule_with_parameters(memory), q, state, memory.norm_gain)


def learn(
    memory: Any, writes: Writes, state: MemoryState | LearnerState, mask: Tensor | None, ends: list[int] | None
) -> tuple[Tensor, MemoryState | LearnerState]:
    """The operation, by the rule of ``memory``. ``ends``: the rows whose state is returned, by default all."""
    return learn_writes(rule_with_parameters(memory), writes, state, memory.norm_gain, mask, memory.keep, ends)


def rule_with_parameters(memory: Any) -> Rule:
    """The rule, whose features have the learned coefficients."""
    rule: Rule = memory.rule
    if rule.features is not None and memory.coefficients is not None:
        features: Any = copy.copy(rule.features)
        features.coefficients = memory.coefficients.to(memory.output_gain.dtype)
        return replace(rule, features=features)
    return rule


def options(memory: Any) -> Any:
    """The options of the operation, or the rule where it is not that of Titans."""
    if memory.rule is not None:
        return rule_with_parameters(memory)
    return Options(memory.chunk, memory.activation, memory.clip, memory.retrieve, memory.keep, None, memory.threshold)

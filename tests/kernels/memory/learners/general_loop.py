"""The recurrence of ``learn`` as a plain loop: row by row, token by token, inner gradients from autograd.

It follows the definition of the operation and shares no code with it. Masked tokens are left out of their row, and a
document is a row of its own, so neither needs a case in the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Weights = tuple[Tensor, ...]

ACTIVATIONS = {"identity": lambda z: z, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}
MAPS_OF_A_MATRIX = ("muon", "rows", "soft_threshold")
"""Parts that are not sums over tokens. Where nothing reads inside a chunk, they move the weights once for each."""


@dataclass(frozen=True)
class Row:
    """The memory of one row. Its tensors have the heads first."""

    weights: Weights
    momentum: Weights
    anchor: Weights
    initial: Weights
    position: int
    recent: tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], ...]
    """Key, value, Huber threshold and gamma of the last writes, oldest first."""
    projection: Tensor
    pending: tuple[tuple[Tensor, Weights, Tensor | None, Weights], ...]
    """Of each write since the last move: step size, gradient, momentum decay, and what is kept of the weights."""

    @classmethod
    def fresh(cls, weights: Weights, d_in: int, orders: int = 1) -> Row:
        zeros = tuple(torch.zeros_like(w) for w in weights) * orders
        projection = weights[0].new_zeros(weights[0].shape[0], d_in, d_in)
        return cls(weights, zeros, weights, weights, 0, (), projection, ())


@torch.enable_grad()  # the learning is differentiation
def learn_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: Weights | Sequence[Row],
    *,
    keys: int = 1,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, list[Row]]:
    """The outputs ``[batch, time, heads, d_out]`` and the rows after the last token.

    ``state``: initial weights ``[batch, heads, ...]``, or the rows that an earlier call has returned.
    """
    batch, time, heads, d_in = q.shape
    settings = Settings(**options)
    objective = named(options.get("objective", "l2"))
    delta = objective.get("delta")

    def per_write(x: Tensor | None, dims: int) -> Tensor | None:
        """``[batch, time, keys, heads, ...]`` of what is given for each write, or once for all writes of a token."""
        if x is None:
            return None
        if x.dim() == dims + 4:
            return x
        if keys > 1 and x.shape[1] == time * keys:
            return x.view(batch, time, keys, *x.shape[2:])
        return x.unsqueeze(2).expand(batch, time, keys, *x.shape[2:])

    if not isinstance(delta, Tensor):
        delta = None if delta is None else torch.full((batch, time, heads), delta, dtype=q.dtype)
    given = [
        q, per_write(k, 1), per_write(v, 1), per_write(theta, 0), eta, alpha, per_write(gamma, 0), per_write(delta, 0)
    ]  # fmt: skip
    orders = settings.optimizer.get("order", 1)
    begins, outputs, rows = isinstance(state[0], Tensor), [], []
    for b in range(batch):
        row = Row.fresh(tuple(w[b] for w in state), d_in, orders) if begins else state[b]
        y = q.new_zeros(time, heads, v.shape[-1])
        tokens = torch.arange(time) if mask is None else mask[b].nonzero().flatten()
        before = None if documents is None or not len(tokens) else documents[b, tokens[0]]
        for t in tokens.tolist():
            if documents is not None and documents[b, t] != before:
                before, row = documents[b, t], Row.fresh(row.initial, d_in, orders)
            read, row = settings.token(row, *[None if x is None else x[b, t] for x in given])
            y = torch.cat([y[:t], read[None], y[t + 1 :]])
        outputs.append(y)
        rows.append(row)
    return torch.stack(outputs), rows


def fields(rows: Sequence[Row], chunk: int, keys: int = 1) -> tuple[Weights, Weights, Weights, Tensor]:
    """Weights, momentum, anchor and position as the operation returns them."""
    anchors = [row.weights if row.position * keys % chunk == 0 else row.anchor for row in rows]

    def stacked(parts: Sequence[Weights]) -> Weights:
        return tuple(torch.stack(tensors) for tensors in zip(*parts))

    position = torch.tensor([row.position for row in rows])
    return stacked([row.weights for row in rows]), stacked([row.momentum for row in rows]), stacked(anchors), position


def named(part: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A part as a dictionary with its name as ``type``."""
    return dict(part) if isinstance(part, Mapping) else {"type": part}


class Settings:
    """The parts of a learner, and what they do with one token."""

    def __init__(
        self,
        chunk: int = 16,
        network: str | nn.Module = "mlp",
        activation: str = "gelu",
        norm: Tensor | None = None,
        objective: Any = "l2",
        optimizer: Any = "momentum",
        retention: Any = "scalar",
        window: int = 1,
        features: Any = None,
        read: str = "after",
        reset: int | None = None,
        query: str | None = None,
        clip: float | None = None,
        threshold: float | None = None,
    ) -> None:
        self.chunk, self.network, self.activation, self.norm = chunk, network, ACTIVATIONS[activation], norm
        self.objective, self.optimizer, self.retention = named(objective), named(optimizer), named(retention)
        self.window, self.features, self.read, self.reset, self.query = window, named(features), read, reset, query
        self.clip, self.threshold = clip, threshold
        parts = (self.optimizer["type"], self.retention["type"])
        self.once_a_chunk = read == "anchor" and any(part in MAPS_OF_A_MATRIX for part in parts)

    def token(
        self,
        row: Row,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | None,
        alpha: Tensor | None,
        gamma: Tensor | None,
        delta: Tensor | None,
    ) -> tuple[Tensor, Row]:
        """Write a token's keys and values ``[keys, heads, ...]`` and read its query ``[heads, d_in]``."""
        if self.reset is not None and row.position % self.reset == 0:
            row = replace(Row.fresh(row.initial, q.shape[-1], len(row.momentum) // len(row.weights)),
                          position=row.position)  # fmt: skip
        before, anchor = row.weights, None
        for j in range(len(k)):
            if (row.position * len(k) + j) % self.chunk == 0:
                row = replace(row, anchor=row.weights)
            anchor = row.anchor if anchor is None else anchor
            forget = alpha if j == 0 else None
            write = k[j], v[j], theta[j], eta, forget, *[None if x is None else x[j] for x in (gamma, delta)]
            row = self.write(row, *write)
            if self.once_a_chunk and (row.position * len(k) + j + 1) % self.chunk == 0:
                row = self.move_once(row)
        row = replace(row, position=row.position + 1)
        x = q if self.query is None else torch.einsum("hij,hj->hi", row.projection, q)
        at = {"after": row.weights, "before": before, "anchor": anchor}[self.read]
        return self.predict(self.visible(at), x), row

    def write(
        self,
        row: Row,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        eta: Tensor | None,
        alpha: Tensor | None,
        gamma: Tensor | None,
        delta: Tensor | None,
    ) -> Row:
        """Write one key and value, all ``[heads, ...]``."""
        recent = (*row.recent, (k, v, gamma, delta))[-self.window :]
        unit = k.unsqueeze(-1) / (k.square().sum(-1, keepdim=True) + 1e-6).unsqueeze(-1)
        row = replace(row, recent=recent, projection=row.projection + unit * k.unsqueeze(-2))
        if self.threshold is not None:
            anchor = differentiable(self.visible(row.anchor))
            written = (total_norm(self.gradient(anchor, k, v, delta, clip=False)) >= self.threshold).to(theta.dtype)
            theta, alpha = theta * written, None if alpha is None else alpha * like(written, alpha)
        keep, at = self.keep(row.weights, alpha), self.visible(row.anchor)
        if self.retention.get("first"):
            at = tuple(share * w for share, w in zip(keep, at))
        at = differentiable(at)
        gradient = None
        for key, value, weight, bound in recent:
            one = self.gradient(at, key, value, bound)
            if weight is not None:
                one = tuple(g * like(weight, g) for g in one)
            gradient = one if gradient is None else tuple(a + b for a, b in zip(gradient, one))
        if self.once_a_chunk:
            return replace(row, pending=(*row.pending, (theta, gradient, eta, keep)))
        return self.move(row, theta, gradient, eta, keep)

    def gradient(self, at: Weights, k: Tensor, v: Tensor, delta: Tensor | None, clip: bool = True) -> Weights:
        """The gradient of one write's loss with respect to the weights ``at``."""
        p = self.predict(at, k)
        gradient = torch.autograd.grad(p, at, self.error(p, v, delta), create_graph=True)
        if clip and self.clip is not None:
            share = (self.clip / total_norm(gradient)).clamp(max=1)
            gradient = tuple(g * like(share, g) for g in gradient)
        return gradient

    def error(self, p: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        """The derivative of the objective with respect to the prediction ``p``."""
        kind, r = self.objective["type"], p - v
        if kind == "l2":
            return 2 * r
        if kind == "l2_half":
            return r
        if kind == "dot":
            return -v
        if kind == "lp":
            power, smooth = self.objective["p"], self.objective.get("smooth")
            sign = r.sign() if smooth is None else torch.tanh(smooth * r)
            return power * r.abs() ** (power - 1) * sign
        assert kind == "huber" and delta is not None
        delta = delta.unsqueeze(-1)
        if self.objective.get("form", "norm") == "elementwise":
            return torch.minimum(torch.maximum(r, -delta), delta)
        return torch.where(r.norm(dim=-1, keepdim=True) <= delta, 2 * r, delta * r.sign())

    def move(self, row: Row, theta: Tensor, gradient: Weights, eta: Tensor | None, keep: Weights) -> Row:
        """The momentum and the weights after a gradient."""
        muon = self.optimizer["type"] == "muon"
        update = muon and self.optimizer.get("scale", "gradient") == "update"
        layers = len(row.weights)
        step = tuple(-g if update else -like(theta, g) * g for g in gradient)
        momentum = row.momentum
        if self.optimizer["type"] != "step" and eta is not None:
            first = tuple(like(eta, s) * s + g for s, g in zip(momentum[:layers], step))
            second = tuple(like(eta, s) * s + g for s, g in zip(momentum[layers:], first))
            momentum = first + second
            step = momentum[-layers:]
        if muon:
            step = tuple(newton_schulz(s, self.optimizer.get("steps", 5)) for s in step)
            if update:
                step = tuple(like(theta, s) * s for s in step)
        weights = tuple(self.retain(*parts) for parts in zip(row.weights, keep, step, row.initial))
        return replace(row, weights=weights, momentum=momentum)

    def move_once(self, row: Row) -> Row:
        """One step for the writes since the last one."""
        thetas, gradients, etas, keeps = zip(*row.pending)
        update = self.optimizer.get("scale", "gradient") == "update"
        if update:
            theta, parts = torch.stack(thetas).mean(0), gradients
        else:  # theta is inside the sum
            theta = torch.ones_like(thetas[0])
            parts = [tuple(like(t, g) * g for g in gradient) for t, gradient in zip(thetas, gradients)]
        gradient = tuple(sum(layer) for layer in zip(*parts))
        eta = None if etas[0] is None else torch.stack(etas).mean(0)
        keep = tuple(math.prod(layer[1:], start=layer[0]) for layer in zip(*keeps))
        return replace(self.move(row, theta, gradient, eta, keep), pending=())

    def keep(self, weights: Weights, alpha: Tensor | None) -> Weights:
        """The factors of the earlier weights."""
        if alpha is None or self.retention["type"] == "none":
            return tuple(w.new_ones(len(w), *[1] * (w.dim() - 1)) for w in weights)
        if self.retention["type"] == "channel":
            widths = [w.shape[-1] for w in weights]
            return tuple(1 - part.unsqueeze(-2) for part in alpha.split(widths, dim=-1))
        return tuple(1 - like(alpha, w) for w in weights)

    def retain(self, weight: Tensor, keep: Tensor, step: Tensor, initial: Tensor) -> Tensor:
        kind = self.retention["type"]
        if kind == "kl":
            return torch.softmax(keep * weight.log() + step, dim=-1)
        moved = keep * weight + step
        if kind == "rows":
            norms = initial.norm(dim=-1, keepdim=True)
            return moved * (norms / moved.norm(dim=-1, keepdim=True).clamp(min=1e-5))
        if kind == "soft_threshold":
            return moved.sign() * (moved.abs() - self.retention["by"]).clamp(min=0)
        return moved

    def visible(self, weights: Weights) -> Weights:
        """The weights with which the network runs."""
        if self.retention["type"] != "lq":
            return weights
        power = self.retention.get("q", 4)

        def norm(w: Tensor) -> Tensor:
            return (w.abs() ** power).sum((-2, -1), keepdim=True) ** (1 / power)

        return tuple(w / norm(w) ** (power - 2) for w in weights)

    def predict(self, weights: Weights, x: Tensor) -> Tensor:
        """``M(x)``, ``[heads, d_out]``."""
        y = self.run(weights, self.expand(x))
        if self.norm is None:
            return y
        return x + layer_norm(y) * self.norm

    def expand(self, x: Tensor) -> Tensor:
        """``phi(x)``."""
        if self.features["type"] is None:
            return x
        degree, coefficients = self.features["degree"], self.features.get("coefficients")
        if coefficients is None:
            power = 1.0 if self.features.get("form", "elementwise") == "elementwise" else 0.5
            coefficients = [math.factorial(i) ** -power for i in range(degree + 1)]
        if self.features.get("form", "elementwise") == "elementwise":
            return sum(coefficients[i] * x**i for i in range(1, degree + 1))
        power, parts = torch.ones_like(x[..., :1]), []
        for coefficient in coefficients[: degree + 1]:
            parts.append(coefficient * power)
            power = (power.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
        return torch.cat(parts, -1)

    def run(self, weights: Weights, x: Tensor) -> Tensor:
        """The network without features, residual and norm."""
        if isinstance(self.network, nn.Module):
            names = [name for name, _ in self.network.named_parameters()]
            heads = range(len(x))
            return torch.stack(
                [functional_call(self.network, dict(zip(names, [w[h] for w in weights])), (x[h],)) for h in heads]
            )
        if self.network == "gated_mlp":
            return times(weights[1], self.activation(times(weights[0], x)) * times(weights[2], x))
        if self.network == "slots":
            return times(weights[1], torch.softmax(times(weights[0], x) / x.shape[-1] ** 0.5, dim=-1))
        if self.network == "factorised":
            layers = [weights[l : l + 2] for l in range(0, len(weights), 2)]
        else:
            layers = [(w,) for w in weights]
        for l, matrices in enumerate(layers):
            x = self.activation(x) if l else x
            for matrix in matrices:
                x = times(matrix, x)
        return x


def layer_norm(x: Tensor) -> Tensor:
    """Written out, because third derivatives of ``torch.nn.functional.layer_norm`` are wrong (2.13)."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def times(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("hoi,hi->ho", matrix, x)


def like(x: Tensor, tensor: Tensor) -> Tensor:
    """``[heads]`` in front of the other dimensions of a tensor."""
    return x.view(-1, *[1] * (tensor.dim() - 1))


def differentiable(weights: Weights) -> Weights:
    """The same weights, with respect to which a gradient can be taken."""
    return tuple(w if w.requires_grad else w.detach().requires_grad_() for w in weights)


def total_norm(gradient: Weights) -> Tensor:
    """``[heads]``: the norm of all matrices of a head together."""
    return torch.cat([g.flatten(1) for g in gradient], dim=1).norm(dim=1)


def newton_schulz(s: Tensor, steps: int) -> Tensor:
    x = s / (s.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.transpose(-2, -1)
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.transpose(-2, -1)

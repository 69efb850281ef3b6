"""Asking a memory without teaching it (eq. 15): the network applied to queries at fixed weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .. import triton_runtime as triton
from ..dispatch import Backend, Operation, expect_tensors, full_precision
from ..dispatch import half_dtype as half
from ..dispatch import is_plain_cpu_tensor as plain
from ..dispatch import needs_grad as tracks
from .activation import ACTIVATIONS
from .read_cpu import native_reading, refuse_reading
from .read_torch import torch_reading
from .reference import memory_network
from .step_cpu import native_read, refuse_token

_Path: TypeAlias = Callable[[Tensor, tuple[Tensor, ...], str, Tensor | None, str | None], Tensor]


def read_memory(
    q: Tensor,
    weights: tuple[Tensor, ...],
    activation: str = "gelu",
    norm: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``M(q)`` for every query on its own.

    Args:
        q: ``[batch, time, heads, d_in]``.
        weights: per layer ``[batch, heads, out, in]``.
        norm: ``None``, or the gain ``[heads, d_out]`` of ``M(x) = x + LN(net(x)) * gain``.

    Returns:
        ``[batch, time, heads, d_out]`` in the dtype of ``q``; computed in the weights' dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen path cannot take these arguments; the message says why.
    """
    _check(q, weights, activation, norm)
    compute = weights[0].dtype
    run = READING.choose(
        backend,
        device=q.device.type,
        dtype=compute,
        time=q.shape[1],
        layers=len(weights),
        width=max(q.shape[3], weights[-1].shape[2]),
        plain=plain(q, norm, *weights),
        grad=tracks(q, norm, *weights),
    )
    gain, narrow = norm if norm is None or norm.dtype == compute else norm.to(compute), half(q)
    with full_precision(q.device.type):
        y: Tensor = run(q, weights, activation, gain, narrow)
        return y


def _check(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> None:
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError("read_memory: weights: expected a tuple of [batch, heads, out, in], one for each layer")
    named: list[tuple[str, Tensor]] = [("q", q), *((f"weights[{layer}]", w) for layer, w in enumerate(weights))]
    if norm is not None:
        named.append(("norm", norm))
    expect_tensors("read_memory", *named, one_dtype=False)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"read_memory: activation: expected one of {names}, got {activation!r}")
    if q.dim() != 4:
        raise ValueError(f"read_memory: q {list(q.shape)}: expected [batch, time, heads, d_in]")
    batch, _, heads, width = q.shape
    for layer, w in enumerate(weights):
        if w.dim() != 4 or w.shape[0] != batch or w.shape[1] != heads or w.shape[3] != width:
            raise ValueError(
                f"read_memory: weights[{layer}] {list(w.shape)}: expected [{batch}, {heads}, out, {width}] "
                f"to go with q {list(q.shape)}"
            )
        if w.dtype != weights[0].dtype:
            raise TypeError(f"read_memory: weights[{layer}] is {w.dtype}: expected {weights[0].dtype} as weights[0]")
        width = w.shape[2]
    if norm is not None and (norm.shape != (heads, width) or width != q.shape[3]):
        raise ValueError(f"read_memory: norm {list(norm.shape)}: expected [{heads}, {width}], as wide as q")


def _widened(path: Callable[..., Tensor]) -> _Path:
    """A path that multiplies in the weights' dtype. What others see of it is the queries', and so do compilers."""

    @functools.wraps(path)
    def run(
        q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None = None
    ) -> Tensor:
        compute = weights[0].dtype
        if q.dtype == compute:
            return path(q, weights, activation, norm)
        return path(q.to(compute), weights, activation, norm).to(q.dtype)

    return run


def _triton(
    q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None = None
) -> Tensor:
    from .triton.read import triton_reading

    return triton_reading(q, weights, activation, norm, half)


def _reference(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None) -> Tensor:
    return torch.stack([memory_network(weights, x, activation, norm) for x in q.unbind(1)], dim=1)


READING = Operation(
    "memory_read",
    [
        Backend("native_step", _widened(native_read), refuse_token, opaque=True),
        Backend("native", _widened(native_reading), refuse_reading, opaque=True),
        # this one widens what it loads
        Backend("triton", _triton, triton.refuse_memory, opaque=True),
        Backend("torch", _widened(torch_reading)),
        Backend("reference", _widened(_reference)),
    ],
    lambda q, weights, *others: q.new_empty(*q.shape[:3], weights[-1].shape[2]),
)

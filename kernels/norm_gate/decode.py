"""A gated hidden layer for a few tokens, ``down(silu(gate(x)) * inner)``, and norms and gates prepared for decoding.

The gated layer is a feed-forward network, or the output of a memory. For many tokens it is three operations; for a few,
each of these costs more to start than to run, and the C kernel (decode_cpu.c) does all of it. Nothing here records
gradients. A ``prepare_*`` function returns a function for many calls on tensors of one shape, which writes every result
into one tensor, or ``None`` where the C kernel does not run; the weights must stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, threads_for
from ..dispatch import Backend, Operation, can_prepare, use_decode_kernel
from ..linear import project
from . import FORWARD, GATE_OPERATION, RMS_NORM, rms_norm
from .form import GATE, NORM, Form

EPS = 1e-6


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor, *, backend: str = "auto") -> Tensor:
    """``down (silu(gate x) * (up x))`` for a few tokens: where ``use_decode_kernel(x, gate_up, down)``.

    ``x``: ``[..., in]``. ``gate_up``: ``[2 * hidden, in]``, first the gate. ``down``: ``[out, hidden]``.
    """
    hidden = gate_up.shape[0] // 2
    if gate_up.shape != (2 * hidden, x.shape[-1]) or down.shape[1] != hidden:
        raise ValueError(
            f"feed_forward: gate_up {list(gate_up.shape)}, down {list(down.shape)}: expected [2 * hidden, "
            f"{x.shape[-1]}] and [out, hidden]"
        )
    run = _gated_projection.choose(backend, device=x.device.type, dtype=x.dtype)
    return run(x, gate_up[:hidden], gate_up[hidden:], down, None, None)


def gated_output(
    answer: Tensor, gain: Tensor, x: Tensor, gate: Tensor, down: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``down (silu(gate x) * rms_norm(answer) gain)`` for a few tokens: where ``use_decode_kernel(x, gate, down)``.

    ``answer``: ``[..., heads, dim]``, each head normalized on its own. ``gain``: ``[heads, dim]``. ``x``:
    ``[..., in]``. ``gate``: ``[heads * dim, in]``. ``down``: ``[out, heads * dim]``.
    """
    run = _gated_projection.choose(backend, x, answer, gain)
    return run(x, gate, None, down, answer, gain)


def prepare_feed_forward(gate_up: Tensor, down: Tensor, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """:func:`feed_forward` of ``x`` ``[*shape, in]``."""
    run = _prepare_gated_projection(gate_up, down, None, shape)
    return None if run is None else lambda x: run(x, None)


def prepare_gated_output(
    gain: Tensor, gate: Tensor, down: Tensor, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """:func:`gated_output` of an answer ``[*shape, heads, dim]`` and ``x`` ``[*shape, in]``."""
    run = _prepare_gated_projection(gate, down, gain, shape)
    return None if run is None else lambda answer, x: run(x, answer)


def prepare_rms_norm(gain: Tensor, shape: tuple[int, ...], eps: float = 1e-6) -> Callable[[Tensor], Tensor] | None:
    """``rms_norm`` of ``x`` ``[*shape, dim]``, with a gain ``[dim]``."""
    if not can_prepare(gain) or not _is_native(RMS_NORM, gain):
        return None
    dim = gain.numel()
    run = _prepare_gated(Form(NORM, 1, dim, dim, eps), gain.new_empty((*shape, dim)), gain, None)
    return lambda x: run(x, None)


def prepare_gate(
    gain_a: Tensor, gain_b: Tensor, shape: tuple[int, ...], eps: float = 1e-6
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """``gate`` of ``a`` and ``b`` ``[*shape, dim]``."""
    if not can_prepare(gain_a, gain_b) or not _is_native(GATE_OPERATION, gain_a, gain_b):
        return None
    dim = gain_a.numel()
    return _prepare_gated(Form(GATE, 1, dim, dim, eps), gain_a.new_empty((*shape, dim)), gain_a, gain_b)


def _is_native(operation: Operation, x: Tensor, *others: Tensor) -> bool:
    same = all(other.dtype == x.dtype for other in others)
    run = operation.choose("auto", device="cpu", dtype=x.dtype, same=same, plain=True)
    return run is operation.backends["native"].run


def _prepare_gated(
    form: Form, like: Tensor, gain_a: Tensor, gain_b: Tensor | None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    y, width = torch.empty_like(like), form.heads * form.dim
    call = FORWARD.prepare(
        like.dtype, 5, 2, form.kind, 1, like.numel() // width, form.heads, form.dim, 0, 0, width, width,
        gain_a, gain_b, y, *[0] * 8, form.divisor, form.eps,
    )  # fmt: skip

    def run(a: Tensor, b: Tensor | None) -> Tensor:
        a, b = a.contiguous(), None if b is None else b.contiguous()
        call(a.data_ptr(), address(b))
        return y

    return run


# -- the gated projection ----------------------------------------------------------------------------------------------

_KERNEL = Kernel("gated_projection", integers=13, doubles=1)


def _native(
    x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, answer: Tensor | None, gain: Tensor | None
) -> Tensor:
    x, gate, down = x.contiguous(), gate.contiguous(), down.contiguous()
    up, answer, gain = (t if t is None else t.contiguous() for t in (up, answer, gain))
    (hidden, width), out = gate.shape, down.shape[0]
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    _KERNEL(
        x.dtype, _threads(gate, up, down), x.numel() // width, width, hidden, out, 1 if gain is None else len(gain),
        x.data_ptr(), address(answer), gate.data_ptr(), address(up), down.data_ptr(), address(gain), y.data_ptr(), EPS,
    )  # fmt: skip
    return y


def _threads(gate: Tensor, up: Tensor | None, down: Tensor) -> int:
    return threads_for(gate.nbytes + down.nbytes + (0 if up is None else up.nbytes))


def _prepare_gated_projection(
    gate: Tensor, down: Tensor, gain: Tensor | None, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """``gate``: also of ``up``, below it, where there is no ``gain``."""
    width, (out, hidden) = gate.shape[1], down.shape
    x = gate.new_empty((*shape, width))
    if not (
        can_prepare(gate, down, gain)
        and use_decode_kernel(x, gate, down)
        and _gated_projection.choose("auto", device="cpu", dtype=gate.dtype) is _native
    ):
        return None
    y = torch.empty((*shape, out), dtype=gate.dtype)
    heads, up = (1, gate[hidden:]) if gain is None else (len(gain), None)
    call = _KERNEL.prepare(
        gate.dtype, 6, 2, threads_for(gate.nbytes + down.nbytes), x.numel() // width, width, hidden, out, heads,
        0, 0, gate, up, down, gain, y, EPS,
    )  # fmt: skip

    def run(x: Tensor, answer: Tensor | None) -> Tensor:
        x, answer = x.contiguous(), None if answer is None else answer.contiguous()
        call(x.data_ptr(), address(answer))
        return y

    return run


def _torch(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    answer: Tensor | None,
    gain: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    if up is not None:
        inner = project(x, up, backend=backend)
    else:
        assert answer is not None
        inner = rms_norm(answer, gain, EPS, backend=backend).flatten(-2)
    return project(F.silu(project(x, gate, backend=backend)) * inner, down, backend=backend)


_gated_projection = Operation(
    "gated_projection",
    [
        Backend("native", _native, library.refuse, opaque=True),
        Backend("torch", _torch),
        Backend("reference", functools.partial(_torch, backend="reference")),
    ],
    lambda x, gate, up, down, *others: x.new_empty(*x.shape[:-1], down.shape[0]),
)

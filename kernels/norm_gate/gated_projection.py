"""A gated hidden layer, ``down(silu(gate(x)) * inner)``: feed-forward networks, and the way out of a memory.

For many tokens that is three operations. For the few of decoding they cost more to start than to run, and the C kernel
does them in one. Without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu_runtime import library
from ..cpu_runtime.call import Kernel, address, plain, prepares
from ..dispatch import Backend, Operation
from ..linear import FEW, REGISTER, project, threads_for
from .norm import rms_norm

EPS = 1e-6


def few(x: Tensor, *weights: Tensor) -> bool:
    """Whether ``x`` ``[..., in]`` is so few tokens, and everything of such types and widths, that one kernel pays.

    Never where gradients are recorded, whoever wants them.
    """
    return (
        not torch.is_grad_enabled()
        and 0 < x.numel() <= FEW * x.shape[-1]
        and x.is_cpu
        and all(w.dtype == x.dtype and not (w.shape[0] % REGISTER or w.shape[1] % REGISTER) for w in weights)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and plain(x, *weights)
    )


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor, *, backend: str = "auto") -> Tensor:
    """``down (silu(gate x) * (up x))`` for a few tokens: what :func:`few` accepts.

    ``x``: ``[..., in]``. ``gate_up``: ``[2 * hidden, in]``, first the gate. ``down``: ``[out, hidden]``.
    """
    hidden = gate_up.shape[0] // 2
    if gate_up.shape != (2 * hidden, x.shape[-1]) or down.shape[1] != hidden:
        raise ValueError(
            f"feed_forward: gate_up {list(gate_up.shape)}, down {list(down.shape)}: expected [2 * hidden, "
            f"{x.shape[-1]}] and [out, hidden]"
        )
    run = _operation.choose(backend, device=x.device.type, dtype=x.dtype)
    return run(x, gate_up[:hidden], gate_up[hidden:], down, None, None)


def gated_output(
    answer: Tensor, gain: Tensor, x: Tensor, gate: Tensor, down: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``down (silu(gate x) * rms_norm(answer) gain)`` for a few tokens: what :func:`few` accepts.

    ``answer``: ``[..., heads, dim]``, each head normalised on its own. ``gain``: ``[heads, dim]``. ``x``:
    ``[..., in]``. ``gate``: ``[heads * dim, in]``. ``down``: ``[out, heads * dim]``.
    """
    run = _operation.choose(backend, device=x.device.type, dtype=x.dtype)
    return run(x, gate, None, down, answer, gain)


def prepare_feed_forward(gate_up: Tensor, down: Tensor, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """``feed_forward`` for many times a few tokens ``[*shape, in]``, or ``None`` where that gains nothing.

    As ``projection.prepare_projection`` does it: dense inputs, and one tensor for the result.
    """
    run = _prepared(gate_up, down, None, shape)
    return None if run is None else lambda x: run(x, None)


def prepare_gated_output(
    gain: Tensor, gate: Tensor, down: Tensor, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """``gated_output`` likewise, of the answer ``[*shape, heads, dim]`` and ``x``."""
    run = _prepared(gate, down, gain, shape)
    return None if run is None else lambda answer, x: run(x, answer)


def _prepared(
    gate: Tensor, down: Tensor, gain: Tensor | None, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    width, (out, hidden) = gate.shape[1], down.shape
    x = gate.new_empty((*shape, width))
    if not (
        few(x, gate, down)
        and prepares(gate, down, gain)
        and _operation.choose("auto", device="cpu", dtype=gate.dtype) is _native
    ):
        return None
    y = torch.empty((*shape, out), dtype=gate.dtype)
    heads, up = (1, gate[hidden:]) if gain is None else (len(gain), None)
    call = _KERNEL.prepared(
        gate.dtype, 6, 2, threads_for(gate, down), x.numel() // width, width, hidden, out, heads,
        0, 0, gate, up, down, gain, y, EPS,
    )  # fmt: skip

    def run(x: Tensor, answer: Tensor | None) -> Tensor:
        x, answer = x.contiguous(), None if answer is None else answer.contiguous()
        call(x.data_ptr(), address(answer))
        return y

    return run


def _native(
    x: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, answer: Tensor | None, gain: Tensor | None
) -> Tensor:
    x, gate, down = x.contiguous(), gate.contiguous(), down.contiguous()
    up, answer, gain = (t if t is None else t.contiguous() for t in (up, answer, gain))
    (hidden, width), out = gate.shape, down.shape[0]
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    _KERNEL(
        x.dtype, threads_for(gate, up, down), x.numel() // width, width, hidden, out, 1 if gain is None else len(gain),
        x.data_ptr(), address(answer), gate.data_ptr(), address(up), down.data_ptr(), address(gain), y.data_ptr(), EPS,
    )  # fmt: skip
    return y


def _composed(
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


_reference = functools.partial(_composed, backend="reference")


_KERNEL = Kernel("gated_projection", 13, 1)

_operation = Operation(
    "gated_projection",
    [
        Backend("native", _native, library.refuse, opaque=True),
        Backend("torch", _composed),
        Backend("reference", _reference),
    ],
    lambda x, gate, up, down, *others: x.new_empty(*x.shape[:-1], down.shape[0]),
)

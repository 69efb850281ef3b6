"""The memory operation: its promised signature, and the choice of a path."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise, starmap
from typing import Any

import torch
from torch import Tensor

from .. import triton_runtime as triton
from ..custom_op import format_symint as told
from ..dispatch import Backend, Operation, full_precision
from ..dispatch import half_dtype as half
from ..dispatch import is_plain_cpu_tensor as plain
from .checks import check_memory
from .chunking import piecewise_memory
from .closed_form import closed_form_memory
from .cpu import native_memory, refuse_native
from .nonfinite import cuts_before_infinities
from .reference import reference_memory
from .state import MemoryState
from .step_cpu import native_step, refuse_token
from .step_torch import step_memory
from .threshold import selective_memory
from .tokens import Options, Path, Tokens


def titans_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    chunk: int = 16,
    activation: str = "gelu",
    norm: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
    *,
    clip: float | None = None,
    read: str = "after",
    keep: int | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write every token into a memory that is itself a network, and read the memory at every token (eq. 8-15).

        S_t = eta_t S_{t-1} - theta_t grad |M_{a(t)}(k_t) - v_t|^2      M_t = (1 - alpha_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    with ``a(t)`` the weights at the start of the token's chunk. Differentiable in every tensor, state included.
    NaN and infinity are taken as they come: they spoil their head's memory from their token on, and no output before.

    Args:
        q, k: ``[batch, time, heads, d_in]``; v: ``[batch, time, heads, d_out]``.
        theta: step size ``>= 0``, ``[batch, time, heads]``.
        eta: momentum decay in ``[0, 1]``, or ``None``: no momentum, and the state's momentum passes through.
        alpha: forgetting in ``[0, 1]``, or ``None``: nothing is forgotten.
        state: where to go on from; ``MemoryState.fresh(weights)`` to begin.
        chunk: tokens per chunk; part of the function that is computed, 1 is the exact online recurrence.
        activation: ``"identity"``, ``"silu"``, ``"gelu"`` (exact) or ``"relu"`` between the layers.
        norm: ``None``, or a gain ``[heads, d_out]``: ``M(x) = x + LN(net(x)) * gain`` with eps 1e-6.
        mask: ``[batch, time]`` bool; a false token changes nothing and its output is zero.
        backend: ``"auto"``, or the name of one path (``titans-build kernels`` lists them).
        clip: scale each token's gradient, all layers of a head together, down to this norm.
        read: ``"after"`` the token was written (the equation above) or ``"before"`` (``y_t = M_{t-1}(q_t)``).
        keep: chunks between the states that are kept for backward; larger saves memory and costs no accuracy.
        threshold: a token whose surprise (the norm of its gradient at its anchor, before any clipping) is below this
            neither writes nor forgets: its theta and alpha are 0. Earlier momentum carries on as its eta says, and the
            position advances. The comparison itself is not differentiated, and where a surprise equals the threshold to
            rounding, two ways of computing it may decide differently.

    Returns:
        ``y`` ``[batch, time, heads, d_out]`` in the dtype of ``q``, and the new state (float32 or wider).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen path cannot take these arguments; the message says why.
    """
    tokens, options = (
        Tokens(q, k, v, theta, eta, alpha),
        Options(chunk, activation, clip, read, keep, half(q), threshold),
    )
    check_memory(tokens, state, norm, mask, options)
    tensors = (*tokens, norm, *state.weights, *state.momentum, *state.anchor)
    compute = torch.promote_types(torch.promote_types(q.dtype, state.weights[0].dtype), torch.float32)
    run = MEMORY.choose(
        backend,
        device=q.device.type,
        dtype=compute,
        time=q.shape[1],
        chunk=chunk,
        layers=len(state.weights),
        width=max(q.shape[3], v.shape[3]),
        plain=plain(*tensors, mask),
        grad=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors),
    )
    if any(x is not None and x.dtype != compute for x in tensors):
        tokens, norm = tokens.map(lambda x: x.to(compute)), None if norm is None else norm.to(compute)
        cast = lambda part: tuple(x.to(compute) for x in part)  # noqa: E731
        state = MemoryState(cast(state.weights), cast(state.momentum), cast(state.anchor), state.position)
    with full_precision(q.device.type):
        y, state = run(tokens, state, norm, mask, options)
    return y.to(q.dtype), state


def _backend(
    name: str, path: Path, refuse: Callable[..., str | None] = lambda **facts: None, *, selects: bool = False
) -> Backend:
    """A path that is given stretches of a sequence which are finite but for their first token.

    ``selects``: it knows of thresholds itself; any other is given gates in which what is held back is zero.
    """

    def chosen(
        tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, MemoryState]:
        if options.threshold is None or selects:
            return path(tokens, state, norm, mask, options)
        return selective_memory(tokens, state, norm, mask, options, path)

    def run(
        tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, MemoryState]:
        cuts = cuts_before_infinities(tokens, mask)
        if not cuts:
            return chosen(tokens, state, norm, mask, options)
        outputs = []
        for span in starmap(slice, pairwise([0, *cuts, tokens.q.shape[1]])):
            y, state = chosen(tokens.at(span), state, norm, None if mask is None else mask[:, span], options)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return Backend(name, run, refuse, opaque=True)


def _refuse_step(*, time: int = 1, grad: bool = False, **facts: object) -> str | None:
    if time != 1:
        return f"takes one token, not {told(time)}"
    return "has no backward; gradients are wanted" if grad else None


def _triton(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    from .triton.network import TritonNetwork
    from .triton.schedule import operands

    products = operands(tokens.q.dtype, None if options.half is None else getattr(torch, options.half))
    network = functools.partial(TritonNetwork, products=products)
    return piecewise_memory(tokens, state, norm, mask, options, network)


def _refuse_triton(*, chunk: int = 1, **facts: Any) -> str | None:
    if chunk > 128:
        return f"takes chunks of up to 128 tokens, not {chunk}"
    return triton.refuse_memory(**facts)


def _triton_step(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> tuple[Tensor, MemoryState]:
    from .triton.step import triton_step

    return triton_step(tokens, state, norm, mask, options)


def _refuse_triton_step(**facts: Any) -> str | None:
    return _refuse_step(**facts) or triton.refuse_memory(**facts)


MEMORY = Operation(
    "memory",
    [
        _backend("native_step", native_step, refuse_token, selects=True),
        _backend("triton_step", _triton_step, _refuse_triton_step),
        _backend("step", step_memory, _refuse_step, selects=True),
        _backend("native", native_memory, refuse_native),
        _backend("triton", _triton, _refuse_triton),
        _backend("torch", piecewise_memory),
        _backend("closed_form", closed_form_memory, selects=True),
        _backend("reference", reference_memory, selects=True),
    ],
    lambda tokens, state, *others: (tokens.v, state),
    [Tokens, MemoryState, Options],
)

"""The memory operation: its promised signature, the checks of its arguments, and the choice of a path."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Operation
from ..native.kernel import plain
from ..precision import full_precision
from ..triton import availability as triton
from .activation import ACTIVATIONS
from .closed_form import closed_form_memory
from .finite import cuts_before_infinities
from .native import native_memory, refuse_native
from .native_token import native_step, refuse_token
from .pieces import piecewise_memory
from .reference import reference_memory
from .state import MemoryState
from .step import step_memory


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

    Returns:
        ``y`` ``[batch, time, heads, d_out]`` in the dtype of ``q``, and the new state (float32 or wider).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen path cannot take these arguments; the message says why.
    """
    _check(q, k, v, theta, eta, alpha, state, chunk, activation, norm, mask, clip, read, keep)
    tensors = (q, k, v, theta, eta, alpha, norm, *state.weights, *state.momentum, *state.anchor)
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
        q_, k, v, theta = (x.to(compute) for x in (q, k, v, theta))
        eta, alpha, norm = (None if x is None else x.to(compute) for x in (eta, alpha, norm))
        cast = lambda part: tuple(x.to(compute) for x in part)  # noqa: E731
        state = MemoryState(cast(state.weights), cast(state.momentum), cast(state.anchor), state.position)
    else:
        q_ = q
    options = dict(chunk=chunk, activation=activation, norm=norm, mask=mask, clip=clip, read=read)
    if run in (native_memory, _triton, piecewise_memory):
        options["keep"] = keep
    cuts = cuts_before_infinities(k, v, theta, eta, alpha, mask)
    with full_precision(q.device.type):
        if not cuts:
            y, state = run(q_, k, v, theta, eta, alpha, state, **options)
        else:
            outputs = []
            for start, stop in pairwise([0, *cuts, q.shape[1]]):
                options["mask"] = None if mask is None else mask[:, start:stop]
                piece = (None if x is None else x[:, start:stop] for x in (q_, k, v, theta, eta, alpha))
                y, state = run(*piece, state, **options)
                outputs.append(y)
            y = torch.cat(outputs, dim=1)
    return y.to(q.dtype), state


def _refuse_step(*, time: int = 1, grad: bool = False, **facts: object) -> str | None:
    if time != 1:
        return f"takes one token, not {time}"
    return "has no backward; gradients are wanted" if grad else None


def _triton(*tensors: Any, **options: Any) -> tuple[Tensor, MemoryState]:
    from .triton_network import TritonNetwork

    return piecewise_memory(*tensors, network=TritonNetwork, **options)


def _refuse_triton(*, layers: int = 1, chunk: int = 1, width: int = 1, **facts: Any) -> str | None:
    if layers > 2:
        return f"takes one or two layers, not {layers}"
    if chunk > 128:
        return f"takes chunks of up to 128 tokens, not {chunk}"
    if width > 128:
        return f"takes heads of up to 128 numbers, not {width}"
    return triton.refuse(**facts)


MEMORY = Operation(
    "memory",
    [
        Backend("native_step", native_step, refuse_token),
        Backend("step", step_memory, _refuse_step),
        Backend("native", native_memory, refuse_native),
        Backend("triton", _triton, _refuse_triton),
        Backend("torch", piecewise_memory),
        Backend("closed_form", closed_form_memory),
        Backend("reference", reference_memory),
    ],
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor | None,
    alpha: Tensor | None,
    state: MemoryState,
    chunk: int,
    activation: str,
    norm: Tensor | None,
    mask: Tensor | None,
    clip: float | None,
    read: str,
    keep: int | None,
) -> None:
    """Cheap when all is well, for decoding pays it at every token; messages are made only for what is wrong."""
    if not isinstance(state, MemoryState):
        raise TypeError(f"state: expected a MemoryState (MemoryState.fresh(weights)), got {type(state).__name__}")
    for name, part in (("weights", state.weights), ("momentum", state.momentum), ("anchor", state.anchor)):
        if not isinstance(part, tuple):
            raise TypeError(f"state.{name}: expected a tuple of tensors, got {type(part).__name__}")
    tensors = [("q", q), ("k", k), ("v", v), ("theta", theta)]
    tensors += [(n, x) for n, x in (("eta", eta), ("alpha", alpha), ("norm", norm)) if x is not None]
    stacks = [("weights", state.weights), ("momentum", state.momentum), ("anchor", state.anchor)]
    tensors += [(f"state.{n}[{l}]", w) for n, part in stacks for l, w in enumerate(part)]
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {x.device}")
    if q.dim() != 4:
        raise ValueError(f"q: expected [batch, time, heads, d_in], got {list(q.shape)}")
    batch, time, heads, d_in = q.shape
    if v.dim() != 4:
        raise ValueError(f"v: expected [batch, time, heads, d_out], got {list(v.shape)}")
    d_out = v.shape[3]
    per_token = (batch, time, heads)
    for name, given, shape in (
        ("k", k, q.shape),
        ("v", v, (*per_token, d_out)),
        ("theta", theta, per_token),
        ("eta", eta, per_token),
        ("alpha", alpha, per_token),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} to go with q {list(q.shape)}, got {list(given.shape)}")
    if not state.weights:
        raise ValueError("state.weights: expected at least one layer, got none")
    width = d_in
    for l, w in enumerate(state.weights):
        shape = w.shape
        if len(shape) != 4 or shape[0] != batch or shape[1] != heads or shape[3] != width:
            raise ValueError(
                f"state.weights[{l}]: expected [batch={batch}, heads={heads}, out, in={width}] to go with q, "
                f"got {list(w.shape)}"
            )
        width = shape[2]
    if width != d_out:
        raise ValueError(f"state.weights[{len(state.weights) - 1}]: expected out={d_out} to go with v, got {width}")
    shapes, dtype = [w.shape for w in state.weights], state.weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state.weights[0]: expected float32 or float64, got {dtype}")
    for name, part in stacks:
        if name == "momentum" and eta is None and not part:
            continue
        if [x.shape for x in part] != shapes:
            raise ValueError(
                f"state.{name}: expected the shapes of state.weights {[list(w.shape) for w in state.weights]}, "
                f"got {[list(x.shape) for x in part]}"
            )
        for l, x in enumerate(part):
            if x.dtype != dtype:
                raise TypeError(f"state.{name}[{l}]: expected {dtype} as state.weights[0], got {x.dtype}")
    position = state.position
    if not isinstance(position, Tensor) or position.shape != (batch,) or position.dtype != torch.int64:
        got = f"{position.dtype} {list(position.shape)}" if isinstance(position, Tensor) else repr(position)
        raise ValueError(f"state.position: expected int64 [{batch}], got {got}")
    if position.device != q.device:
        raise ValueError(f"state.position: expected device {q.device} as q, got {position.device}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected a whole number of tokens >= 1, got {chunk!r}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(sorted(ACTIVATIONS))}, got {activation!r}")
    if norm is not None:
        if d_in != d_out:
            raise ValueError(f"norm: a residual memory needs d_in = d_out, got {d_in} and {d_out}")
        if norm.shape != (heads, d_out):
            raise ValueError(f"norm: expected a gain [heads={heads}, d_out={d_out}], got {list(norm.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch, time) or mask.dtype != torch.bool:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ValueError(f"mask: expected bool [{batch}, {time}], got {got}")
        if mask.device != q.device:
            raise ValueError(f"mask: expected device {q.device} as q, got {mask.device}")
    if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
        raise ValueError(f"clip: expected a norm > 0 or None, got {clip!r}")
    if read not in ("after", "before"):
        raise ValueError(f"read: expected 'after' or 'before', got {read!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep: expected a whole number of chunks >= 1, got {keep!r}")

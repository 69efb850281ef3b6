"""The memory operation and the read operation: their arguments, and the choice of a backend."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..custom_op import format_symint
from ..dispatch import (
    Backend,
    BackendError,
    Operation,
    expect_tensors,
    full_precision,
    half_dtype,
    is_plain_cpu_tensor,
    needs_grad,
    never,
    sum_is_finite,
    transforming,
)
from ..triton_runtime import refuse as refuse_triton
from ..triton_runtime import refuse_memory as refuse_triton_memory
from .chunkwise_torch import chunkwise_memory
from .closed_form import closed_form_memory
from .cpu import cpu_memory, cpu_read, refuse_cpu, refuse_cpu_read
from .linear_cpu import linear_memory, refuse_linear
from .network_torch import ACTIVATIONS, torch_read
from .overflow import confine_overflow
from .reference import reference_memory, reference_read
from .state import (
    CHANNELS,
    DELTA,
    FIRST,
    GATED,
    WINDOW,
    BackendFunction,
    MemoryState,
    Objective,
    Options,
    Tokens,
)
from .step_cpu import cpu_step, cpu_step_read, refuse_cpu_step
from .step_torch import torch_step
from .surprise import thresholded_memory

__all__ = [
    "MEMORY", "READ", "MemoryState", "Objective", "Options", "Tokens", "memory_flops", "read_memory", "run_memory",
    "titans_memory",
]  # fmt: skip


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
    ends: Sequence[int] | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write every token into a memory that is itself a network, and read the memory at every token (eq. 8-15).

        S_t = eta_t S_{t-1} - theta_t grad |M_{a(t)}(k_t) - v_t|^2      M_t = (1 - alpha_t) M_{t-1} + S_t
        y_t = M_t(q_t)

    ``M_{a(t)}``: the weights at the start of the chunk of token ``t``. Differentiable in every tensor, state included.
    Gradients can be differentiated again, and ``torch.func`` and forward mode are supported; both run on
    ``closed_form``.

    NaN, infinity and overflow affect the memory of their row and head from their token on, and neither an earlier
    output nor another row or head. A query that is not finite affects its own output alone, and what stands at masked
    tokens affects nothing, gradients included. Under ``clip`` the step of a token is right wherever the norm of its
    gradient is representable; where the norm overflows, the step is NaN. Compiled graphs keep these rules; inside of
    ``torch.func`` transforms an overflow may reach earlier outputs of its chunk.

    Args:
        q, k: ``[batch, time, heads, d_in]``; v: ``[batch, time, heads, d_out]``.
        theta: step size ``>= 0``, ``[batch, time, heads]``.
        eta: momentum decay in ``[0, 1]``, or ``None``: no momentum, and the state's momentum is returned as it is.
        alpha: forgetting in ``[0, 1]``, or ``None``: nothing is forgotten.
        state: the state to continue from; ``MemoryState.fresh(weights)`` to begin.
        chunk: tokens per chunk; part of the function that is computed, 1 is the exact online recurrence.
        activation: ``"identity"``, ``"silu"``, ``"gelu"`` (exact) or ``"relu"`` between the layers.
        norm: ``None``, or a gain ``[heads, d_out]``: ``M(x) = x + LN(net(x)) * gain`` with eps 1e-6.
        mask: ``[batch, time]`` bool; a false token changes nothing and its output is zero.
        backend: ``"auto"``, or the name of one backend (``titans-build kernels`` lists them).
        clip: scale each token's gradient, all layers of a head together, down to this norm.
        read: ``"after"`` the token was written (the equation above), ``"before"`` (``y_t = M_{t-1}(q_t)``), or at the
            ``"anchor"`` (``y_t = M_{a(t)}(q_t)``).
        keep: chunks between the states that are kept for backward; larger saves memory and costs no accuracy.
        threshold: a token whose surprise (the norm of its gradient at its anchor, before any clipping) is below this
            neither writes nor forgets: its theta and alpha are 0. Earlier momentum continues as its eta says, and the
            position advances. The comparison itself is not differentiated, and where a surprise equals the threshold to
            rounding, two backends may decide differently.
        ends: the rows whose state is returned, by default all. The state of other rows is not computed where it can be
            left out.

    Returns:
        ``y`` ``[batch, time, heads, d_out]`` in the dtype of ``q``, and the new state (float32 or wider).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen backend cannot take these arguments; the message says why.
    """
    tokens = Tokens(q, k, v, theta, eta, alpha)
    options = Options(chunk, activation, clip, read, keep, half_dtype(q), threshold, ends=ends)
    check_memory(tokens, state, norm, mask, options)
    return run_memory(tokens, state, norm, mask, options, backend, rare=())


def run_memory(
    tokens: Tokens,
    state: MemoryState,
    norm: Tensor | None,
    mask: Tensor | None,
    options: Options,
    backend: str = "auto",
    *,
    rare: tuple[str, ...] | None = None,
) -> tuple[Tensor, MemoryState]:
    """:func:`titans_memory` with arguments that are known to fit, and any ``options.objective``.

    ``rare``: ``options.rare(tokens)`` where it is known.
    """
    q = tokens.q
    tensors = (*tokens, norm, *state.weights, *state.momentum, *state.anchor)
    compute = torch.promote_types(torch.promote_types(q.dtype, state.weights[0].dtype), torch.float32)
    plain, grad = is_plain_cpu_tensor(*tensors, mask), needs_grad(*tensors)
    rare = options.rare(tokens) if rare is None else rare
    run = MEMORY.choose(
        backend,
        device=q.device.type,
        dtype=compute,
        plain=plain,
        transformed=not plain and transforming(),
        time=q.shape[1],
        chunk=options.chunk,
        layers=2 if options.gated else len(state.weights),
        width=max(q.shape[3], tokens.v.shape[3]),
        grad=grad,
        plainly=norm is options.clip is options.threshold is None,
        rare=rare,
    )
    for x in tensors:
        if x is None or x.dtype == compute:
            continue
        # its kernels cast queries, keys, values and outputs themselves, apart from reads by channel
        loads = run is MEMORY.backends["triton"].run and options.threshold is None and CHANNELS not in rare
        if loads and len({x.dtype for x in tokens[:3]}) == 1:
            tokens = Tokens._make([*tokens[:3], *[_cast(x, compute) for x in tokens[3:]]])
        else:
            tokens = tokens.map(lambda x: x.to(compute))
        state, norm = state.to(compute), _cast(norm, compute)
        break
    with full_precision(q.device.type):
        y, state = run(tokens, state, norm, mask, options)
    if grad and not y.requires_grad:  # no token wrote or read: the gradients are zero
        y = sum((x.flatten()[:0].sum() for x in tensors if x is not None and x.requires_grad), y)
    return y.to(q.dtype), state


def has_fast_backend(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options,
    slower: tuple[str, ...] = (),
) -> bool:  # fmt: skip
    """Whether :func:`run_memory` takes another backend than the references, which are slow, and those named ``slower``.

    The tensors are of one dtype.
    """
    q = tokens.q
    tensors = (*tokens, norm, *state.weights, *state.momentum, *state.anchor)
    plain = is_plain_cpu_tensor(*tensors, mask)
    try:
        run = MEMORY.choose(
            device=q.device.type, dtype=q.dtype, plain=plain, transformed=not plain and transforming(), time=q.shape[1],
            chunk=options.chunk, layers=2 if options.gated else len(state.weights),
            width=max(q.shape[3], tokens.v.shape[3]), grad=needs_grad(*tensors),
            plainly=norm is options.clip is options.threshold is None, rare=options.rare(tokens),
        )  # fmt: skip
    except BackendError:  # the environment names one that cannot
        return False
    return all(run is not MEMORY.backends[name].run for name in ("closed_form", "reference", *slower))


def read_memory(
    q: Tensor,
    weights: tuple[Tensor, ...],
    activation: str = "gelu",
    norm: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``M(q)`` for every query on its own, at fixed weights (eq. 15).

    Args:
        q: ``[batch, time, heads, d_in]``.
        weights: per layer ``[batch, heads, out, in]``.
        activation, norm, backend: as of :func:`titans_memory`.

    Returns:
        ``[batch, time, heads, d_out]`` in the dtype of ``q``; computed in the weights' dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendError: the chosen backend cannot take these arguments; the message says why.
    """
    _check_network("read_memory", "weights", q, weights, activation, norm)
    compute = weights[0].dtype
    run = READ.choose(
        backend,
        q,
        norm,
        *weights,
        dtype=compute,
        same=True,  # they are cast
        time=q.shape[1],
        layers=len(weights),
        width=max(q.shape[3], weights[-1].shape[2]),
        grad=needs_grad(q, norm, *weights),
    )
    half = half_dtype(q)  # which autocast may decide
    with full_precision(q.device.type):
        norm = norm if norm is None or norm.dtype == compute else norm.to(compute)
        y: Tensor = run(q, weights, activation, norm, half)
        return y


def memory_flops(shapes: Sequence[tuple[int, int]], chunk: int, momentum: bool = True) -> int:
    """Useful forward FLOPs per token and head (a multiply-add is 2) of the chunkwise form.

    Args:
        shapes: ``(out, in)`` of each layer.
        chunk: tokens per chunk.
        momentum: whether the state has momentum.

    With ``P`` weights, ``s`` parts of the state: keys forward ``2P``; errors back ``2(P - P_1)``; queries through the
    state ``2sP``; the state's update ``2sP``; scores and their use ``2 b (sum in + sum out)``. Backward is counted
    as twice this: recomputation and element-wise work are not useful FLOPs.
    """
    total = sum(out * width for out, width in shapes)
    first = shapes[0][0] * shapes[0][1]
    scores = 2 * chunk * sum(out + width for out, width in shapes)
    return 2 * total + 2 * (total - first) + 4 * (2 if momentum else 1) * total + scores


# -- arguments ---------------------------------------------------------------------------------------------------------


def check_memory(
    tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
) -> None:
    """Raise if an argument has a wrong type, shape, dtype or device. Fast, because it runs at every decoded token."""
    q, k, v, theta, eta, alpha, *_ = tokens
    chunk, activation, clip, read, keep, _, threshold, _, ends, *_ = options
    if not isinstance(state, MemoryState):
        more = ""
        if hasattr(state, "beyond"):  # a LearnerState
            lost = state.beyond(())
            more = f": its {' and '.join(lost)} is for learn alone" if lost else ": state.plain() is one"
        raise TypeError(f"state: expected a MemoryState (MemoryState.fresh(weights)), got {type(state).__name__}{more}")
    parts = [("weights", state.weights), ("momentum", state.momentum), ("anchor", state.anchor)]
    for name, part in parts:
        if not isinstance(part, tuple):
            raise TypeError(f"state.{name}: expected a tuple of tensors, got {type(part).__name__}")
    _check_network("titans_memory", "state.weights", q, state.weights, activation, norm)
    batch, time, heads, _ = q.shape
    weights, per_token = state.weights, (batch, time, heads)
    wide = weights[0].dtype
    if wide not in (torch.float32, torch.float64):
        raise TypeError(f"state.weights[0]: expected float32 or float64, got {wide}")
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype | None]] = [
        ("k", k, q.shape, None), ("v", v, (*per_token, weights[-1].shape[2]), None), ("theta", theta, per_token, None)
    ]  # fmt: skip
    for name, gate in (("eta", eta), ("alpha", alpha)):
        if gate is not None:
            expected.append((name, gate, per_token, None))
    for name, part in parts[1:]:
        if len(part) != len(weights) and (part or name != "momentum" or eta is not None):
            raise ValueError(
                f"state.{name}: expected the shapes of state.weights, {len(weights)} tensors, got {len(part)}"
            )
        for l, (x, w) in enumerate(zip(part, weights)):
            if x is not w:  # which was checked
                expected.append((f"state.{name}[{l}]", x, w.shape, wide))
    expect_tensors("titans_memory", ("q", q), *expected, one_dtype=False)
    for name, x, shape, dtype in expected:
        if x.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} to go with q and state.weights, got {list(x.shape)}")
        if dtype is not None and x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} as state.weights[0], got {x.dtype}")
    for name, other, shape, dtype in (
        ("state.position", state.position, (batch,), torch.int64), ("mask", mask, (batch, time), torch.bool)
    ):  # fmt: skip
        if other is None and name == "mask":
            continue
        if not isinstance(other, Tensor) or other.shape != shape or other.dtype != dtype:
            got = f"{other.dtype} {list(other.shape)}" if isinstance(other, Tensor) else repr(other)
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {got}")
        if other.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {other.device}")
    for name, number in (("chunk", chunk), ("keep", keep)):
        if (isinstance(number, bool) or not isinstance(number, int) or number < 1) and (name, number) != ("keep", None):
            raise ValueError(f"{name}: expected a whole number >= 1, got {number!r}")
    for name, bound in (("clip", clip), ("threshold", threshold)):
        if bound is not None and not (isinstance(bound, (int, float)) and bound > 0):
            raise ValueError(f"{name}: expected a norm > 0 or None, got {bound!r}")
    if ends is not None and not all(isinstance(row, int) and 0 <= row < batch for row in ends):
        raise ValueError(f"ends: expected rows from 0 to {batch - 1}, got {ends!r}")
    if read not in ("after", "before", "anchor"):
        raise ValueError(f"read: expected 'after', 'before' or 'anchor', got {read!r}")


def _check_network(
    operation: str, name: str, q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None
) -> None:
    """A network that takes ``q``, whose layers are the tuple called ``name``."""
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError(f"{operation}: {name}: expected a tuple of [batch, heads, out, in], one for each layer")
    given: list[tuple[str, Any]] = [("q", q)]
    for l, w in enumerate(weights):
        given.append((f"{name}[{l}]", w))
    expect_tensors(operation, *given, *([] if norm is None else [("norm", norm)]), one_dtype=False)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        names = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"{operation}: activation: expected one of {names}, got {activation!r}")
    if q.dim() != 4:
        raise ValueError(f"{operation}: q: expected [batch, time, heads, d_in], got {list(q.shape)}")
    batch, _, heads, width = q.shape
    for layer, w in given[1:]:
        if w.dim() != 4 or w.shape[0] != batch or w.shape[1] != heads or w.shape[3] != width:
            raise ValueError(
                f"{operation}: {layer}: expected [batch={batch}, heads={heads}, out, in={width}] to go with q, "
                f"got {list(w.shape)}"
            )
        if w.dtype != weights[0].dtype:
            raise TypeError(f"{operation}: {layer}: expected {weights[0].dtype} as {name}[0], got {w.dtype}")
        width = w.shape[2]
    if norm is not None and (norm.shape != (heads, width) or width != q.shape[3]):
        raise ValueError(
            f"{operation}: norm: expected a gain [{heads}, {width}], with d_in = d_out, "
            f"got {list(norm.shape)} and d_in={q.shape[3]}"
        )


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == dtype else x.to(dtype)


# -- backends of titans_memory -----------------------------------------------------------------------------------------


def _backend(
    name: str,
    function: BackendFunction,
    refuse: Callable[..., str | None] = never,
    *,
    thresholds: bool = False,
    confined: bool = False,
    knows: Sequence[str] = (),
) -> Backend:
    """``thresholds``: whether ``function`` applies ``options.threshold`` itself.

    ``confined``: whether NaN and overflow reach no output before their token, since it goes token by token or sees to
    it itself, without waiting for a GPU.
    ``knows``: what it can do of ``Options.rare``.
    """

    def refuse_more(*, transformed: bool = False, rare: Sequence[str] = (), **facts: Any) -> str | None:
        for name in rare:
            if name not in knows:
                return f"does not know {name}"
        if transformed and function not in (closed_form_memory, reference_memory):
            return "takes no torch.func transform and no forward-mode derivative, as backend='closed_form' does"
        return refuse(**facts)

    def run(
        tokens: Tokens, state: MemoryState, norm: Tensor | None, mask: Tensor | None, options: Options
    ) -> tuple[Tensor, MemoryState]:
        write = function
        if options.threshold is not None and not thresholds:
            write = functools.partial(thresholded_memory, function)
        ends = options.ends
        if ends is not None and not (write is cpu_memory and tokens.q.shape[1] > 0):
            y, after = run(tokens, state, norm, mask, options._replace(ends=None))
            return y, after.rows(ends)
        if 0 in tokens.q.shape[:2]:
            return torch.zeros_like(tokens.like_outputs()), state
        y, after = write(tokens, state, norm, mask, options)
        if confined or y.is_meta or options.window > 1 or options.gated:
            return y, after
        if function is closed_form_memory and transforming():
            return y, after
        if sum_is_finite(y, *after.weights, *after.momentum):
            return y, after
        y, after = confine_overflow(write, tokens, state, norm, mask, options._replace(ends=None))
        return y, after if ends is None else after.rows(ends)

    return Backend(name, run, refuse_more, opaque=True)


def _triton(module: str, function: str) -> Callable[..., Any]:
    """A function of ``triton/``, imported when it first runs, because Triton is optional."""
    return lambda *given: getattr(importlib.import_module(f".triton.{module}", __package__), function)(*given)


def _refuse_triton(*, chunk: int = 1, **facts: Any) -> str | None:
    return f"takes chunks of up to 128 tokens, not {chunk}" if chunk > 128 else refuse_triton_memory(**facts)


def _one_token(refuse: Callable[..., str | None] = never) -> Callable[..., str | None]:
    """``refuse``, of a backend that takes one token per row and has no backward."""

    def refuse_more(*, time: int = 1, grad: bool = False, **facts: Any) -> str | None:
        if time != 1:
            return f"takes one token, not {format_symint(time)}"
        return "has no backward; gradients are wanted" if grad else refuse(**facts)

    return refuse_more


SUMS = (CHANNELS, DELTA, WINDOW, GATED)
"""What is a sum over the tokens, as the plain memory is."""

MEMORY = Operation(
    "memory",
    [
        _backend("native_step", cpu_step, _one_token(refuse_cpu_step), thresholds=True, confined=True),
        _backend("triton_step", _triton("step", "triton_step"), _one_token(refuse_triton_memory), confined=True),
        _backend("step", torch_step, _one_token(), thresholds=True, confined=True),
        _backend("native_linear", linear_memory, refuse_linear, confined=True, knows=(CHANNELS, FIRST)),
        _backend("native", cpu_memory, refuse_cpu, knows=SUMS),
        _backend("triton", _triton("network", "triton_memory"), _refuse_triton, confined=True, knows=SUMS),
        _backend("triton_batched", _triton("batched", "batched_memory"), refuse_triton, confined=True, knows=SUMS),
        _backend("torch", chunkwise_memory, confined=True, knows=SUMS),
        _backend("closed_form", closed_form_memory, thresholds=True, knows=SUMS),
        _backend("reference", reference_memory, thresholds=True, confined=True, knows=(*SUMS, FIRST)),
    ],
    lambda tokens, state, _, mask, options: (
        tokens.like_outputs(),
        state if options.ends is None else state.rows(options.ends),
    ),
    [Tokens, MemoryState, Options, Objective],
)


# -- backends of read_memory -------------------------------------------------------------------------------------------


def _read_backend(
    name: str, function: Callable[..., Tensor], refuse: Callable[..., str | None] = never, **flags: bool
) -> Backend:
    """``function`` takes queries in the weights' dtype. Cast here, so that a compiled graph has ``q`` itself."""

    def run(q: Tensor, weights: tuple[Tensor, ...], activation: str, norm: Tensor | None, half: str | None) -> Tensor:
        compute = weights[0].dtype
        if q.dtype == compute:
            return function(q, weights, activation, norm)
        return function(q.to(compute), weights, activation, norm).to(q.dtype)

    return Backend(name, run, refuse, **flags)


READ = Operation(
    "memory_read",
    [
        _read_backend("native_step", cpu_step_read, _one_token(refuse_cpu_step), opaque=True),
        Backend("native", cpu_read, refuse_cpu_read, opaque=True),  # casts the queries itself
        Backend("triton", _triton("read", "triton_read"), refuse_triton_memory, opaque=True),  # casts what it loads
        Backend("triton_batched", _triton("batched", "batched_read"), refuse_triton, opaque=True),
        _read_backend("torch", torch_read),
        _read_backend("reference", reference_read),
    ],
    lambda q, weights, *others: q.new_empty(*q.shape[:3], weights[-1].shape[2]),
)

"""Choosing how an operation runs: its backends, why one is refused, and how to force one.

An :class:`Operation` lists its backends from the most to the least preferred; the last is the reference, which runs
everywhere. ``backend="auto"`` takes the first that does not refuse. A backend that is named, as an argument or in the
environment, and cannot run is an error: there is no silent fallback.

Environment: ``TITANS_BUILD_BACKEND=attention=flex,memory=reference`` names a backend per operation;
``TITANS_BUILD_BACKEND=reference`` takes it for every operation that has one of that name. An argument other than
``"auto"`` wins over the environment.

Under ``torch.compile`` the choice is made once, while tracing; a backend that a tracer cannot follow becomes one
operator (``custom_op.py``). Such a backend that finds out at the call that it cannot run
(:class:`BackendUnavailable`) raises there: name another one, and compile again.

The second half of this file holds the questions that operations ask about their tensors.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from .custom_op import THREAD, OpaqueOperation

VARIABLE = "TITANS_BUILD_BACKEND"

OPERATIONS: dict[str, Operation] = {}
"""Every operation by name, in order of definition."""

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


class BackendError(ValueError):
    """A named backend does not exist or cannot run here."""


class BackendUnavailable(BackendError):
    """Raised by a backend that finds out at the call, before it has computed anything, that it cannot run."""


def never(**facts: Any) -> str | None:
    """``refuse`` of a backend that runs everywhere."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    ``refuse(**facts)`` returns why it cannot run, or ``None``. Every operation gives at least the facts ``device`` (a
    device type such as ``"cpu"``) and ``dtype``, and ``named=True`` where this backend was named; a backend ignores the
    facts it has no use for. A backend with an optional dependency imports it inside ``run``.
    ``opaque``: ``run`` is not PyTorch code, or reads values of tensors, so that no compiler can trace it.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = never
    opaque: bool = False


class BackendRow(NamedTuple):
    """A line of :func:`table`."""

    operation: str
    backend: str
    available: bool
    reason: str
    """Why not, or an empty string."""
    chosen: bool
    """Whether ``"auto"`` takes it, with the environment applied."""
    error: str = ""
    """What running the operation raises, such as a wrong name in the environment."""


class Operation:
    """A named operation and its backends, most preferred first.

    ``outputs`` and ``tuples``: arguments of ``custom_op.OpaqueOperation``, where a backend is opaque.
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend],
        outputs: Callable[..., Any] | None = None,
        tuples: Sequence[type[Any]] = (),
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._chosen: dict[Any, Backend] = {}
        self._unavailable: dict[str, str] = {}
        opaque = {backend.name: backend.run for backend in backends if backend.opaque}
        if bool(opaque) != (outputs is not None):
            raise ValueError(f"{name}: give outputs exactly where a backend is opaque")
        self._traced: dict[str, Callable[..., Any]] = {}
        if outputs is not None:
            call = OpaqueOperation(name, opaque, outputs, tuples).call
            self._traced = {each: functools.partial(call, each) for each in opaque}
        OPERATIONS[name] = self

    def choose(self, backend: str = "auto", *tensors: Tensor | None, **facts: Any) -> Callable[..., Any]:
        """The function to run for ``facts``. Raises :class:`BackendError` when a named backend cannot run.

        From ``tensors`` come the facts that are not given: ``device`` and ``dtype`` of the first, and of all of them
        ``same`` (they have one dtype) and ``plain`` (:func:`is_plain_cpu_tensor`).
        """
        if tensors:
            x: Any = tensors[0]
            dtype, same = x.dtype, True
            for other in tensors:
                if other is not None and other.dtype != dtype:
                    same = False
            device, plain = "cpu" if x.is_cpu else x.device.type, is_plain_cpu_tensor(*tensors)
            facts = {"device": device, "dtype": dtype, "same": same, "plain": plain, **facts}
        if torch.compiler.is_compiling():  # lengths may be symbols, which cannot be keys of a dictionary
            picked = self._pick(backend, facts)
            return self._traced.get(picked.name, picked.run)
        key = (backend, os.environ.get(VARIABLE), *facts.items())
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._pick(backend, facts)
        return chosen.run

    def fallback(self, failed: str, reason: str, backend: str = "auto", **facts: Any) -> Callable[..., Any]:
        """The function to run after the backend ``failed`` raised :class:`BackendUnavailable` for ``facts``.

        From now on ``"auto"`` takes another. Raises :class:`BackendError` where the backend was named.
        """
        self._unavailable[failed] = reason
        self._chosen.clear()
        run = self.choose(backend, **facts)
        if run is self.backends[failed].run:
            raise BackendError(f"{self.name}: {failed} is named and cannot run: {reason}")
        return run

    def why_not(self, backend: Backend, facts: dict[str, Any]) -> str | None:
        """Why ``"auto"`` does not take a backend, or ``None``."""
        return self._unavailable.get(backend.name) or backend.refuse(**facts)

    def _pick(self, name: str, facts: dict[str, Any]) -> Backend:
        source = f"backend={name!r}"
        if name == "auto":
            setting = os.environ.get(VARIABLE)
            if setting:
                name = _from_environment(setting, self)
                source = f"{VARIABLE}={setting}"
        if name != "auto":
            return self._named(name, source, facts)
        refusals = []
        for backend in self.backends.values():
            reason = self.why_not(backend, facts)
            if reason is None:
                return backend
            refusals.append(f"{backend.name}: {reason}")
            if not torch.compiler.is_compiling():
                self._log_once(backend.name, reason)
        raise BackendError(f"{self.name}: no backend can run: {'; '.join(refusals)}")

    def _named(self, name: str, source: str, facts: dict[str, Any]) -> Backend:
        backend = self.backends.get(name)
        if backend is None:
            raise BackendError(f"{self.name}: {source}: no such backend; expected auto, {', '.join(self.backends)}")
        reason = backend.refuse(named=True, **facts)
        if reason is not None:
            raise BackendError(f"{self.name}: {source}: {name} cannot run: {reason}")
        return backend

    def _log_once(self, backend: str, reason: str) -> None:
        line = (self.name, backend, reason)
        if line not in _logged:
            _logged.add(line)
            _log.debug("%s: %s refused: %s", *line)


def _from_environment(setting: str, operation: Operation) -> str:
    """The backend that ``setting`` names for ``operation``, or ``"auto"``; raises for an unknown name."""
    chosen = "auto"
    for item in setting.split(","):
        target, equals, name = (part.strip() for part in item.partition("="))
        if not equals:
            known = {known for each in OPERATIONS.values() for known in each.backends}
            if target != "auto" and target not in known:
                raise BackendError(
                    f"{VARIABLE}={setting}: no operation has a backend {target!r}; expected one of {sorted(known)}"
                )
            if target in operation.backends and chosen == "auto":
                chosen = target
        elif target not in OPERATIONS:
            raise BackendError(f"{VARIABLE}={setting}: no operation {target!r}; expected one of {sorted(OPERATIONS)}")
        elif target == operation.name:
            chosen = name
    return chosen


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[BackendRow]:
    """Every operation with every backend: whether it can run on ``device`` with ``dtype``, and if not, why.

    Where the environment names something unknown, no backend of the operation is chosen and its rows say so.
    """
    rows = []
    for operation in OPERATIONS.values():
        facts: dict[str, Any] = {"device": device, "dtype": dtype}
        chosen = error = ""
        try:
            chosen = operation._pick("auto", facts).name
        except BackendError as problem:
            error = str(problem)
        for backend in operation.backends.values():
            reason = operation.why_not(backend, facts)
            row = BackendRow(operation.name, backend.name, reason is None, reason or "", backend.name == chosen, error)
            rows.append(row)
    return rows


# -- questions about tensors -------------------------------------------------------------------------------------------


def expect_tensors(operation: str, *given: tuple[Any, ...], one_dtype: bool = True) -> None:
    """Raise unless all are floating-point tensors on the device, and of the dtype, of the first.

    ``given``: tuples that begin with a name and a tensor. ``one_dtype=False``: any dtypes. The ``TypeError`` or
    ``ValueError`` names the operation and the argument. Autocast changes nothing here: which of two dtypes is meant,
    only the caller knows.
    """
    first, device, dtype = given[0][0], None, None
    for name, x, *_ in given:
        if not isinstance(x, Tensor):
            raise TypeError(f"{operation}: {name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{operation}: {name} is {x.dtype}: expected a floating-point dtype")
        if device is None:
            device, dtype = x.device, x.dtype
        if one_dtype and x.dtype != dtype:
            raise TypeError(f"{operation}: {name} is {x.dtype}: expected the dtype of {first}, {dtype}")
        if x.device != device:
            raise ValueError(f"{operation}: {name} is on {x.device}: expected the device of {first}, {device}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_PROBE = torch.zeros((), device="cpu", requires_grad=True)


def transforming() -> bool:
    """Whether a transform of ``torch.func`` runs, or a level of forward-mode differentiation is open."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad.unpack_dual(_PROBE).primal is not _PROBE:  # inside of a level the primal is a new view
        return True
    try:
        _PROBE.requires_grad_()
    except RuntimeError:  # inside of a transform this is not allowed
        return True
    return False


def shows_values(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: ``vmap`` hides those of the tensors that it maps over."""
    if not transforming():
        return True
    try:
        x.flatten()[:1].tolist()
    except RuntimeError:
        return False
    return True


_KNOWN = WeakTensorKeyDictionary()


def known(x: Tensor, values: Sequence[int]) -> Tensor:
    """``x``, whose ``values`` the host knows: :func:`integers` need not wait for the device of ``x``.

    Tensors of states are never modified in place, so what is known of one stays true.
    """
    if not torch.compiler.is_compiling():
        _KNOWN[x] = list(values)
    return x


def integers(x: Tensor, *, wait: bool = True) -> Any:
    """The values of a vector of integers, as a list. Waits for the device of ``x`` once, unless they are known.

    ``wait=False``: ``None`` where they are not known, and while compiling.
    """
    if x.is_cpu and (wait or not torch.compiler.is_compiling()):
        return x.tolist()
    found = None if torch.compiler.is_compiling() else _KNOWN.get(x)
    if found is None and not torch.compiler.is_compiling() and x in _ON_HOST:
        found = _KNOWN[x] = _ON_HOST[x].tolist()
    if found is None and wait:
        found = _KNOWN[x] = x.tolist()
    return found


_ON_HOST = WeakTensorKeyDictionary()


def on_host(x: Tensor) -> Tensor:
    """``x`` on the CPU. Waits for another device once, unless the values are known (``placed``).

    What is known is kept as long as the tensor, so it is asked of tensors that nobody modifies in place.
    """
    if x.is_cpu:
        return x
    found = _ON_HOST.get(x)
    if found is None:
        found = _ON_HOST[x] = x.cpu()
    return found


def placed(x: Tensor, device: torch.device) -> Tensor:
    """``x``, which is on the CPU, on ``device``, without waiting for it. Its values are known."""
    return seen(x.to(device, non_blocking=True), x)


def seen(x: Tensor, values: Tensor) -> Tensor:
    """``x``, whose ``values`` on the CPU are known: :func:`on_host` need not wait for them."""
    if not x.is_cpu and not torch.compiler.is_compiling():
        _ON_HOST[x] = values
    return x


def advanced(x: Tensor, count: int | Tensor, most: int | None = None) -> Tensor:
    """``x + count``, or ``most`` where that is less. Known where ``x`` and ``count`` are."""
    y = x + count if most is None else (x + count).clamp_(max=most)
    if not x.is_cpu and x in _KNOWN:
        counts = integers(count, wait=False) if isinstance(count, Tensor) else itertools.repeat(count)
        if counts is not None:
            sums = [value + more for value, more in zip(_KNOWN[x], counts)]
            known(y, sums if most is None else [min(value, most) for value in sums])
    return y


def copied(copy: Tensor, x: Tensor, rows: int | None = None) -> Tensor:
    """``copy`` with the values of ``x``, or of its one row for each of ``rows``. Known where ``x`` is."""
    if not x.is_cpu and x in _KNOWN:
        known(copy, _KNOWN[x] * (rows or 1))
    return copy


def expect_values(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` if ``vmap`` hides the values of the argument ``name``, which decide about shapes."""
    if not shows_values(x):
        raise ValueError(f"{name}: vmap cannot map over it, because its values decide shapes: use a batch of rows")


def is_plain_cpu_tensor(*tensors: Tensor | None) -> bool:
    """Whether a C kernel may read all of these at their addresses (``None`` is skipped).

    False where an operator would do more than compute: tensor subclasses, other layouts and devices, ``torch.jit``
    tracing, dispatch modes (fake tensors, ``make_fx``), ``torch.func`` transforms, forward-mode differentiation, and a
    default device other than the CPU, on which outputs would be allocated.
    """
    if torch.compiler.is_compiling():
        return True  # while tracing there are no addresses; the operator in the graph gets ordinary tensors
    for x in tensors:
        if x is not None and (
            type(x) not in _PLAIN_TYPES or not x.is_cpu or x.layout is not torch.strided or x.is_neg()
        ):
            return False
    return (
        not torch.jit.is_tracing()
        # PyTorch has no public function for this flag, and results under make_fx look like any other. All threads share
        # the flag, which is also set while a compiler runs what it has just compiled
        and (not is_in_torch_dispatch_mode() or THREAD.runs_operator)
        and not transforming()
        and (not torch.overrides.has_torch_function((_PROBE,)) or torch.get_default_device().type == "cpu")
    )


DECODE_TOKENS = 4
"""Tokens up to which starting an operator, and reading the weights, costs more than arithmetic."""
REGISTER = 16
"""Numbers that the C kernels for a few tokens read at once: widths must be a multiple of it."""


def use_decode_kernel(x: Tensor, *weights: Tensor | None, all_tensors: bool = False) -> bool:
    """Whether a C kernel for up to ``DECODE_TOKENS`` tokens takes ``x`` ``[..., in]`` and the weights ``[out, in]``.

    Never under autocast, while compiling, or where gradients are recorded. ``all_tensors``: the operation has no other
    tensors, so that gradients are recorded only where one of these needs one.
    """
    width = x.shape[-1]
    if needs_grad(x, *weights) if all_tensors else torch.is_grad_enabled():
        return False
    if not 0 < x.numel() <= DECODE_TOKENS * width or not x.is_cpu or width % REGISTER:
        return False
    for w in weights:
        if w is not None and (w.dtype != x.dtype or w.shape[-1] % REGISTER):
            return False
    return (
        not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling() and is_plain_cpu_tensor(x, *weights)
    )


def can_prepare(*weights: Tensor | None) -> bool:
    """Whether a C kernel's call can be prepared once for these weights: dense, plain, and without gradients."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(w is None or w.is_contiguous() for w in weights)
        and is_plain_cpu_tensor(*weights)
    )


def sum_is_finite(*tensors: Tensor | None) -> bool:
    """False where a tensor holds NaN or infinity, and where finite elements overflow when added up.

    The cheapest check there is: one pass over memory, and no tensor of the results. Other devices are waited for once.
    """
    total: Any = 0.0
    for x in tensors:
        if x is None:
            continue
        x = x.detach()
        part = x.sum(dtype=torch.float32) if x.dtype in _HALF else x.sum()
        total += part.item() if x.is_cpu else part
    return math.isfinite(total)


_HALF = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """A region without autocast; costs nothing where autocast is off."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def half_dtype(x: Tensor) -> str | None:
    """``"bfloat16"`` or ``"float16"`` where the operands of products of ``x`` may be rounded to it, else ``None``.

    That is where ``x`` has that dtype, or autocast would cast it. Sums and states are never rounded.
    """
    dtype = x.dtype
    if dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _HALF.get(dtype)

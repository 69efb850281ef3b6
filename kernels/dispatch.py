"""Choosing how an operation runs: its backends, why one was refused, and how to force one.

An :class:`Operation` lists its backends from the most to the least preferred; the last is the reference, which
runs everywhere. ``backend="auto"`` takes the first that does not refuse. A backend that was asked for by name,
as an argument or in the environment, and cannot run is an error: there is no silent fallback.

Environment: ``TITANS_BUILD_BACKEND=attention=flex,memory=reference`` names a backend per operation;
``TITANS_BUILD_BACKEND=reference`` takes it for every operation that has one of that name. An argument other
than ``"auto"`` wins over the environment.

Under ``torch.compile`` the choice is the same, made once and for all while it traces; a backend that it cannot look
into becomes one operator (``compiling.py``). Nothing else is in the graph then: such a backend that finds out at the
call that it cannot run (:class:`Unable`) is not replaced there, but raises. Name another one, and compile again.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .constant import constant
from .custom_op import Opaque

VARIABLE = "TITANS_BUILD_BACKEND"

OPERATIONS: dict[str, Operation] = {}
"""Every operation by name, in order of definition."""

# os.environ decodes what it is asked for, which takes longer than choosing; underneath it is a dictionary
_SETTINGS: Any = getattr(os.environ, "_data", os.environ)
_SETTING: Any = os.environ.encodekey(VARIABLE) if hasattr(os.environ, "_data") else VARIABLE

_log = logging.getLogger(__name__)
_logged: set[tuple[str, str, str]] = set()


class BackendError(ValueError):
    """A backend was asked for by name and does not exist or cannot run here."""


class Unable(BackendError):
    """Raised by a backend that finds out at the call that it cannot run, before anything came of it."""


def _never(**facts: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    ``refuse(**facts)`` returns why it cannot run, or ``None``. Every operation gives at least the facts
    ``device`` (a device type such as ``"cpu"``) and ``dtype``, and ``named=True`` where this backend was asked for by
    name; a backend ignores the facts it has no opinion on.
    A backend with an optional dependency imports it inside ``run``, after ``refuse`` has looked for it.
    ``opaque``: ``run`` is no PyTorch code, or asks for the values of tensors, which no compiler can trace.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = _never
    opaque: bool = False


class Row(NamedTuple):
    """A line of :func:`table`."""

    operation: str
    backend: str
    available: bool
    reason: str
    """Why not, or an empty string."""
    chosen: bool
    """What ``"auto"``, with the environment applied, takes."""
    error: str = ""
    """What running the operation raises when nothing is chosen, such as a wrong name in the environment."""


class Operation:
    """A named operation and its backends, most preferred first.

    ``outputs`` and ``tuples``: for opaque backends, what ``compiling.Opaque`` asks for.
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
        self._unable: dict[str, str] = {}
        opaque = {backend.name: backend.run for backend in backends if backend.opaque}
        if bool(opaque) != (outputs is not None):
            raise ValueError(f"{name}: outputs are to be given where a backend is opaque, and only there")
        self._traced: dict[str, Callable[..., Any]] = {}
        if outputs is not None:
            call = Opaque(name, opaque, outputs, tuples).call
            self._traced = {each: functools.partial(call, each) for each in opaque}
        OPERATIONS[name] = self

    def choose(self, backend: str = "auto", **facts: Any) -> Callable[..., Any]:
        """The function to run for ``facts``. Raises :class:`BackendError` when a named backend cannot run."""
        if torch.compiler.is_compiling():  # lengths may be symbols: nothing is kept under them
            picked = self._pick(backend, facts)
            return self._traced.get(picked.name, picked.run)
        # one token asks dozens of times: the answer to the same question is kept
        question = (backend, _SETTINGS.get(_SETTING), *facts.items())
        chosen = self._chosen.get(question)
        if chosen is None:
            chosen = self._chosen[question] = self._pick(backend, facts)
        return chosen.run

    def instead(self, unable: str, reason: str, backend: str = "auto", **facts: Any) -> Callable[..., Any]:
        """The function to run where the backend ``unable`` was chosen for ``facts`` and raised :class:`Unable`.

        From now on ``"auto"`` takes another. Raises :class:`BackendError` when it was asked for by name.
        """
        self._unable[unable] = reason
        self._chosen.clear()
        run = self.choose(backend, **facts)
        if run is self.backends[unable].run:
            raise BackendError(f"{self.name}: {unable} was asked for and cannot run: {reason}")
        return run

    def why_not(self, backend: Backend, facts: dict[str, Any]) -> str | None:
        """Why ``"auto"`` does not take a backend, or ``None``."""
        return self._unable.get(backend.name) or backend.refuse(**facts)

    def _pick(self, name: str, facts: dict[str, Any]) -> Backend:
        source = f"backend={name!r}"
        if name == "auto":
            setting = _setting()
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


@constant
def _setting() -> str | None:
    return os.environ.get(VARIABLE)


def _from_environment(setting: str, operation: Operation) -> str:
    """The backend that ``setting`` names for ``operation``, or ``"auto"``; raises on a name nothing has."""
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


def table(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every operation with every backend: whether it can run on ``device`` with ``dtype``, and if not, why.

    Where the environment asks for what there is not, no backend of the operation is chosen and its rows say so.
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
            rows.append(Row(operation.name, backend.name, reason is None, reason or "", backend.name == chosen, error))
    return rows

"""``tb.memory``: state that is carried from call to call of a swapped model, in sight and in the caller's hands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.origin import Origin
from ...blocks.state import State, batch_size
from ...registry import show
from .error import SwapError
from .site import Site
from .storing import read_state, write_state

_active: ContextVar[tuple[Carried, ...]] = ContextVar("titans_build_memory", default=())


_entered: list[Carried] = []
"""Those that any thread is in just now."""


class SwappedState(NamedTuple):
    """The states of the memories in a swapped model: a tree like any state, with the batch row first."""

    sites: tuple[State, ...]
    """One for each site, in the order of ``names``."""
    origin: Tensor
    """``[batch]`` int64: the mark of the model's memories, by which states of others are refused."""


class Carried:
    """What ``tb.memory(model)`` gives: while its ``with`` block lasts, each call goes on where the one before ended.

    ``state`` is what the next call starts from, and may be taken, kept, changed with ``tb.state``, and put back;
    ``None`` is a fresh one. It belongs to the thread, or task, that has entered the block. Of a call that fails nothing
    is kept. A call with a transformers cache that has read something goes on from the cache; its states are left here,
    too. May be entered again, to go on.
    """

    def __init__(self, model: nn.Module, state: SwappedState | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"memory: model: expected a module, got {type(model).__name__}")
        model = getattr(model, "_orig_mod", model)  # of a compiled one, what was compiled
        found = {name: module for name, module in model.named_modules() if isinstance(module, Site)}
        if not found:
            raise SwapError(f"memory: {type(model).__name__} has no memory in it: tb.swap puts one in")
        self._sites = list(found.values())
        self._place = {site: index for index, site in enumerate(self._sites)}
        self.names = [name.removesuffix(f".{_last(name)}") if not site.stands_for_another else name
                      for name, site in found.items()]  # fmt: skip
        """Where the memories are: paths of the modules they were swapped into, in the order of ``state.sites``."""
        described = [(name, site.how, site.spec, _shapes(site)) for name, site in zip(self.names, self._sites)]
        self._origin = Origin(
            hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16],
            f"memories of {type(model).__name__}",
        )
        self._state: SwappedState | None = None
        self.state = state

    @property
    def state(self) -> SwappedState | None:
        """From which the next call starts. Assigning another model's raises ``SwapError``."""
        return self._state

    @state.setter
    def state(self, state: SwappedState | None) -> None:
        if state is not None:
            if not isinstance(state, SwappedState) or len(state.sites) != len(self._sites):
                raise SwapError(
                    f"memory: state: expected what m.state was, with {len(self._sites)} sites, got {_what(state)}"
                )
            try:
                self._origin.check(state.origin)
                batch_size(state)
            except ValueError as error:
                raise SwapError(f"memory: {error}") from None
        self._state = state

    def init_state(self, batch_size: int) -> SwappedState:
        """A fresh state of ``batch_size`` rows, as every call without one starts from."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {show(batch_size)}")
        states = tuple(site.block.init_state(batch_size) for site in self._sites)
        return SwappedState(states, self._origin.mark(batch_size, _device(self._sites)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``state`` to one safetensors file, replaced in one step. Raises ``StorageError``."""
        write_state(self.state, path, self)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a state that was saved, bit for bit. Raises ``StorageError`` for one of other memories."""
        self.state = read_state(path, self)

    @property
    def fingerprint(self) -> str:
        """16 hex digits, the same for models with the same memories in the same places."""
        return self._origin.number.to_bytes(8, "big", signed=True).hex()

    @property
    def grows(self) -> bool:
        """Whether a block's state grows with the tokens that it reads."""
        return any(site.block.grows for site in self._sites)

    def __enter__(self) -> Carried:
        _active.set((*_active.get(), self))
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        active = list(_active.get())
        active.reverse()
        active.remove(self)
        _active.set(tuple(reversed(active)))
        _entered.remove(self)

    # -- for frames ------------------------------------------------------------------------------------------------

    def holds(self, site: Site) -> bool:
        """Whether this carries the state of a site."""
        return site in self._place

    def of(self, site: Site) -> State:
        """The state that a site goes on from."""
        return None if self._state is None else self._state.sites[self._place[site]]

    def advance(self, states: Mapping[Site, State], rows: int) -> None:
        """A call of ``rows`` rows has ended well, and left these."""
        old = (None,) * len(self._sites) if self._state is None else self._state.sites
        new = tuple(states.get(site, before) for site, before in zip(self._sites, old))
        same = self._state is not None and len(self._state.origin) == rows
        origin = self._state.origin if same and self._state is not None else None
        if origin is None:
            origin = self._origin.mark(rows, _device(self._sites))
        self._state = SwappedState(new, origin)


def memory(model: nn.Module, state: SwappedState | None = None) -> Carried:
    """Carry the states of a swapped model's memories from call to call::

        with tb.memory(model) as m:
            model(first)
            before = m.state                    # a snapshot: nothing changes it
            model(second)                       # has read first and second
            m.state = before                    # as if second had not been read
        m.save("notes.safetensors")

    ``state``: what to start from; ``None`` for a fresh one. Raises ``SwapError`` for a model without memories.
    """
    return Carried(model, state)


def carried(site: Site) -> Carried | None:
    """The innermost block that carries the state of a site."""
    return next((context for context in reversed(_active.get()) if context.holds(site)), None)


def expect_not_elsewhere(site: Site) -> None:
    """Raise ``SwapError`` for a replica of a site whose state another thread carries, which would go on without it."""
    if getattr(site, "_is_replica", False) and any(site.key == s.key for one in _entered for s in one._sites):
        raise SwapError(
            f"{site.path}: nn.DataParallel runs copies of the model in threads of their own, which tb.memory does not "
            "reach: carry states in one process for each device (DistributedDataParallel), or call the model itself"
        )


def _shapes(site: Site) -> Any:
    with torch.no_grad():
        return _described(site.block.init_state(1)), sum(p.numel() for p in site.block.parameters())


def _described(state: State) -> Any:
    """A state's shapes, dtypes and the names of its parts, as plain data."""
    if isinstance(state, Tensor):
        return [list(state.shape), str(state.dtype)]
    if isinstance(state, tuple):
        return [type(state).__name__, *map(_described, state)]
    return None


def _device(sites: list[Site]) -> torch.device:
    found = (parameter.device for site in sites for parameter in site.parameters())
    return next(found, torch.device("cpu"))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _what(state: Any) -> str:
    return f"one with {len(state.sites)} sites" if isinstance(state, SwappedState) else type(state).__name__

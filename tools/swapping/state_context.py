"""``tb.memory``: the states of a swapped model's memories, carried from call to call, and saved in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.fingerprint import Fingerprint
from ...blocks.state import State, batch_size, named_tensors
from ...recipes.recipe import function_fields, original_fields
from ...recipes.saved_format import StorageError
from ...recipes.saved_state import expect_state, fill_state, read_state_file, write_state_file
from ...registry import show
from .adapter import SwapError, uncompiled
from .site import Gated, Result, Site

FORMAT = "titans-build memories"

_active: ContextVar[tuple[tuple[StateContext, Any], ...]] = ContextVar("titans_build_memory", default=())
"""The contexts that this thread has entered, each with the ``call.ModelCall`` around it."""
_entered: list[StateContext] = []
"""The contexts that any thread has entered."""
current_call: ContextVar[Any] = ContextVar("titans_build_model_call", default=None)
"""The innermost open ``call.ModelCall``."""


class SwappedState(NamedTuple):
    """The states of the memories in a swapped model: a tree like any state, with the batch row first."""

    sites: tuple[State, ...]
    """One for each memory, in the order of ``StateContext.names``."""
    origin: Tensor
    """``[batch]`` int64: the fingerprint of the model's memories, by which states of others are refused."""


class StateContext:
    """Carries the states of a swapped model's memories: each call continues from the one before::

        with tb.memory(model) as m:
            model(first)
            before = m.state                    # a snapshot: nothing changes it
            model(second)                       # has read first and second
            m.state = before                    # as if second had not been read
        m.save("notes.safetensors")

    ``state`` is what the next call starts from. It may be read, kept, changed with ``tb.state``, and assigned; ``None``
    is a fresh one. It belongs to the thread, or task, that has entered the block. A call that fails or is interrupted
    changes nothing. A call with a cache of transformers that has read tokens continues from the cache, and also stores
    its states here. The block may be entered again, to continue.

    ``names``: paths of the modules that the memories were swapped into, in the order of ``state.sites``.
    ``fingerprint``: 16 hex digits, the same for models with the same memories in the same places.

    Raises ``SwapError`` for a model without memories.
    """

    def __init__(self, model: nn.Module, state: SwappedState | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"memory: model: expected a module, got {type(model).__name__}")
        model = uncompiled(model)
        found = {name: module for name, module in model.named_modules() if isinstance(module, Site)}
        if not found:
            raise SwapError(f"memory: {type(model).__name__} has no memory in it: tb.swap puts one in")
        self._index = {site: index for index, site in enumerate(found.values())}
        self.names = [name.rpartition(".")[0] if isinstance(site, Gated) else name for name, site in found.items()]
        described: list[list[Any]] = []
        for name, site in zip(self.names, self._index):
            with torch.no_grad():
                shapes = _shapes(site.block.init_state(1))
            described.append(
                [name, site.how, original_fields(site.spec), [shapes, sum(p.numel() for p in site.block.parameters())]]
            )
        # of earlier versions, fields that change no function were a part
        self.earlier_fingerprint = _hash(described)
        self.fingerprint = _hash([[name, how, function_fields(spec), sizes] for name, how, spec, sizes in described])
        self._fingerprint = Fingerprint(
            self.fingerprint, f"memories of {type(model).__name__}", self.earlier_fingerprint
        )
        self.state = state

    @property
    def state(self) -> SwappedState | None:
        """What the next call starts from. Raises ``SwapError`` if a state of another model is assigned."""
        return self._state

    @state.setter
    def state(self, state: SwappedState | None) -> None:
        if state is not None:
            if not isinstance(state, SwappedState) or len(state.sites) != len(self._index):
                got = f"one with {len(state.sites)} sites" if isinstance(state, SwappedState) else type(state).__name__
                raise SwapError(f"memory: state: expected what m.state was, with {len(self._index)} sites, got {got}")
            try:
                self._fingerprint.check(state.origin)
                batch_size(state)
            except ValueError as error:
                raise SwapError(f"memory: {error}") from None
        self._state = state

    def init_state(self, batch_size: int) -> SwappedState:
        """A fresh state of ``batch_size`` rows, as every call without a state starts from."""
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {show(batch_size)}")
        devices = (parameter.device for site in self._index for parameter in site.parameters())
        mark = self._mark(batch_size, next(devices, torch.device("cpu")))
        return SwappedState(tuple(site.block.init_state(batch_size) for site in self._index), mark)

    def __enter__(self) -> StateContext:
        _active.set((*_active.get(), (self, current_call.get())))
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        active = list(_active.get())
        _, call = active.pop(max(index for index, (context, _) in enumerate(active) if context is self))
        _active.set(tuple(active))
        current_call.set(call)  # a call that was ended by KeyboardInterrupt is still open: hooks are not told of it
        _entered.remove(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``state`` to a safetensors file, which is replaced atomically.

        Raises ``StorageError`` if there is no state yet, and if the file cannot be written.
        """
        if self.state is None:
            raise StorageError(f"{path}: there is no state to save yet: the model has read nothing")
        try:
            batch_size(self.state)
        except ValueError as error:
            # an encoder that has read one row for each sequence, and a decoder one for each beam
            raise StorageError(f"{path}: not saved: {error}") from None
        names = ", ".join(self.names)
        write_state_file(path, FORMAT, dict(named_tensors(self.state)), fingerprint=self.fingerprint, sites=names)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a saved state, bit for bit, on the devices and in the dtypes of the model's states.

        Raises ``StorageError`` if the file is not a saved state, is damaged, or is of other memories.
        """
        metadata, tensors = read_state_file(path, FORMAT)
        if metadata.get("fingerprint") not in (self.fingerprint, self.earlier_fingerprint):
            raise StorageError(
                f"{path}: the state is of other memories: of {show(metadata.get('sites'))} "
                f"({metadata.get('fingerprint')}); the model's are {show(', '.join(self.names))} ({self.fingerprint})"
            )
        grows = any(site.block.grows for site in self._index)
        self.state = fill_state(expect_state(self.init_state, tensors, grows, str(path)), tensors)

    # -- for the calls of the model ------------------------------------------------------------------------------------

    def state_of(self, site: Site) -> State:
        """The state that a site continues from."""
        return None if self._state is None else self._state.sites[self._index[site]]

    def advance(self, results: Mapping[Site, Result]) -> None:
        """A call has succeeded, with these results."""
        _, rows, _, device, *_ = next(iter(results.values()))
        old = (None,) * len(self._index) if self._state is None else self._state.sites
        new = tuple(results[site].state if site in results else before for site, before in zip(self._index, old))
        mark = None if self._state is None else self._state.origin
        self._state = SwappedState(new, self._mark(rows, device) if mark is None or len(mark) != rows else mark)

    def _mark(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows,), self._fingerprint.number, dtype=torch.int64, device=device)


memory = StateContext


def restore(now: Mapping[str, State], before: Mapping[str, State]) -> None:
    """Go back in the contexts of this thread that have the states ``now`` of sites, by their keys.

    Raises ``SwapError`` if the state ``before`` is not known.
    """
    for context, _ in _active.get():
        if context._state is None:
            continue
        sites = dict(zip(context._index, context._state.sites))
        followed = {s for s, state in sites.items() if batch_size(state) and state is now.get(s.key)}
        if any(site.key not in before for site in followed):
            raise SwapError("crop: tb.memory cannot go back so far: assign an earlier m.state, and start a new cache")
        new = tuple(before[site.key] if site in followed else state for site, state in sites.items())
        context._state = context._state._replace(sites=new)


def active_context(site: Site) -> StateContext | None:
    """The innermost ``with`` block of this thread that carries the state of a site.

    Raises ``SwapError`` for a copy of a site by ``nn.DataParallel``, if another thread carries the state of the site.
    """
    found = next((context for context, _ in reversed(_active.get()) if site in context._index), None)
    is_copy = next(site.parameters(), None) is None  # whose parameters are plain attributes
    if found is None and is_copy and any(site.key == other.key for context in _entered for other in context._index):
        raise SwapError(
            f"{site.path}: nn.DataParallel runs copies of the model in other threads, and tb.memory belongs to one "
            "thread: use one process for each device (DistributedDataParallel), or call the model itself"
        )
    return found


def _hash(described: list[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _shapes(state: State) -> Any:
    """The shapes and dtypes of a state and the names of its parts, as plain data."""
    if isinstance(state, Tensor):
        return [list(state.shape), str(state.dtype)]
    return [type(state).__name__, *map(_shapes, state)] if isinstance(state, tuple) else None

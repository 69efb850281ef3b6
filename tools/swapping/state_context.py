"""``tb.memory``: the states of a swapped model's memories, carried from call to call, and kept in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...blocks.fingerprint import Fingerprint
from ...blocks.state import State, batch_size, map_state, named_tensors
from ...recipes.atomic_write import atomic_write
from ...recipes.saved_format import VERSION, StorageError, checksum, expect_version
from ...registry import show
from .adapter import SwapError
from .site import Gated, Site

FORMAT = "titans-build memories"

_active: ContextVar[tuple[tuple[StateContext, Any], ...]] = ContextVar("titans_build_memory", default=())
"""Those that this thread is in, each with the ``call.ModelCall`` around it."""
_entered: list[StateContext] = []
"""Those that any thread has entered."""
current_call: ContextVar[Any] = ContextVar("titans_build_model_call", default=None)
"""The innermost open ``call.ModelCall``."""


class SwappedState(NamedTuple):
    """The states of the memories in a swapped model: a tree like any state, with the batch row first."""

    sites: tuple[State, ...]
    """One for each site, in the order of ``names``."""
    origin: Tensor
    """``[batch]`` int64: the fingerprint of the model's memories, by which states of others are refused."""


class StateContext:
    """What ``tb.memory(model)`` returns: inside of its ``with`` block each call continues where the one before ended.

    ``state`` is what the next call starts from. It may be read, kept, changed with ``tb.state``, and assigned; ``None``
    is a fresh one. It belongs to the thread, or task, that has entered the block. A call that fails changes nothing. A
    call with a transformers cache that has read something continues from the cache; its states are left here, too. May
    be entered again, to continue.
    """

    def __init__(self, model: nn.Module, state: SwappedState | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"memory: model: expected a module, got {type(model).__name__}")
        model = getattr(model, "_orig_mod", model)  # of a compiled one, what was compiled
        found = {name: module for name, module in model.named_modules() if isinstance(module, Site)}
        if not found:
            raise SwapError(f"memory: {type(model).__name__} has no memory in it: tb.swap puts one in")
        self._index = {site: index for index, site in enumerate(found.values())}
        self.names = [name.rpartition(".")[0] if isinstance(site, Gated) else name for name, site in found.items()]
        """Where the memories are: paths of the modules they were swapped into, in the order of ``state.sites``."""
        described = [(name, site.how, site.spec, _shapes(site)) for name, site in zip(self.names, self._index)]
        self._fingerprint = Fingerprint(
            hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16],
            f"memories of {type(model).__name__}",
        )
        self._state: SwappedState | None = None
        self.state = state

    @property
    def state(self) -> SwappedState | None:
        """From which the next call starts. Raises ``SwapError`` when another model's is assigned."""
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
        """A fresh state of ``batch_size`` rows, as every call without one starts from."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {show(batch_size)}")
        return SwappedState(tuple(site.block.init_state(batch_size) for site in self._index), self._mark(batch_size))

    @property
    def fingerprint(self) -> str:
        """16 hex digits, the same for models with the same memories in the same places."""
        return self._fingerprint.number.to_bytes(8, "big", signed=True).hex()

    def __enter__(self) -> StateContext:
        _active.set((*_active.get(), (self, current_call.get())))
        _entered.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        active = list(_active.get())
        _, call = active.pop(max(index for index, (context, _) in enumerate(active) if context is self))
        _active.set(tuple(active))
        current_call.set(call)  # a call that KeyboardInterrupt ended in here is still open: hooks do not see it
        _entered.remove(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``state`` to one safetensors file, atomically.

        Raises ``StorageError`` where there is no state yet, and for a file that cannot be written.
        """
        place = Path(path)
        if self.state is None:
            raise StorageError(f"{place}: there is no state to save yet: the model has read nothing")
        try:
            batch_size(self.state)
        except ValueError as error:
            # an encoder that has read one row for each sequence, and a decoder one for each beam
            raise StorageError(f"{place}: not saved: {error}") from None
        tensors = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in named_tensors(self.state)
        }
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "sites": ", ".join(self.names),
            "checksum": checksum(tensors),
        }
        try:
            with atomic_write(place) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{place}: cannot be written: {getattr(error, 'strerror', None) or error}") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a state that was saved, bit for bit, on the devices and in the dtypes of the model's states.

        Raises ``StorageError`` for a file that is none, is damaged, or is of other memories.
        """
        place = Path(path)
        metadata, tensors = _read(place)
        if metadata.get("format") != FORMAT:
            raise StorageError(f"{place}: expected a file of format {FORMAT!r}, got {show(metadata.get('format'))}")
        expect_version(metadata.get("version"), place)
        if metadata.get("fingerprint") != self.fingerprint:
            raise StorageError(
                f"{place}: the state is of other memories: of {show(metadata.get('sites'))} "
                f"({metadata.get('fingerprint')}); the model's are {show(', '.join(self.names))} ({self.fingerprint})"
            )
        if metadata.get("checksum") != checksum(tensors):
            raise StorageError(f"{place}: damaged: the numbers in it are not those that were saved")
        rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors.values()}
        if len(rows) != 1 or 0 in rows:
            raise StorageError(f"{place}: damaged: its tensors disagree about the number of rows")
        with torch.no_grad():
            template = self.init_state(rows.pop())
        # a state that grows does so along dimension 1, time
        first_fixed = 2 if any(site.block.grows for site in self._index) else 1
        expected = dict(named_tensors(template))
        for name, fresh in expected.items():
            found = tensors.get(name)
            fixed = (0, *range(first_fixed, fresh.dim()))
            if found is None or found.dim() != fresh.dim() or any(found.shape[d] != fresh.shape[d] for d in fixed):
                got = "nothing" if found is None else list(found.shape)
                raise StorageError(f"{place}: {name} is {got}, expected {list(fresh.shape)}")
        names = iter(expected)
        self.state = map_state(lambda fresh: tensors[next(names)].to(fresh.device, fresh.dtype, copy=True), template)

    # -- for the calls of the model ------------------------------------------------------------------------------------

    def has(self, site: Site) -> bool:
        return site in self._index

    def state_of(self, site: Site) -> State:
        """The state that a site continues from."""
        return None if self._state is None else self._state.sites[self._index[site]]

    def advance(self, states: Mapping[Site, State], rows: int) -> None:
        """A call of ``rows`` rows has ended well, with these states."""
        old = (None,) * len(self._index) if self._state is None else self._state.sites
        new = tuple(states.get(site, before) for site, before in zip(self._index, old))
        same = self._state is not None and len(self._state.origin) == rows
        self._state = SwappedState(new, self._state.origin if same and self._state is not None else self._mark(rows))

    def _mark(self, rows: int) -> Tensor:
        devices = (parameter.device for site in self._index for parameter in site.parameters())
        return self._fingerprint.rows(rows, next(devices, torch.device("cpu")))


def memory(model: nn.Module, state: SwappedState | None = None) -> StateContext:
    """Carry the states of a swapped model's memories from call to call::

        with tb.memory(model) as m:
            model(first)
            before = m.state                    # a snapshot: nothing changes it
            model(second)                       # has read first and second
            m.state = before                    # as if second had not been read
        m.save("notes.safetensors")

    ``state``: what to start from; ``None`` for a fresh one. Raises ``SwapError`` for a model without memories.
    """
    return StateContext(model, state)


def active_context(site: Site) -> StateContext | None:
    """The innermost ``with`` block of this thread that carries the state of a site."""
    return next((context for context, _ in reversed(_active.get()) if context.has(site)), None)


def expect_no_replica(site: Site) -> None:
    """Raise ``SwapError`` for ``nn.DataParallel``'s copy of a site whose state another thread carries."""
    replica = next(site.parameters(), None) is None  # whose tensors are plain attributes
    if replica and any(site.key == other.key for context in _entered for other in context._index):
        raise SwapError(
            f"{site.path}: nn.DataParallel runs copies of the model in threads of their own, which tb.memory does not "
            "reach: carry states in one process for each device (DistributedDataParallel), or call the model itself"
        )


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not place.is_file():
        raise StorageError(f"{place}: {'not a file' if place.exists() else 'no such file'}; expected a saved state")
    try:
        with safe_open(place, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{place}: expected a whole safetensors file: {error}") from None


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

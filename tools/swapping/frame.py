"""One call of a swapped model: what its sites start from, which tokens are real, and where the new states go.

A frame is opened by the outermost call of a module that has sites in it, and closed when that call ends; a call that
fails leaves nothing behind. It is found through a context variable, so that threads, models inside of models and calls
one after the other do not mix.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...blocks.state import State, batch_size, trainable
from . import recomputing
from .caches import Read, as_cache, kept_in, leave_in, tokens_in
from .carrying import Carried, carried, expect_not_elsewhere
from .error import SwapError
from .masks import Mask, Scope, innermost, scope_of
from .site import Replacement, Site

_current: ContextVar[Frame | None] = ContextVar("titans_build_frame", default=None)


class _Call(NamedTuple):
    module: nn.Module
    scope: Scope
    error: tuple[BaseException | None, TracebackType | None]
    """What was being handled when the call began, and how far it had come: it may be raised again."""


class Frame:
    """The outermost call of ``opener``, and all that is inside of it."""

    def __init__(self, opener: nn.Module, outer: Frame | None, python: FrameType) -> None:
        self.opener, self.outer = opener, outer
        self.members = _members(opener)
        self.backward_pass = recomputing.backward_pass()
        self.recording = torch.is_grad_enabled()
        """Whether gradients may be taken, and parts of the call repeated: inside of a checkpoint none are recorded."""
        self.cache: Any = None
        self.past: int | None = None
        """Tokens that the cache had read before this call, where that is known."""
        self.before: dict[Site, State] = {}
        self.masks: dict[Site, list[Tensor | None]] = {}
        self._after: dict[Site, State] = {}
        self._read: dict[Site, Read] = {}
        self._calls: list[_Call] = []
        self._python: FrameType | None = python

    def is_running(self) -> bool:
        """Whether it is being executed by who asks: Ctrl-C ends a call without a word."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self._python:
                return True
            frame = frame.f_back
        return False

    # -- calls of modules ------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, named: Mapping[str, Any]) -> None:
        """A call of one of the members has begun."""
        scope = scope_of(module, named, any(call.scope.ends for call in self._calls))
        self._calls.append(_Call(module, scope, sys.exc_info()[1:]))
        if self.cache is None:
            self.cache = next((cache for cache in map(as_cache, named.values()) if cache is not None), None)
            if self.cache is not None:
                # one that turns up further inside was made by the model itself, for this call
                self.past = tokens_in(self.cache) if module is self.opener else 0

    def is_in(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` has begun and not ended."""
        return any(call.module is module for call in self._calls)

    def failed(self, module: nn.Module) -> bool:
        """Whether the call of ``module`` that ends now does so by an exception."""
        call = next((call for call in reversed(self._calls) if call.module is module), None)
        return call is None or any(now is not then for now, then in zip(sys.exc_info()[1:], call.error))

    def gives(self, output: Any) -> None:
        """A call has given this back: a cache that nothing was told of is one that the model has made for this call."""
        if self.cache is None and isinstance(output, Mapping | tuple | list):
            values = output.values() if isinstance(output, Mapping) else output
            self.cache = next((cache for cache in map(as_cache, values) if cache is not None), None)
            self.past = None if self.cache is None else 0

    def end(self, module: nn.Module, failed: bool) -> None:
        """The call of ``module`` has ended; the outermost one leaves the new states where they belong."""
        while self._calls and self._calls.pop().module is not module:
            pass
        if self._calls:
            return
        _current.set(self.outer)
        self._python = None
        try:
            if not failed and self._after:
                self._keep()
        finally:
            self.cache, self.outer = None, None
            self._after = {}

    def _keep(self) -> None:
        if self.cache is not None:
            leave_in(self.cache, self._after, self._read, self.opener)
        contexts: dict[Carried, dict[Site, State]] = {}
        for site, state in self._after.items():
            context = carried(site)
            if context is not None:
                contexts.setdefault(context, {})[site] = state
        for context, states in contexts.items():
            context.advance(states, self._read[next(iter(states))].rows)

    # -- calls of sites --------------------------------------------------------------------------------------------

    def run(self, site: Site, x: Tensor, padding: Any, again: bool) -> Tensor:
        """What the site's block makes of ``x`` [batch, time, dim]. ``padding``: a mask that came with the very call.

        ``again``: this repeats a part of a call that has ended, from what it started from, and changes nothing.
        """
        rows, time, dim = x.shape
        if dim != site.block.dim:
            raise SwapError(
                f"{site.path}: reads {list(x.shape)}, and the block in it is of dim {site.block.dim}: "
                f"say the width in the swap, dim={dim}"
            )
        if again:
            mask, state = self._mask_again(site, time), trainable(self.before.get(site))
        else:
            mask, state = self._mask(site, padding, rows, time), self._start(site, rows, time)
        y, after = site.run(x, state, mask)
        if not again:
            self._after[site] = after
            self._read[site] = Read(rows, time, x.device, x.dtype)
        return y

    def replaced(self, site: Replacement, args: tuple[Any, ...], kwargs: Mapping[str, Any], again: bool) -> Any:
        """What the caller of a replaced module gets."""
        adapter = site.adapter
        x = adapter.read(site, args, kwargs, site.path)
        y = self.run(site, x, adapter.own_padding(site, args, kwargs), again)
        return adapter.answer(site, args, kwargs, y, site.path)

    def _mask(self, site: Site, padding: Any, rows: int, time: int) -> Tensor | None:
        found = Mask(padding, hides=True) if isinstance(padding, Tensor) else innermost([c.scope for c in self._calls])
        mask = None if found is None else found.real(rows, time, self.past, site.path)
        if self.recording:
            self.masks.setdefault(site, []).append(mask)
        return mask

    def _mask_again(self, site: Site, time: int) -> Tensor | None:
        masks = [mask for mask in self.masks.get(site, [None]) if mask is None or mask.shape[1] == time] or [None]
        first = masks[0]
        for mask in masks[1:]:
            if (mask is None) != (first is None) or (mask is not None and not torch.equal(mask, first)):  # type: ignore[arg-type]
                raise SwapError(
                    f"{site.path}: was called several times with different masks in one call of the model, and is "
                    "run again by gradient checkpointing: which mask it was cannot be told"
                )
        return first

    def _start(self, site: Site, rows: int, time: int) -> State:
        """The state that the site goes on from; ``None`` for a fresh one."""
        context = carried(site)
        if context is None:
            expect_not_elsewhere(site)
        if site in self._after:
            if self.cache is not None or context is not None:
                raise SwapError(
                    f"{site.path}: called twice in one call of the model: which of the two a carried state belongs to "
                    "cannot be told; without a cache (use_cache=False) and outside of tb.memory each starts anew"
                )
            return None
        kept, state, where = None, None, "the cache"
        if self.cache is not None:
            kept = kept_in(self.cache, self.past, time)
        if kept is not None:
            state = kept.of(site)
        elif context is not None:
            state, where = context.of(site), "the state of tb.memory"
            if state is not None and self.backward_pass != -1:
                raise SwapError(
                    f"{site.path}: run again by reentrant checkpointing of the whole model, where the state it started "
                    "from is not known any more: use_reentrant=False keeps it"
                )
        found = batch_size(state)
        if found is None:
            return state
        if found != rows:
            raise SwapError(
                f"{site.path}: {where} has {found} rows and the call {rows}: select rows of it with tb.state.select"
            )
        if self.recording:
            self.before[site] = state
        return trainable(state) if torch.is_grad_enabled() else state


def joined(module: nn.Module) -> tuple[Frame | None, bool]:
    """The call that a call of ``module`` is part of, and whether it is repeated for a backward pass."""
    now = recomputing.backward_pass()
    frame = _current.get()
    while frame is not None:
        if frame.backward_pass == now and module in frame.members and frame.is_running():
            return frame, False
        frame = frame.outer
    if now != -1:
        frame = recomputing.repeated()
        if frame is not None and module in frame.members:
            return frame, True
    return None, False


def left(module: nn.Module) -> tuple[Frame | None, bool]:
    """The same for a call that ends. Whoever made it may have ended already, if it failed."""
    now = recomputing.backward_pass()
    frame = _current.get()
    while frame is not None:
        if frame.backward_pass == now and frame.is_in(module):
            return frame, False
        frame = frame.outer
    return joined(module)


def opened(module: nn.Module, python: FrameType) -> Frame:
    """A new frame for a call of ``module`` that is part of no other. ``python``: whoever calls it."""
    outer = _current.get()
    while outer is not None and not outer.is_running():
        outer = outer.outer
    frame = Frame(module, outer, python)
    _current.set(frame)
    return frame


def _members(opener: nn.Module) -> set[nn.Module]:
    """Every module in ``opener`` but those of blocks that were put in."""
    found: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [opener]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found.add(module)
            if not isinstance(module, Site):
                waiting.extend(module._modules.values())
    return found

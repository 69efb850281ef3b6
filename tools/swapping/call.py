"""One call of a swapped model: what its blocks start from, which tokens are real, and where the new states go.

Hooks tell of the calls of every module that has blocks in it. The outermost one opens a ``ModelCall`` in a context
variable, so that threads and models inside of models do not mix; calls inside of it join it. A call that fails leaves
nothing behind.

Gradient checkpointing runs parts of a model again, during a backward pass, long after the call they belong to. The
gradients reach such a part through what the call returned: a hook on each returned tensor remembers the call when its
gradient passes, and what is computed again starts from the state and mask of that call.

Imported with the first swap, since ``torch.compiler.disable`` loads torch's compiler. Blocks run as they are written,
and what is around them is compiled.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from ...blocks.state import State, batch_size, trainable
from .adapter import Arguments, SwapError
from .padding import Mask, Scope, innermost_mask, scope_of
from .site import Read, Replacement, Site, gated_sites
from .state_context import StateContext, active_context, current_call, expect_no_replica

_eager = functools.partial(
    torch.compiler.disable, reason="what a memory carries is kept in Python; compile the model without fullgraph=True"
)
_tracker = ModuleTracker()  # whose ``is_bw`` says whether a backward pass is running
_gradients_passed: weakref.WeakKeyDictionary[ModelCall, int] = weakref.WeakKeyDictionary()
"""The calls whose gradients have passed, the last one last, and in which thread."""


class ModelCall:
    """The call of ``opener``, the outermost module with blocks in it, and all calls inside of it."""

    def __init__(self, opener: nn.Module, outer: ModelCall | None) -> None:
        self.opener, self.outer = opener, outer
        self.members = _members(opener)
        self.in_backward = _tracker.is_bw
        self.may_repeat = torch.is_grad_enabled()
        """Whether gradients may be taken, and parts of the call repeated."""
        self.cache: Any = None
        self.past: int | None = None
        """Tokens that the cache had read before this call, where that is known."""
        self.running: dict[nn.Module, Scope] = {}
        """The modules whose calls have begun and not ended, the innermost last."""
        self._before: dict[Site, State] = {}
        self._masks: dict[Site, list[Tensor | None]] = {}
        self._after: dict[Site, State] = {}
        self._read: dict[Site, Read] = {}

    def begin(self, arguments: Arguments) -> None:
        """A call of one of the members has begun."""
        module = arguments.module
        inside_decoder = any(scope.new_sequence for scope in self.running.values())
        self.running[module] = scope_of(module, arguments.named, inside_decoder)
        if self.cache is None:
            self.cache = _cache_among(arguments.named.values())
            if self.cache is not None:
                from .cache import tokens_read

                # one that turns up further inside was made by the model itself, for this call
                self.past = tokens_read(self.cache) if module is self.opener else 0

    def end(self, module: nn.Module, output: Any) -> None:
        """The call of ``module`` has ended well. The outermost one puts the new states where they belong."""
        if self.cache is None and isinstance(output, Mapping | tuple | list):
            self.cache = _cache_among(output.values() if isinstance(output, Mapping) else output)
            self.past = None if self.cache is None else 0
        if next(iter(self.running)) is module and self._after:
            if self.cache is not None:
                from .cache import store_states

                store_states(self.cache, self._after, self._read, self.opener)
            contexts: dict[StateContext, dict[Site, State]] = {}
            for site, state in self._after.items():
                context = active_context(site)
                if context is not None:
                    contexts.setdefault(context, {})[site] = state
            for context, states in contexts.items():
                context.advance(states, self._read[next(iter(states))].rows)
        self.leave(module)

    def leave(self, module: nn.Module) -> None:
        """The call of ``module`` has ended, well or not."""
        while self.running.popitem()[0] is not module:
            pass
        if not self.running:
            current_call.set(self.outer)
            self.cache, self.outer, self._after = None, None, {}

    def run(self, site: Site, x: Tensor, arguments: Arguments, again: bool) -> Tensor:
        """What the site's block makes of ``x`` [batch, time, dim], read in a call with ``arguments``.

        ``again``: this repeats a part of a call that has ended, from what it started from, and changes nothing.
        """
        rows, time, dim = x.shape
        if dim != site.block.dim:
            raise SwapError(
                f"{site.path}: reads {list(x.shape)}, and the block in it is of dim {site.block.dim}: "
                f"give the width in the swap, dim={dim}"
            )
        if again:
            return site.run(x, trainable(self._before.get(site)), self._recorded_mask(site, time))[0]
        mask = self._mask(site, site.adapter.padding_mask(arguments), rows, time)
        state = self._start(site, rows, time)
        y, self._after[site] = site.run(x, state, mask)
        self._read[site] = Read(rows, time, x.device, x.dtype)
        return y

    def _mask(self, site: Site, padding: Any, rows: int, time: int) -> Tensor | None:
        if isinstance(padding, Tensor):
            found: Mask | None = Mask(padding, marks_padding=True)
        else:
            found = innermost_mask(reversed(self.running.values()))
        mask = None if found is None else found.real_tokens(rows, time, self.past, site.path)
        if self.may_repeat:
            self._masks.setdefault(site, []).append(mask)
        return mask

    def _recorded_mask(self, site: Site, time: int) -> Tensor | None:
        masks = [mask for mask in self._masks.get(site, ()) if mask is None or mask.shape[1] == time] or [None]
        first = masks[0]
        for mask in masks[1:]:
            if mask is not first and (mask is None or first is None or not torch.equal(mask, first)):
                raise SwapError(
                    f"{site.path}: was called several times with different masks in one call of the model, and is "
                    "run again by gradient checkpointing: which mask it was cannot be told"
                )
        return first

    def _start(self, site: Site, rows: int, time: int) -> State:
        """The state that the site continues from; ``None`` for a fresh one."""
        context = active_context(site)
        if context is None:
            expect_no_replica(site)
        if site in self._after:
            if self.cache is not None or context is not None:
                raise SwapError(
                    f"{site.path}: called twice in one call of the model: which of the two a carried state belongs to "
                    "cannot be told; without a cache (use_cache=False) and outside of tb.memory each starts anew"
                )
            return None
        layer, state, where = None, None, "the cache"
        if self.cache is not None:
            from .cache import stored_states

            layer = stored_states(self.cache, self.past, time)
        if layer is not None:
            state = layer.state_of(site)
        elif context is not None:
            state, where = context.state_of(site), "the state of tb.memory"
            if state is not None and self.in_backward:
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
        if self.may_repeat:
            self._before[site] = state
        return trainable(state) if torch.is_grad_enabled() else state


# -- hooks: plain functions, since models are copied and pickled with them --------------------------------------------


@_eager
def before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Join or open a call, and add what stands before the module."""
    arguments = Arguments(module, args, kwargs)
    joined = _joined(module)
    repeated = _repeated(module) if joined is None else None
    call = joined or repeated or ModelCall(module, current_call.get())
    if repeated is None:
        if joined is None:
            _open(call)
        call.begin(arguments)
    for site in gated_sites(module, "before"):
        x = site.adapter.read(arguments, site.path)
        y = call.run(site, x, arguments, again=repeated is not None)
        arguments = site.adapter.with_input(arguments, x + y.to(x.dtype))
    return arguments.args, arguments.kwargs


@_eager
def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add what stands beside and after the module, and end its call."""
    call, again = _running_or_repeated(module)
    if call is None:
        raise SwapError(f"{type(module).__name__}: called inside of its own call, or swapped while it was running")
    arguments = Arguments(module, args, kwargs)
    for site in gated_sites(module, "beside", "after"):
        beside = site.how == "beside"
        x = site.adapter.read(arguments, site.path) if beside else site.adapter.output(output, site.path)
        y = call.run(site, x, arguments, again)
        result = site.adapter.output(output, site.path)
        output = site.adapter.with_output(output, result + y.to(result.dtype))
    if torch.is_grad_enabled():
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(functools.partial(_gradient_passes, call))
    if not again:
        call.end(module, output)
    return output


@_eager
def after_any_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End the call of a module that has failed. Runs after every call, and finds nothing to end after the others."""
    call = _running(module)
    if call is not None:
        call.leave(module)


@_eager
def call_replacement(site: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a block in another module's place."""
    call, again = _running_or_repeated(site)
    if call is None:  # called past its hooks
        return site(*args, **kwargs)
    arguments = Arguments(site, args, kwargs)
    y = call.run(site, site.adapter.read(arguments, site.path), arguments, again)
    return site.adapter.returned(arguments, y, site.path)


def _open(call: ModelCall) -> None:
    if not call.in_backward:  # a backward pass through an earlier call is over, even if its outputs are kept
        for earlier in [reference() for reference in _gradients_passed.keyrefs()]:
            if earlier is not None and call.opener in earlier.members:
                _gradients_passed.pop(earlier, None)
    current_call.set(call)


def _joined(module: nn.Module) -> ModelCall | None:
    """The open call that a call of ``module`` is part of."""
    backward = _tracker.is_bw
    call = current_call.get()
    while call is not None:
        if call.in_backward == backward and module in call.members:
            if module not in call.running:
                return call
            # KeyboardInterrupt ended that call, which hooks do not see
            current_call.set(call.outer)
        call = call.outer
    return None


def _running(module: nn.Module) -> ModelCall | None:
    """The open call in which ``module`` is running."""
    backward = _tracker.is_bw
    call = current_call.get()
    while call is not None and not (call.in_backward == backward and module in call.running):
        call = call.outer
    return call


def _repeated(module: nn.Module) -> ModelCall | None:
    """The call that a forward during a backward pass repeats: the one whose gradients passed last, of this thread."""
    if not _tracker.is_bw:
        return None
    passed = [reference() for reference in reversed(_gradients_passed.keyrefs())]
    found = [call for call in passed if call is not None and module in call.members]
    here = threading.get_ident()
    return next((call for call in found if _gradients_passed.get(call) == here), found[0] if found else None)


def _running_or_repeated(module: nn.Module) -> tuple[ModelCall | None, bool]:
    call = _running(module)
    return (call, False) if call is not None else (_repeated(module), True)


def _gradient_passes(call: ModelCall, gradient: Tensor) -> None:
    _gradients_passed.pop(call, None)
    _gradients_passed[call] = threading.get_ident()


def _members(opener: nn.Module) -> set[nn.Module]:
    """Every module in ``opener`` but those of blocks that were put in."""
    found: set[nn.Module] = set()
    waiting = [opener]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            if not isinstance(module, Site):
                waiting.extend(module.children())
    return found


def _cache_among(values: Any) -> Any:
    """The cache of transformers among ``values``: of an encoder and a decoder, the decoder's own."""
    transformers: Any = sys.modules.get("transformers.cache_utils")  # no cache was made where it is not imported
    for value in values if transformers is not None else ():
        if isinstance(value, transformers.EncoderDecoderCache):
            value = value.self_attention_cache
        if isinstance(value, transformers.Cache):
            return value
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a module returns: tuples, lists, mappings, and objects of the model's own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        for item in vars(value).values():
            if isinstance(item, Tensor | Mapping | tuple | list):
                yield from _tensors(item)

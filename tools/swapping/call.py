"""One call of a swapped model: the states its blocks start from, the tokens that are real, and the new states.

Modules with blocks in them have forward hooks. The outermost of these modules opens a ``ModelCall`` in a context
variable, so that threads and nested models do not mix; calls inside it join it. A call that fails changes no state.

Gradient checkpointing runs parts of a model again during the backward pass, after the call has ended. To find that
call, a hook on each returned tensor remembers the call when its gradient passes; the recomputation starts from the
state and mask of that call.

Blocks run outside ``torch.compile``; the code around them is compiled.
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

from ...blocks import Block
from ...blocks.observers import active
from ...blocks.state import State, batch_size, trainable
from .adapter import NO_CONTINUOUS_BATCHING, Arguments, SwapError
from .documents import ONE_DOCUMENT, SEVERAL, PackedRows
from .padding import Mask, Scope, innermost_mask, scope_of
from .replay import REACH, Replay
from .site import Replacement, Result, Site, Stateless, gated_sites
from .state_context import active_context, current_call

_eager = functools.partial(
    torch.compiler.disable, reason="states are carried in Python objects; compile the model without fullgraph=True"
)
_tracker = ModuleTracker()  # whose ``is_bw`` says whether a backward pass is running
_gradients_passed: weakref.WeakKeyDictionary[ModelCall, int] = weakref.WeakKeyDictionary()
"""The calls whose gradients have passed, the latest last, and the thread in which they did."""


OWN_STATES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Arguments in which models of transformers take what the call before has returned."""


class ModelCall:
    """The call of ``opener``, the outermost module with blocks in it, and all calls inside it."""

    def __init__(self, opener: nn.Module, outer: ModelCall | None) -> None:
        self.opener, self.outer = opener, outer
        self.members = _members(opener)
        self.in_backward = _tracker.is_bw
        self.may_repeat = torch.is_grad_enabled()
        """Whether gradient checkpointing may run parts of the call again."""
        self.cache: Any = None
        """The ``cache.CallCache``, once one is found."""
        self.running: dict[nn.Module, Scope] = {}
        """The modules whose calls have begun and not ended, the innermost last."""
        self.packed = PackedRows()
        self._before: dict[Site, State] = {}
        self._masks: dict[Site, list[Tensor | None]] = {}
        self._results: dict[Site, Result] = {}

    def begin(self, arguments: Arguments) -> Arguments:
        """A call of one of the members has begun. Returns the arguments that it is to have."""
        inside_decoder = any(scope.new_sequence for scope in self.running.values())
        self.running[arguments.module] = scope_of(arguments.module, arguments.named, inside_decoder)
        # a cache that is not among the arguments of the opener was created inside this call
        self._look_for_cache(arguments.named.values(), created=arguments.module is not self.opener)
        if arguments.module is self.opener:
            self._expect_known_cache(arguments.named)
        return self.packed.begin(arguments, None if self.cache is None else self.cache.past)

    def end(self, module: nn.Module, output: Any) -> None:
        """The call of ``module`` has succeeded. That of the opener stores the new states."""
        if isinstance(output, Mapping | tuple | list):
            self._look_for_cache(output.values() if isinstance(output, Mapping) else output, created=True)
        if module is self.opener and self._results:
            self._expect_all_layers(output)
            if self.cache is not None:
                self.cache.store(self._results, self.opener)
            contexts = {site: active_context(site) for site in self._results}
            for context in {context for context in contexts.values() if context is not None}:
                context.advance({site: result for site, result in self._results.items() if contexts[site] is context})
        self.leave(module)

    def _expect_known_cache(self, named: Mapping[str, Any]) -> None:
        """Raise ``SwapError`` if the model goes on from a state of its own, which states of memories do not follow."""
        transformers: Any = sys.modules.get("transformers.modeling_utils")
        if self.cache is not None or transformers is None or not isinstance(self.opener, transformers.PreTrainedModel):
            return
        given = next((name for name in OWN_STATES if named.get(name) is not None), None)
        if given is not None and all(active_context(site) is None for site in self.members if isinstance(site, Site)):
            raise SwapError(
                f"{type(self.opener).__name__}: {given} ({type(named[given]).__name__}) is no cache of transformers, "
                "in which the states of memories are carried: use_cache=False, or tb.memory around the calls"
            )

    def _expect_all_layers(self, output: Any) -> None:
        """Raise ``SwapError`` for hidden states or attentions without the layers that blocks have taken the place of.

        transformers records them by the classes of modules.
        """
        replaced = [site for site in self._results if isinstance(site, Replacement)]
        config: Any = getattr(self.opener, "config", None)
        if not replaced or not hasattr(config, "get_text_config"):
            return
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        for name, wanted in (("hidden_states", layers + 1), ("attentions", layers)):
            found = output.get(name) if isinstance(output, Mapping) else None
            if isinstance(found, tuple) and 0 < len(found) < wanted:
                raise SwapError(
                    f"output_{name}: transformers recorded {len(found)} of {wanted}, without {replaced[0].path}, in "
                    "whose place a block is; a forward hook on the modules sees all of them"
                )

    def leave(self, module: nn.Module) -> None:
        """The call of ``module`` has ended, with or without success."""
        while self.running.popitem()[0] is not module:
            pass
        if not self.running:
            current_call.set(self.outer)
            self.cache, self.outer, self._results = None, None, {}

    def run(self, site: Site, x: Tensor, arguments: Arguments, again: bool) -> Tensor:
        """The output of the site for ``x`` [batch, time, dim], in a call of a module with ``arguments``.

        ``again``: the call has ended, and a part of it is run again. It starts from the same state and changes none.
        """
        rows, time, dim = x.shape
        if not isinstance(site.block, Block):
            raise SwapError(
                f"{site.path}: around its block there is a {type(site.block).__name__} now: PEFT's target_parameters "
                "adapts linear layers in blocks, and no other parameters; modules_to_save=['titans'] trains them all"
            )
        if dim != site.block.dim:
            raise SwapError(
                f"{site.path}: reads {list(x.shape)}, and the block in it is of dim {site.block.dim}: "
                f"give the width in the swap, dim={dim}"
            )
        if again:
            mask = self._recorded_mask(site, time)
            return site.run(x, trainable(self._before.get(site)), mask, self.packed.documents(site, x, mask))[0]
        mask = self._mask(site, site.adapter.padding_mask(arguments), rows, time)
        state = self._start(site, rows, time)
        if self.cache is None or torch.is_grad_enabled():
            y, after = site.run(x, state, mask, self.packed.documents(site, x, mask))
            replays: tuple[Replay, ...] = ()
        else:
            y, after, replays = _run_and_keep(site, x, state, mask)
        self._results[site] = Result(after, rows, time, x.device, x.dtype, replays)
        return y

    def _look_for_cache(self, values: Any, created: bool) -> None:
        transformers: Any = sys.modules.get("transformers.cache_utils")  # no cache was made if it is not imported
        batching: Any = sys.modules.get("transformers.generation.continuous_batching")
        if self.cache is not None or transformers is None:
            return
        for value in values:
            if isinstance(value, transformers.EncoderDecoderCache):
                value = value.self_attention_cache  # the decoder's own
            if batching is not None and isinstance(value, batching.PagedAttentionCache):
                raise SwapError(NO_CONTINUOUS_BATCHING)
            if isinstance(value, transformers.Cache):
                from .cache import CallCache

                self.cache = CallCache(value, created)
                return

    def _mask(self, site: Site, padding: Any, rows: int, time: int) -> Tensor | None:
        if isinstance(padding, Tensor):
            found: Mask | None = Mask(padding, marks_padding=True)
        else:
            found = innermost_mask(reversed(self.running.values()))
        past = None if self.cache is None else self.cache.past
        mask = None if found is None else found.real_tokens(rows, time, past, site.path)
        if self.may_repeat:
            self._masks.setdefault(site, []).append(mask)
        return mask

    def _recorded_mask(self, site: Site, time: int) -> Tensor | None:
        masks = [mask for mask in self._masks.get(site, ()) if mask is None or mask.shape[1] == time] or [None]
        for mask in masks[1:]:
            if mask is not masks[0] and (mask is None or masks[0] is None or not torch.equal(mask, masks[0])):
                raise SwapError(
                    f"{site.path}: was called several times with different masks in one call of the model, and "
                    "gradient checkpointing runs one of these calls again: which one is unknown"
                )
        return masks[0]

    def _start(self, site: Site, rows: int, time: int) -> State:
        """The state that the site continues from; ``None`` for a fresh one."""
        context = active_context(site)
        if self.packed.ids is not None and (self.cache is not None or context is not None):
            where = "tb.memory" if self.cache is None else "a cache"
            raise SwapError(f"{site.path}: {SEVERAL}, and {where}: a carried state is of one document. {ONE_DOCUMENT}")
        if site in self._results:
            if self.cache is not None or context is not None:
                raise SwapError(
                    f"{site.path}: called twice in one call of the model: it is ambiguous which of the two a carried "
                    "state belongs to; without a cache (use_cache=False) and outside tb.memory each starts fresh"
                )
            return None
        if self.cache is not None and self.cache.has_read(time):
            state, where = self.cache.state_of(site), "the cache"
        else:
            state, where = None if context is None else context.state_of(site), "the state of tb.memory"
            if state is not None and self.in_backward:
                raise SwapError(
                    f"{site.path}: reentrant checkpointing runs the whole model again, and the state it started from "
                    "is not known any more: use_reentrant=False keeps it"
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


def _run_and_keep(site: Site, x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State, tuple[Replay, ...]]:
    """As ``site.run``, and what is needed to go back. Of long calls, which are run in two parts, the last is kept."""
    cut = max(x.shape[1] - REACH, 0)
    if isinstance(site.block, Stateless):
        return (*site.run(x, state, mask), ())
    if cut and active:  # observers see one call
        return (*site.run(x, state, mask), (Replay(site.advance, state, (), ()),))
    if cut == 0:
        return (*site.run(x, state, mask), (Replay(site.advance, state, (x.clone(),), (mask,)),))
    masks = (None, None) if mask is None else (mask[:, :cut], mask[:, cut:])
    begin, middle = site.run(x[:, :cut], state, masks[0])
    end, after = site.run(x[:, cut:], middle, masks[1])
    kept = Replay(site.advance, middle, (x[:, cut:].clone(),), masks[1:])
    return torch.cat([begin, end], dim=1), after, (Replay(site.advance, state, (), ()), kept)


# -- hooks: functions of this module, since models are copied and pickled with them -----------------------------------


@_eager
def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Join or open a call, and add the blocks before the module."""
    arguments = Arguments(module, args, kwargs)
    call, again = _find_call(module, running=False)
    if call is None:
        call, again = _open(module), False
    arguments = call.packed.again(arguments) if again else call.begin(arguments)
    for site in gated_sites(module, "before"):
        x = site.adapter.read(arguments, site.path)
        y = call.run(site, x, arguments, again)
        arguments = site.adapter.with_input(arguments, x + y.to(x.dtype))
    return arguments.args, arguments.kwargs


@_eager
def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add the blocks beside and after the module, and end its call."""
    call, again = _find_call(module, running=True)
    if call is None:
        raise SwapError(f"{type(module).__name__}: called inside its own call, or swapped while it was running")
    arguments = Arguments(module, args, kwargs)
    for site in gated_sites(module, "beside", "after"):
        x = site.adapter.read(arguments, site.path) if site.how == "beside" else None
        result = site.adapter.output(output, site.path)
        y = call.run(site, result if x is None else x, arguments, again)
        output = site.adapter.with_output(output, result + y.to(result.dtype))
    if torch.is_grad_enabled():
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(functools.partial(_gradient_passes, call))
    if not again:
        call.end(module, output)
    return output


@_eager
def _after_any_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """End the call of a module that has failed. Runs after every call, and does nothing after the others."""
    call, again = _find_call(module, running=True)
    if call is not None and not again:
        call.leave(module)


HOOKS = (_before_forward, _after_forward, _after_any_forward)
"""The forward pre-hook, the forward hook, and the forward hook that is always called."""


@_eager
def call_replacement(site: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a block in another module's place."""
    call, again = _find_call(site, running=True)
    if call is None:  # forward was called directly, without the hooks
        return site(*args, **kwargs)
    arguments = Arguments(site, args, kwargs)
    y = call.run(site, site.adapter.read(arguments, site.path), arguments, again)
    return site.adapter.returned(arguments, y, site.path)


def _open(module: nn.Module) -> ModelCall:
    call = ModelCall(module, current_call.get())
    if not call.in_backward:  # a backward pass through an earlier call is over, even if its outputs are kept
        for earlier in _calls_with_gradients():
            if module in earlier.members:
                _gradients_passed.pop(earlier, None)
    current_call.set(call)
    return call


def _find_call(module: nn.Module, running: bool) -> tuple[ModelCall | None, bool]:
    """The innermost open call that ``module`` is a member of, and is ``running`` in or not.

    If there is none, and a backward pass is running: the call that is run again, and true.
    """
    call = current_call.get()
    while call is not None:
        if call.in_backward == _tracker.is_bw and module in call.members:
            if (module in call.running) == running:
                return call, False
            if not running:  # KeyboardInterrupt ended that call, of which hooks are not told
                current_call.set(call.outer)
        call = call.outer
    if not _tracker.is_bw:
        return None, False
    # the call whose gradients passed last, of this thread if there is one
    found = [call for call in reversed(_calls_with_gradients()) if module in call.members]
    here = threading.get_ident()
    return next((call for call in found if _gradients_passed.get(call) == here), found[0] if found else None), True


def _calls_with_gradients() -> list[ModelCall]:
    return [call for reference in _gradients_passed.keyrefs() if (call := reference()) is not None]


def _gradient_passes(call: ModelCall, gradient: Tensor) -> None:
    _gradients_passed.pop(call, None)
    _gradients_passed[call] = threading.get_ident()


def _members(opener: nn.Module) -> set[nn.Module]:
    """All modules in ``opener``, without those inside sites."""
    found: set[nn.Module] = set()
    waiting = [opener]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            if not isinstance(module, Site):
                waiting.extend(module.children())
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a module returns: a tensor, a container, or an object with tensors as attributes."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | tuple | list):
        value = [item for item in vars(value).values() if isinstance(item, Tensor | Mapping | tuple | list)]
    for item in value if isinstance(value, tuple | list) else ():
        yield from _tensors(item)

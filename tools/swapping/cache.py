"""States of memories in a cache of transformers.

A cache is a list of layers, and beam search, copies and repeated rows call methods of each layer. A ``StateLayer`` at
the end of the list makes the states follow the keys and values. This file imports transformers, and is itself imported
once a call has a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...blocks.state import State, batch_size, select
from .adapter import SwapError
from .replay import REACH, UNKNOWN, Record, Replay
from .site import Replacement, Result, Site
from .state_context import restore


class StateLayer(CacheLayerMixin):
    """States by name, and the number of tokens that they have read. Has no keys and values.

    It keeps what was read last, so that ``crop`` can go back. Without states, it takes the place of the layer of a
    replaced attention.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self, states: Mapping[str, State] | None = None, tokens: int = 0, records: Sequence[Record] = ()
    ) -> None:
        super().__init__()
        self.states, self.tokens = dict(states or {}), tokens
        self.records, self._ended = tuple(records), False

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer:
        return type(self)(self.states, self.tokens, self.records)  # states are never modified

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"records": ()}  # which hold the blocks

    def advance(self, states: Mapping[str, State], records: Sequence[Record]) -> None:
        """Set states after more tokens, which ``records`` are of."""
        self.states = {**self.states, **states}
        for record in records:
            self.tokens += record.tokens
            last = self.records[-1] if self.records and not self._ended else None
            if last and last.tokens + record.tokens <= REACH and last.replays.keys() == record.replays.keys():
                replays = {name: last.replays[name].then(replay) for name, replay in record.replays.items()}
                self.records = (*self.records[:-1], Record(last.tokens + record.tokens, replays))
            else:
                self.records = (*self.records, record)[-2:]
            self._ended = False

    def lazy_initialization(self, *states: Tensor) -> None:
        """There are no keys and values to initialize."""

    def update(self, *states: Any, **kwargs: Any) -> Any:
        raise SwapError("this layer of the cache has no keys and values: the cache is of another model")

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.tokens + (len(query_length) if isinstance(query_length, Tensor) else query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.states, self.tokens, self.records = {}, 0, ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {name: select(state, indices) for name, state in self.states.items()}
        self.records = ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next((rows for rows in map(batch_size, self.states.values()) if rows is not None), 0)
        if rows:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number: those of the last call, and of short calls before it.

        Raises ``SwapError`` for tokens that were read earlier, with gradients, or before rows were selected.
        """
        removed, kept, undone = -tokens_to_remove, list(self.records), dict[str, tuple[Replay, int]]()
        if not 0 <= removed <= self.tokens:
            raise SwapError(f"crop({tokens_to_remove}): expected 0 to {-self.tokens}, the tokens that were read")
        self._ended = True
        if removed == 0:
            return
        left = removed
        while left and kept:
            record = kept.pop()
            stays = max(record.tokens - left, 0)
            undone |= {name: (replay, stays) for name, replay in record.replays.items()}
            left -= record.tokens - stays
            if stays:
                replays = {name: replay.first(stays) for name, replay in record.replays.items()}
                kept.append(Record(stays, replays))
        stateful = any(batch_size(state) is not None for state in self.states.values())
        if left and stateful and removed < self.tokens:
            raise SwapError(
                f"crop({tokens_to_remove}): a memory can forget the last {removed - left} of the {self.tokens} tokens "
                "that it has read: those of the last call, and of short calls before it, unless rows were selected "
                "since; copy.deepcopy(cache) before reading more"
            )
        before: dict[str, State] = {}
        try:
            if left == 0 or not stateful:
                before = self.states | {name: replay.after(stays) for name, (replay, stays) in undone.items()}
        except SwapError as error:
            if removed < self.tokens:
                raise SwapError(f"crop({tokens_to_remove}): {error}") from None
        restore(self.states, before)
        self.states = before if removed < self.tokens else {}
        self.tokens -= removed
        self.records = tuple(kept) if self.tokens else ()


class MemoryLayer(StateLayer):
    """In a cache with keys and values. A cache of fixed size stays one with it, so that masks are made for its size."""

    is_compileable = True


class CallCache:
    """The cache of one call of a swapped model.

    ``past``: the number of tokens that it had read before the call; 0 if the call itself created it.
    """

    def __init__(self, cache: Any, created: bool) -> None:
        self.cache, layer = cache, _state_layer(cache)
        read = 0 if created else _tokens_read(cache)
        self.past = read if read is not None else layer.tokens if layer is not None else 0

    def has_read(self, time: int) -> bool:
        """Whether the memories have read tokens in it. ``time``: tokens of this call.

        Raises ``SwapError`` for a cache that has read tokens which the memories have not.
        """
        layer = _state_layer(self.cache)
        if layer is not None and layer.tokens:
            if self.past != layer.tokens:
                raise SwapError(
                    f"the cache holds {self.past} tokens, and the memory's states in it have read {layer.tokens}: it "
                    "was cropped in part, or a call failed: start a new cache"
                )
            return True
        # the layers that this call has passed already have stored its keys
        read = _tokens_read(self.cache)
        if self.past or read not in (None, 0, time):
            raise SwapError(
                f"the cache has read {self.past or read} tokens without the memory: it is of "
                "another model, of this one before the swap, or of prefix tuning (prompt tuning works)"
            )
        return False

    def state_of(self, site: Site) -> State:
        """The state of a site after the tokens that were read. Raises ``SwapError`` for a cache of another model."""
        layer = _state_layer(self.cache)
        if layer is None or site.key not in layer.states:
            raise SwapError(
                f"{site.path}: the cache has read {self.past} tokens and holds no state of this memory: "
                "it is of another model, or of this one before the swap; start a new cache"
            )
        return layer.states[site.key]

    def store(self, results: Mapping[Site, Result], opener: nn.Module) -> None:
        """Put the states after the call into the cache. Counts the tokens of layers whose attention was replaced."""
        layers, layer = self.cache.layers, _state_layer(self.cache)
        if layer is None:
            layer = MemoryLayer()
            replicate = self.cache.layer_class_to_replicate
            if replicate is not None:  # layers are created when they are first used: create all, to append the states
                roots = (opener, *(site.original for site in results if isinstance(site, Replacement)))
                count = 1 + max(_index(module) or 0 for root in roots for module in root.modules())
                layers.extend(replicate() for _ in range(count - len(layers)))
            layers.append(layer)
            if hasattr(self.cache, "set_linear_cache"):  # MiniMax's, which has a second list as long as the layers
                self.cache.set_linear_cache(len(layers) - 1, [])
        for site, (_, rows, time, device, dtype, _) in results.items():
            replaced = site.original.modules() if isinstance(site, Replacement) else ()
            indices = set(map(_index, replaced))
            for index in indices & set(range(len(layers))):
                if hasattr(layers[index], "max_cache_len"):  # a fixed size, for which masks are made
                    nothing = torch.zeros(rows, 1, time, 1, device=device, dtype=dtype)
                    layers[index].update(nothing, nothing)
                    continue
                if not isinstance(layers[index], StateLayer):
                    layers[index] = MemoryLayer()
                layers[index].tokens += time
        read = _tokens_read(self.cache)
        tokens = max(result.time for result in results.values()) if read is None else read - layer.tokens
        layer.advance({site.key: result.state for site, result in results.items()}, _records(results, tokens))


def _records(results: Mapping[Site, Result], tokens: int) -> list[Record]:
    """What was read in one call of the model, of ``tokens`` tokens."""
    last: dict[str, Replay] = {}
    first: dict[str, Replay] = {}
    for site, result in results.items():
        if batch_size(result.state) is None:
            continue
        known = result.time == tokens and len(result.replays) == (2 if tokens > REACH else 1)
        last[site.key] = result.replays[-1] if known else UNKNOWN
        first[site.key] = result.replays[0]._replace(x=(), mask=()) if result.replays else UNKNOWN
    if tokens > REACH:
        return [Record(tokens - REACH, first), Record(REACH, last)]
    return [Record(tokens, {name: first[name] if replay is UNKNOWN else replay for name, replay in last.items()})]


def _tokens_read(cache: Any) -> int | None:
    """``None`` if none of its layers counts tokens: linear attention does not, nor does a layer without keys."""
    states = _state_layer(cache)
    counts = [
        layer
        for layer in cache.layers
        if isinstance(layer, CacheLayerMixin)
        and layer is not states
        and (layer.is_initialized or isinstance(layer, StateLayer))
    ]
    return next(filter(None, (int(layer.get_seq_length()) for layer in counts)), 0) if counts else None


def _index(module: nn.Module) -> Any:
    """The layer of the cache in which ``module`` keeps its keys and values."""
    return getattr(module, "layer_idx", getattr(module, "layer_id", None))


def _state_layer(cache: Any) -> StateLayer | None:
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, StateLayer) else None

"""How layers of flash-linear-attention run as blocks: their cache, their state, and where their kernels can be had."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .package import package

Tensors: TypeAlias = "Tensor | tuple[Tensor, ...] | None"


class LayerState(NamedTuple):
    """What a layer keeps in its cache."""

    recurrent: Tensors
    """``[batch, heads, ...]`` float32 each: of the recurrence."""
    convolution: Tensors
    """``[batch, channels, width]`` each: the last inputs of its convolutions, in the model's dtype."""


class Cache:
    """A cache of one layer, as layers use one."""

    def __init__(self, state: LayerState | None) -> None:
        self.entry: dict[str, Any] | None = None
        if state is not None:
            self.entry = {"recurrent_state": state.recurrent, "conv_state": state.convolution}

    def __len__(self) -> int:
        return int(self.entry is not None)

    def __getitem__(self, layer_idx: int) -> dict[str, Any] | None:
        return self.entry

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update(self, **entry: Any) -> dict[str, Any]:
        self.entry = entry
        return entry


def layer(name: str, dim: int, **fields: Any) -> nn.Module:
    """A layer of the library, of width ``dim``. Raises ``ImportError`` that says how to install it."""
    with _in_silence():
        layers = package("fla.layers", "flash-linear-attention", "titans-build[fla]")
        found = getattr(layers, name, None)
        if found is None:
            raise ImportError(f"needs a flash-linear-attention that has {name}: pip install -U 'titans-build[fla]'")
        made: nn.Module = found(hidden_size=dim, layer_idx=0, **fields)
    return made


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Without warnings that there is no GPU, which is said where one is needed, and opinions on what was asked for."""
    logger = logging.getLogger("fla")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def run(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """A layer on ``x`` [batch, time, dim] after ``state``."""
    return _call(layer, x, Cache(state))


def begin(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """A layer on its first tokens, of which it is told that they are."""
    return _call(layer, x, Cache(None))


def run_with_stacked_states(layer: nn.Module, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
    """``run`` of a layer that stacks several recurrent states, ``[count, batch, ...]``, where blocks have the rows."""
    assert isinstance(state.recurrent, Tensor)
    stacked = state.recurrent.transpose(0, 1).contiguous()
    y, after = run(layer, x, LayerState(stacked, state.convolution))
    assert isinstance(after.recurrent, Tensor)
    return y, LayerState(after.recurrent.transpose(0, 1), after.convolution)


def _call(layer: nn.Module, x: Tensor, cache: Cache) -> tuple[Tensor, LayerState]:
    # the kernels for a few tokens are for evaluation, and have no backward
    layer.train(torch.is_grad_enabled())
    try:
        y = layer(x, past_key_values=cache, use_cache=True)[0]
    except AssertionError as error:  # some of its kernels do not take every dtype
        raise ValueError(f"{type(layer).__name__} of flash-linear-attention, given {x.dtype}: {error}") from error
    assert cache.entry is not None
    kept = (cache.entry["recurrent_state"], cache.entry.get("conv_state"))
    return y, LayerState(*(tuple(part) if isinstance(part, list) else part for part in kept))


def zeros(layer: Any, rows: int, *recurrent: tuple[int, ...]) -> LayerState:
    """The fresh state of a layer: recurrent states of these shapes, and what its short convolutions keep."""
    weight = next(layer.parameters())
    states = tuple(weight.new_zeros(rows, *shape, dtype=torch.float32) for shape in recurrent)
    kept = tuple(
        weight.new_zeros(rows, convolution.in_channels, convolution.kernel_size[0])
        for convolution in layer.children()
        if isinstance(convolution, nn.Conv1d)
    )
    return LayerState(states if len(states) > 1 else states[0], kept or None)


def refuse(device: torch.device) -> str | None:
    """The library's kernels are Triton: they run on a GPU, or slowly in Triton's interpreter."""
    if device.type in ("cuda", "xpu", "meta") or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the kernels of flash-linear-attention run on a GPU, not on {device.type}: build it with device cuda, "
        "or put another block in its place"
    )

"""Heads shared out over the ranks of a mesh's ``tensor``: each rank computes its own heads of every block.

The parameters of a block are sliced when it is called. A block with heads has linear layers that read the inputs, which
all ranks have, and linear layers that write the outputs, which are summed over the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from .attention import Attention, AttentionState
from .block import Block, child_blocks
from .collectives import Copy, Ranks, Sum, WholeHeads
from .combinators import Chain, Gate, Layer, Persistent, Residual
from .context import Context, ContextState
from .feedforward import FeedForward
from .memory import NeuralMemory, NeuralMemoryState
from .state import State, map_state

Place = tuple[int, tuple[int, ...]]
"""A dimension, and the sizes of its sections, of each of which every rank has an equal part."""


class Heads(NamedTuple):
    """How a block is divided."""

    problem: str | None
    """Why the ranks cannot share it."""
    inputs: tuple[str, ...]
    """Linear layers that read the inputs."""
    output: str
    """The linear layer whose outputs are summed."""
    parameters: dict[str, Place | None]
    """Where the heads are in each parameter; ``None`` for one that all heads have in common."""


@functools.singledispatch
def divide(block: Block, size: int) -> Heads | None:
    """How ``size`` ranks share a block. ``None``: each rank computes all of it."""
    return None


@divide.register
def _(block: Attention, size: int) -> Heads:
    rows = (block.heads * block.head_dim, *[block.kv_heads * block.head_dim] * 2)
    parameters: dict[str, Place | None] = {"qkv.weight": (0, rows), "out.weight": (1, rows[:1])}
    if block.gain is not None:
        parameters["gain"] = 0, (block.heads, block.kv_heads)
    return Heads(_problem(size, heads=block.heads, kv_heads=block.kv_heads), ("qkv",), "out", parameters)


@divide.register
def _(block: FeedForward, size: int) -> Heads | None:
    hidden = block.down.in_features
    if hidden % size:
        return None
    up = (hidden,) * (block.up.out_features // hidden)
    return Heads(None, ("up",), "down", {"up.weight": (0, up), "down.weight": (1, (hidden,))})


@divide.register
def _(block: NeuralMemory, size: int) -> Heads:
    channels, gates = (block.dim,) * (block.channels // block.dim), gate_sections(block)
    parameters: dict[str, Place | None] = {
        "qkv.weight": (0, channels), "convolution": (0, channels), "controls.weight": (0, gates),
        "controls.bias": (0, gates), "output_gate.weight": (0, (block.dim,)), "output.weight": (1, (block.dim,)),
        "coefficients": None,
    }  # fmt: skip
    for name, parameter in block.named_parameters():
        if name.startswith("initial") or name in ("norm_gain", "output_gain"):
            parameters[name] = 0, (parameter.shape[0],)
    present = {name: place for name, place in parameters.items() if name in dict(block.named_parameters())}
    return Heads(_problem(size, heads=block.heads), ("qkv", "controls", "output_gate"), "output", present)


def gate_sections(memory: NeuralMemory) -> tuple[int, ...]:
    """The sections of ``controls``, each with something of every head."""
    sections: list[int] = []
    for name, count in memory.gate_sizes.items():
        each = memory.rule is not None and memory.rule.steps == "each"
        together = name == "alpha" or (name == "theta" and each)  # [heads, count], and otherwise [count, heads]
        sections += [memory.heads * count] if together else [memory.heads] * count
    return tuple(sections)


def _problem(size: int, **numbers: int) -> str | None:
    for name, number in numbers.items():
        if number % size:
            return f"{name}: {number} cannot be shared by the {size} ranks of the mesh's tensor"
    return None


# -- parameters --------------------------------------------------------------------------------------------------------


class Part(Function):
    """This rank's part of a parameter. Gradients are averaged over the ranks, and each has one of its part only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor | None, dim: int, size: int) -> Tensor:
        ctx.index, ctx.dim, ctx.size, ctx.shape = index, dim, size, x.shape
        return x.view_as(x) if index is None else x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad * ctx.size
        if ctx.index is not None:
            grad = grad.new_zeros(ctx.shape).index_copy(ctx.dim, ctx.index, grad)
        return grad, None, None, None


class SharedHeads:
    """The heads of a layer's blocks, as this rank computes them. ``ranks``: those of ``tensor``.

    Raises ``ValueError`` for a number of heads that the ranks cannot share.
    """

    def __init__(self, layer: Layer, ranks: Ranks) -> None:
        self.ranks = ranks
        self._parts: dict[Block, list[tuple[str, Place | None]]] = {}
        for block in layer.blocks:
            parts: list[tuple[str, Place | None]] = []
            for path, leaf in _leaves(block, ""):
                heads = divide(leaf, ranks.size)
                if heads is None:
                    continue
                if heads.problem is not None:
                    raise ValueError(heads.problem)
                parts += [(f"{path}{name}", place) for name, place in heads.parameters.items()]
                self._install(leaf, heads)
            self._parts[block] = parts

    def _install(self, leaf: Any, heads: Heads) -> None:
        ranks = self.ranks
        for name in heads.inputs:
            layer: nn.Module = getattr(leaf, name)
            layer.register_forward_pre_hook(lambda module, x: (Copy.apply(ranks, x[0]),))
        getattr(leaf, heads.output).register_forward_hook(lambda module, x, y: Sum.apply(ranks, y))
        for name in ("heads", "kv_heads", "channels", "inner"):
            if hasattr(leaf, name):
                setattr(leaf, name, getattr(leaf, name) // ranks.size)

    def run(self, block: Block, x: Tensor, state: State, **named: Any) -> Any:
        """Call the block with this rank's part of its parameters."""
        parameters, mine = dict(block.named_parameters()), {}
        for name, place in self._parts[block]:
            dim, index = (0, None) if place is None else (place[0], self._index(place, parameters[name].device))
            mine[name] = Part.apply(parameters[name], index, dim, self.ranks.size)
        return functional_call(block, mine, (x, state), named)

    def _index(self, place: Place, device: torch.device) -> Tensor:
        return index_of(place[1], self.ranks.rank, self.ranks.size, device)


def index_of(sections: tuple[int, ...], rank: int, size: int, device: torch.device) -> Tensor:
    """The elements of a rank in a dimension with these sections."""
    parts, start = [], 0
    for section in sections:
        part = section // size
        parts.append(torch.arange(start + rank * part, start + (rank + 1) * part, device=device))
        start += section
    return torch.cat(parts)


def _leaves(block: Block, path: str) -> Iterator[tuple[str, Block]]:
    """The blocks inside that have heads, with their paths. What custom blocks contain is not divided."""
    if isinstance(block, (Chain, Gate, Residual, Persistent, Context)):
        for child in child_blocks(block):
            name = next(name for name, module in block.named_modules() if module is child)
            yield from _leaves(child, f"{path}{name}.")
    else:
        yield path, block


# -- states ------------------------------------------------------------------------------------------------------------


def map_heads(block: Any, state: State, function: Callable[[Tensor, Place], Tensor]) -> State:
    """Apply ``function`` to the tensors of a state that have heads. The sections are those of this rank."""
    if state is None:
        return None
    if isinstance(block, Layer):
        return tuple(map_heads(child, part, function) for child, part in zip(block.blocks, state))
    if isinstance(block, (Chain, Gate)):
        return tuple(map_heads(child, part, function) for child, part in zip(child_blocks(block), state))
    if isinstance(block, (Residual, Persistent)):
        return map_heads(block.of, state, function)
    if isinstance(block, Context):
        memory, snapshot = (map_heads(block.memory, part, function) for part in (state.memory, state.snapshot))
        return ContextState(memory, snapshot, map_heads(block.attend, state.attend, function), state.position)
    if isinstance(block, Attention):
        place = 2, (block.kv_heads,)
        parts = [x if x is None or x.dim() < 4 else function(x, place) for x in state]
        return AttentionState(*parts)
    if isinstance(block, NeuralMemory):
        inside = map_state(lambda x: function(x, (1, (block.heads,))) if x.dim() > 1 else x, state.memory)
        history, gates = state.convolution, state.gates
        channels = (block.inner,) * (block.channels // block.inner)
        return NeuralMemoryState(
            inside,
            None if history is None else function(history, (2, channels)),
            None if gates is None else function(gates, (1, gate_sections(block))),
        )
    return state


def part_of_state(layers: Any, states: tuple[State, ...], ranks: Ranks) -> tuple[State, ...]:
    """This rank's heads of the states of layers."""

    def part(x: Tensor, place: Place) -> Tensor:
        dim, sections = place
        whole = tuple(section * ranks.size for section in sections)
        x = Copy.apply(ranks, x) if x.requires_grad else x
        return x.index_select(dim, index_of(whole, ranks.rank, ranks.size, x.device))

    return tuple(map_heads(layer, state, part) for layer, state in zip(layers, states))


def whole_state(layers: Any, states: tuple[State, ...], ranks: Ranks) -> tuple[State, ...]:
    """The states of layers with the heads of all ranks."""

    def whole(x: Tensor, place: Place) -> Tensor:
        dim, sections = place
        found: Tensor = WholeHeads.apply(ranks, x, dim, sections)
        return found

    return tuple(map_heads(layer, state, whole) for layer, state in zip(layers, states))

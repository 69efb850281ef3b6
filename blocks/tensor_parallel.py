"""Heads shared out over the ranks of a mesh's ``tensor``: each rank computes its own heads of every block.

A block with heads has linear layers that read the inputs, which all ranks have, and linear layers that write the
outputs, which are summed over the ranks. Each rank stores an equal part of the rows or columns of a parameter that has
heads, as a ``DTensor``. They are those of its heads, unless the parameter has several sections, such as queries, keys
and values: ranks then exchange rows when the layer is called.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .attention import Attention, AttentionState
from .block import Block, child_blocks, is_sharded
from .collectives import Copy, Ranks, Sum, WholeHeads
from .combinators import Chain, Gate, Layer, Persistent, Residual
from .context import Context, ContextState
from .feedforward import FeedForward
from .memory import NeuralMemory, NeuralMemoryState
from .state import State, map_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Place = tuple[int, tuple[int, ...]]
"""A dimension, and the sizes of its sections, of each of which every rank uses an equal part; of none, it uses all."""

EVERYTHING: Place = (1, ())
"""The place of a matrix whose columns each rank stores a part of, and uses all of."""


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


def _replaced(leaf: Block, heads: Heads) -> str | None:
    """The problem of a linear layer that has other parameters than its own, as one with LoRA has."""
    for name in (*heads.inputs, heads.output):
        linear = getattr(leaf, name)
        if {at for at, _ in linear.named_parameters()} not in ({"weight"}, {"weight", "bias"}):
            kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
            return (
                f"{name}: expected a torch.nn.Linear, which the ranks of the mesh's tensor can share, got a {kind}: "
                "merge it (LoRA, a parametrization) into the weight, or use a mesh of data and context"
            )
    return None


# -- parameters --------------------------------------------------------------------------------------------------------


def share_heads(layers: Iterable[Layer], ranks: Ranks) -> list[dict[str, Place | None]]:
    """Make the blocks of layers compute this rank's heads. Returns, for each layer, the places of its parameters.

    Raises ``ValueError`` for what the ranks cannot share, before anything is changed.
    """
    found: list[list[tuple[str, Any, Heads]]] = []
    for layer in layers:
        leaves = [leaf for block in layer.blocks for leaf in _leaves(block)]
        divided = [(leaf, divide(leaf, ranks.size)) for leaf in leaves]
        names = {module: name for name, module in layer.named_modules()}
        found.append([(names[leaf], leaf, heads) for leaf, heads in divided if heads is not None])
    for number, named in enumerate(found):
        for name, leaf, heads in named:
            if problem := heads.problem or _replaced(leaf, heads):
                raise ValueError(f"layers.{number}.{name}.{problem}")
    for _, leaf, heads in itertools.chain(*found):
        for name in heads.inputs:
            linear: nn.Module = getattr(leaf, name)
            linear.register_forward_pre_hook(lambda module, x: (Copy.apply(ranks, x[0]),))
        getattr(leaf, heads.output).register_forward_hook(lambda module, x, y: Sum.apply(ranks, y))
        for name in ("heads", "kv_heads", "channels", "inner"):
            if hasattr(leaf, name):
                setattr(leaf, name, getattr(leaf, name) // ranks.size)
    return [
        {f"{path}.{name}": place for path, _, heads in divided for name, place in heads.parameters.items()}
        for divided in found
    ]


class _Slices:
    """What the ranks exchange of a parameter: each stores an equal part of a dimension, and uses other elements of it.

    Without sections, each uses all of it.
    """

    def __init__(self, parameter: Tensor, place: Place, ranks: Ranks) -> None:
        self.dim, sections = place
        count, device = parameter.shape[self.dim], parameter.device
        self.stored = count // ranks.size
        used = [
            index_of(sections, rank, ranks.size, device) if sections else torch.arange(count, device=device)
            for rank in range(ranks.size)
        ]
        self.given = [each[each // self.stored == ranks.rank] - ranks.rank * self.stored for each in used]
        """For each rank, those of this rank's elements that it uses."""
        self.taken = [int((used[ranks.rank] // self.stored == rank).sum()) for rank in range(ranks.size)]
        """The number of elements that this rank gets from each rank."""


class DividedParameters:
    """The parameters of a module, divided over the ranks of a mesh's ``tensor``.

    Args:
        names: those of the parameters, which become ``DTensor`` objects.
        places: their heads. A parameter without a place is whole on every rank. One whose place is ``None`` is, too,
            and each rank uses it for its own heads.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], places: dict[str, Place | None], mesh: DeviceMesh, ranks: Ranks
    ) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        self.module, self.names, self.ranks = module, names, ranks
        self.kept: dict[int, Tensor] | None = None
        """The exchanged parameters, while they do not change."""
        self.exchanged: dict[int, _Slices] = {}
        self.whole = [places.get(name) is None for name in names]
        self.factors = [1 if name not in places or places[name] == EVERYTHING else ranks.size for name in names]
        """Each rank has an equal share of the gradient of what all ranks compute."""
        made: dict[Tensor, nn.Parameter] = {}
        for i, name in enumerate(names):
            path, _, last = name.rpartition(".")
            owner, place = module.get_submodule(path), places.get(name)
            parameter: Any = getattr(owner, last)
            if place is not None and len(place[1]) != 1:
                self.exchanged[i] = _Slices(parameter, place, ranks)
            if parameter not in made:  # parameters may be tied
                placement = Replicate() if place is None else Shard(place[0])
                part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
                # a copy, so that the memory of the whole one is freed
                made[parameter] = nn.Parameter(part.clone(), requires_grad=parameter.requires_grad)
            owner.register_parameter(last, made[parameter])

    def bound(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the module, which is called with this rank's parameters."""
        call = MethodCall(self.module, method)

        def run(*args: Any, **named: Any) -> Any:
            tensors: dict[str, Any] = dict(self.module.named_parameters(remove_duplicate=False))
            parameters = [tensors[name] for name in self.names]
            if not is_sharded(parameters[0]):  # a method that calls another
                return method(*args, **named)
            used = Used.apply(self, *(parameter.to_local() for parameter in parameters))
            return functional_call(call, {f"of.{name}": x for name, x in zip(self.names, used)}, args, named)

        return run


class MethodCall(nn.Module):
    """A call of a method of a module, as a module whose parameters ``functional_call`` can replace."""

    def __init__(self, of: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.of, self.method = of, method

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.method(*args, **named)


class Used(Function):
    """Parameters as a rank uses them, from the parts that it stores."""

    @staticmethod
    def forward(ctx: Any, of: DividedParameters, *stored: Tensor) -> tuple[Tensor, ...]:
        ctx.of = of
        ctx.set_materialize_grads(False)
        used = [x.view_as(x) for x in stored]
        found = of.kept
        if not found:
            given = [[stored[i].index_select(each.dim, at) for at in each.given] for i, each in of.exchanged.items()]
            received = _exchange(of.ranks, of.exchanged, given, [each.taken for each in of.exchanged.values()])
            found = {i: torch.cat(list(parts), each.dim) for (i, each), parts in zip(of.exchanged.items(), received)}
            of.kept = None if of.kept is None else found
        for i, x in found.items():
            used[i] = x
        ctx.mark_non_differentiable(*(x for x, need in zip(used, ctx.needs_input_grad[1:]) if not need))
        return tuple(used)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        of, found = ctx.of, list(grads)
        whole = [(i, grad) for i, grad in enumerate(grads) if grad is not None and of.whole[i]]
        if whole:  # in one message
            total = of.ranks.sum(torch.cat([grad.flatten() for _, grad in whole]))
            for (i, grad), part in zip(whole, total.split([grad.numel() for _, grad in whole])):
                found[i] = part.view(grad.shape).to(grad.dtype)
        exchanged = {i: each for i, each in of.exchanged.items() if grads[i] is not None}
        given = [found[i].split(each.taken, each.dim) for i, each in exchanged.items()]
        counts = [[len(at) for at in each.given] for each in exchanged.values()]
        for (i, each), parts in zip(exchanged.items(), _exchange(of.ranks, exchanged, given, counts)):
            shape = list(grads[i].shape)
            shape[each.dim] = each.stored
            found[i] = grads[i].new_zeros(shape)
            for at, part in zip(each.given, parts):
                found[i].index_add_(each.dim, at, part)
        return None, *(None if x is None else x * factor for x, factor in zip(found, of.factors))


def _exchange(
    ranks: Ranks, slices: dict[int, _Slices], given: Sequence[Sequence[Tensor]], counts: Sequence[Sequence[int]]
) -> list[Sequence[Tensor]]:
    """Send ``given[i][rank]`` to each rank, and receive ``counts[i][rank]`` elements of tensor ``i`` from it."""
    if not given:
        return []
    like: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    for each, parts, count in zip(slices.values(), given, counts):
        for rank, number in enumerate(count):
            shape = list(parts[0].shape)
            shape[each.dim] = number
            like[rank].append(parts[0].new_empty(shape, device="meta"))
    return list(zip(*ranks.exchange(list(zip(*given)), like)))


def index_of(sections: tuple[int, ...], rank: int, size: int, device: torch.device) -> Tensor:
    """The elements of a rank in a dimension with these sections."""
    parts, start = [], 0
    for section in sections:
        part = section // size
        parts.append(torch.arange(start + rank * part, start + (rank + 1) * part, device=device))
        start += section
    return torch.cat(parts)


def _leaves(block: Block) -> Iterator[Block]:
    """The blocks inside that have heads. What custom blocks contain is not divided."""
    if isinstance(block, (Chain, Gate, Residual, Persistent, Context)):
        for child in child_blocks(block):
            yield from _leaves(child)
    else:
        yield block


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

"""The block: one interface that makes attention, memory, convolution and feed-forward networks interchangeable."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .freezing import thawed
from .observers import suppressed
from .state import State, map_state, nbytes


class _OfChildren:
    """An attribute that is computed from the blocks directly inside, until a class or an instance sets it."""

    def __init__(self, name: str, combine: Any) -> None:
        self.name, self.combine = name, combine

    def __get__(self, block: Any, owner: Any = None) -> Any:
        children = () if block is None else child_blocks(block)
        return self.combine(getattr(child, self.name) for child in children)


class Block(nn.Module):
    """A map ``(x, state) -> (y, state)`` over ``[batch, time, dim]``; subclass it and ``@register`` it.

    A subclass defines ``init_state``, ``forward`` and ``reset_parameters``. Its constructor takes ``dim`` first and
    everything else by keyword; that signature is its schema in a recipe. Fields typed ``Spec`` hold other blocks,
    created with ``create(field, dim=dim)``.

    The contract, which ``check_block`` tests:

    * any cut of the time axis gives the uncut outputs and final state; ``time = 1`` is decoding;
    * no output depends on a later token; no row depends on another row;
    * a token where ``mask`` is false leaves the state unchanged, and its output is zero;
    * inputs and states that are passed in are never modified;
    * a counter of tokens is an int64 tensor of the state named ``position``.

    Calling a block checks the inputs and the state before ``forward`` runs. A state is expected to have the structure,
    shapes and dtypes of ``init_state``.
    """

    grows: bool = cast(bool, _OfChildren("grows", any))
    """True if the state grows with the number of tokens. By default: if that of any block inside does."""

    period: int = cast(int, _OfChildren("period", lambda periods: math.lcm(*periods)))
    """Shifting all positions by a multiple of ``period`` leaves the outputs unchanged. By default: the least common
    multiple of the periods of the blocks inside."""

    delegates: tuple[str, ...] = ()
    """The fields of a wrapper that hold the blocks to which it passes on its tokens, ``read`` and ``write``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._first_parameter: tuple[nn.Module, str] | None = None
        self._expected_state: Expected | None = None

    def init_state(self, batch_size: int) -> State:
        """Return a fresh state of ``batch_size`` rows: learned initial values, not zeros. ``None``: stateless."""
        return None

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Process ``x`` [batch, time, dim]. ``mask`` [batch, time] bool: true at valid tokens. No ``state``: fresh."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, state, *, mask)")

    def __call__(self, x: Tensor, state: State = None, **named: Any) -> Any:
        check_input(self, x, named.get("mask"))
        # the state of a block inside is part of the one that was checked
        if torch.compiler.is_compiling() or _call.inside:
            return super().__call__(x, state, **named)
        if state is not None:
            check_state(self, state, x.shape[0])
        _call.inside = True
        try:
            return super().__call__(x, state, **named)
        finally:
            _call.inside = False

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """Return a fresh state that has seen persistent ``tokens`` [batch, count, dim], and the outputs at them.

        By default they are ordinary first tokens. Attention keeps them visible to all later tokens. On the meta device
        a bounded state has its shapes from the start, and nothing is computed (torch would import sympy for it).
        """
        if tokens.is_meta and not self.grows:
            return tokens, self.init_state(tokens.shape[0])
        # a fresh memory has written its persistent tokens, frozen or not; they are no part of the observed sequence
        with thawed(self), suppressed():
            return cast("tuple[Tensor, State]", self(tokens, self.init_state(tokens.shape[0])))

    def refuse(self, device: torch.device) -> str | None:
        """Return why this block cannot run on ``device``, or ``None`` if it can."""
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters this block owns, not those of child blocks. Must not depend on old values."""
        for child in self.children():
            _reset_own(child)

    def flops(self, length: int) -> int:
        """Forward FLOPs (a multiply-add counts 2) for one row of ``length`` tokens from a fresh state."""
        return count_flops(self, length)

    def state_bytes(self) -> int:
        """Bytes of state for one row."""
        with torch.no_grad():
            return nbytes(self.init_state(1))


@functools.singledispatch
def count_flops(block: Block, length: int) -> int:
    """``Block.flops`` by class: ``flops.py`` registers the built-in ones. By default the products with all matrices."""
    return 2 * length * sum(p.numel() for p in block.parameters() if p.dim() > 1)


class Memory(Protocol):
    """What a block defines in addition to stand where the neural memory stands."""

    def read(self, x: Tensor, state: State) -> Tensor:
        """Query the memory with each token of ``x`` [batch, time, dim] as if it came next. Writes nothing."""
        ...

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        """Return the state after all tokens of ``x`` were written: that of ``forward``."""
        ...


def as_memory(block: Block) -> Memory:
    """``block``, typed as a memory. Validation has made sure that it can read and write."""
    return cast(Memory, block)


class Blocks(nn.ModuleList):
    """Child blocks, in order: a ``ModuleList`` whose items type checkers know to be blocks."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]


def child_blocks(module: nn.Module) -> Iterator[Block]:
    """Yield the blocks directly inside ``module``, through other modules such as ``ModuleList``."""
    for child in module.children():
        if isinstance(child, Block):
            yield child
        else:
            yield from child_blocks(child)


def _reset_own(module: Any) -> None:
    if isinstance(module, Block):
        return
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    for child in module.children():
        _reset_own(child)


def as_rows(state: State, rows: int) -> State:
    """Expand a one-row state to ``rows`` rows without copying."""
    return map_state(lambda tensor: tensor.expand(rows, *tensor.shape[1:]), state)


# -- checks ------------------------------------------------------------------------------------------------------------


class _Call(threading.local):
    inside = False
    """True while a block of this thread runs."""


_call = _Call()


def check_call(block: Block, x: Tensor, state: State) -> None:
    """The checks of a call, for another method that takes inputs and a state: ``read`` of a memory."""
    check_input(block, x)
    if not (_call.inside or torch.compiler.is_compiling()):
        check_state(block, state, x.shape[0])


def check_input(block: Block, x: Tensor, mask: Tensor | None = None, name: str = "x") -> None:
    """Raise ``ValueError`` or ``TypeError``, naming the argument, unless ``x`` and ``mask`` fit the block.

    ``x`` must have the dtype and device of the block's parameters. Under autocast its dtype may differ.
    """
    kind = type(block).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{kind}: {name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != block.dim:
        raise ValueError(f"{kind}: {name} {list(x.shape)}: expected [batch, time, {block.dim}]")
    if not torch.compiler.is_compiling():
        like = _parameter(block)
        if like is not None and (x.dtype is not like.dtype or x.device != like.device):
            _check_like(block, x, name)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{kind}: mask: expected a tensor, got {type(mask).__name__}")
        if mask.device != x.device:
            raise ValueError(f"{kind}: mask is on {mask.device}: expected {x.device}, as {name} is")
        if mask.dtype != torch.bool:
            raise TypeError(f"{kind}: mask is {mask.dtype}: expected torch.bool, true at valid tokens")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"{kind}: mask {list(mask.shape)}: expected {list(x.shape[:2])}")


def _parameter(block: Any) -> Tensor | None:
    """The first floating-point parameter of the block. Where it was found is kept, for finding it takes long."""
    if block._first_parameter is None:
        floating = (name for name, parameter in block.named_parameters() if parameter.is_floating_point())
        path, _, name = next(floating, "").rpartition(".")
        # not registered as a child
        vars(block)["_first_parameter"] = block.get_submodule(path), name
    owner, name = block._first_parameter
    return getattr(owner, name) if name else None


def _check_like(block: Block, x: Tensor, name: str) -> None:
    """Compare with the parameters as they are now: modules may have been replaced."""
    block._first_parameter = None
    like, kind = _parameter(block), type(block).__name__
    if like is None:
        return
    autocast = x.is_floating_point() and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if not autocast and all(x.dtype != parameter.dtype for parameter in block.parameters()):
        raise TypeError(f"{kind}: {name} is {x.dtype}: expected {like.dtype}, as the block's parameters are")
    if x.device != like.device:
        raise ValueError(f"{kind}: {name} is on {x.device}: expected {like.device}, as the block's parameters are")


class Expected(NamedTuple):
    """The state that a module expects for some number of rows."""

    state: State
    """A tree as of ``init_state``, with a :class:`Leaf` for each tensor."""
    key: Any
    """What it was computed for."""


class Leaf:
    """Shape, dtype and device of one tensor of a state."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


def check_state(module: Any, state: State, rows: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``state`` is a state of ``module`` with ``rows`` rows.

    Structure, shapes, dtypes and devices must be those of ``init_state(rows)``, or of ``prefix`` where a block keeps
    persistent tokens apart. Dimension 1 may differ where the state grows. What is expected is computed once.
    """
    like = _parameter(module)
    key = (rows, None) if like is None else (rows, like.dtype, like.device)
    expected = module._expected_state
    if expected is None or expected.key != key:
        expected = module._expected_state = Expected(_describe(module, rows), key)
    if not (_fits(state, expected.state, False) or (module.grows and _fits(state, expected.state, True))):
        module._expected_state = None  # the module may have changed
        _Comparison(module, rows).run(state)


def _describe(module: Any, rows: int, prefix: bool = False) -> State:
    inside, _call.inside = _call.inside, True
    try:
        with torch.no_grad(), suppressed():
            if not prefix:
                return map_state(Leaf, module.init_state(rows))  # type: ignore[arg-type]
            like = _parameter(module)
            tokens = torch.zeros(rows, 1, module.dim) if like is None else like.new_zeros(rows, 1, module.dim)
            return map_state(Leaf, module.prefix(tokens)[1])  # type: ignore[arg-type]
    finally:
        _call.inside = inside


def _fits(state: State, expected: State, grows: bool) -> bool:
    if type(expected) is Leaf:
        if not isinstance(state, Tensor) or state.dtype is not expected.dtype or state.device != expected.device:
            return False
        shape, wanted = state.shape, expected.shape
        return shape == wanted or (
            grows and len(shape) == len(wanted) and _without_time(shape) == _without_time(wanted)
        )
    if type(state) is not type(expected) or expected is None:
        return state is expected
    return len(state) == len(expected) and all(map(_fits, state, expected, (grows,) * len(expected)))


def _without_time(shape: Sequence[int]) -> list[int]:
    return [*shape[:1], *shape[2:]]


class _Comparison:
    """Finds where a state differs from what a module expects."""

    def __init__(self, module: Any, rows: int) -> None:
        self.module, self.rows = module, rows
        self.name = type(module).__name__
        self.kind = "block" if isinstance(module, Block) else "model"
        # the number of slots of a cache depends on the bound at the time
        self.grows = module.grows or hasattr(module, "bound")

    def run(self, state: State) -> None:
        fresh = _describe(self.module, self.rows)
        if _kind(state) != _kind(fresh):
            raise TypeError(f"{self.name}: state is {_kind(state)}: expected {_kind(fresh)}")
        prefixed = _describe(self.module, self.rows, prefix=True) if isinstance(self.module, Block) else fresh
        self._compare("", state, fresh, prefixed)

    def _compare(self, path: str, state: State, fresh: State, prefixed: State) -> None:
        """``prefixed``: the corresponding part of a state with persistent tokens, which may have more tensors."""
        free = self.grows
        if fresh is None and state is not None:
            fresh, free = prefixed, True
        if _kind(state) != _kind(fresh):
            got = "not there" if state is None else _show(state)
            raise ValueError(f"{self._of_another(path)} {got}, expected {_show(fresh)}")
        if isinstance(state, Tensor):
            self._compare_tensor(path, state, fresh, free)
        elif state is not None:
            names = getattr(fresh, "_fields", range(len(fresh)))
            for name, *parts in zip(names, state, fresh, prefixed if _kind(prefixed) == _kind(fresh) else fresh):
                self._compare(f"{path}.{name}" if path else str(name), *parts)

    def _compare_tensor(self, path: str, tensor: Tensor, expected: Leaf, free: bool) -> None:
        shape, wanted = list(tensor.shape), [*map(str, expected.shape)]
        if free and len(wanted) > 1:
            wanted[1] = "any"
        if len(shape) != len(wanted) or any(m not in (str(n), "any") for n, m in zip(shape[1:], wanted[1:])):
            raise ValueError(f"{self._of_another(path)} {shape}, expected [{', '.join(wanted)}]")
        if shape[:1] != list(expected.shape[:1]):
            raise ValueError(f"{self.name}: state has {shape[0]} rows, the inputs have {self.rows} ({path})")
        if tensor.device != expected.device:
            raise ValueError(f"{self.name}: state is on {tensor.device}, expected {expected.device} ({path})")
        autocast = tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)
        if tensor.dtype != expected.dtype and not (autocast and expected.dtype.is_floating_point):
            raise TypeError(f"{self._of_another(path)} {tensor.dtype}, expected {expected.dtype}")

    def _of_another(self, path: str) -> str:
        return f"{self.name}: the state is of another {self.kind}: {path or 'it'} is"


def _kind(state: State) -> str:
    """What a part of a state is, without its shape."""
    if state is None or isinstance(state, (Tensor, Leaf)):
        return "None" if state is None else "Tensor"
    return f"a tuple of {len(state)}" if type(state) is tuple else type(state).__name__


def _show(state: State) -> str:
    return str(list(state.shape)) if isinstance(state, (Tensor, Leaf)) else _kind(state)

"""The block: one interface that makes attention, memory, convolution and FFN interchangeable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..registry import Problem, Unavailable
from .freezing import thawed
from .state import State, map_state, nbytes
from .watching import unwatched

Decoder: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]
"""From tokens ``[rows, time, dim]`` and a state to the outputs and the next state: see ``decoding.decoder``."""


class Block(nn.Module):
    """A map ``(x, state) -> (y, state)`` over ``[batch, time, dim]``; subclass it and ``@register`` it.

    A subclass's constructor takes ``dim`` first and everything else by keyword; that signature is its schema
    in a recipe. Fields typed ``Spec`` hold other blocks, made with ``create(field, dim=dim)``.

    The contract (``check_block`` tests every point of it):

    * any cut of the time axis gives the uncut outputs and final state; ``time = 1`` is decoding;
    * no output depends on a later token; no row depends on another row;
    * a token where ``mask`` is false leaves the state as it was, and its output is zero;
    * inputs and states that are passed in are never modified;
    * a counter of tokens read is an int64 leaf of the state named ``position``.
    """

    grows = False
    """True when the state grows with the number of tokens read (full attention without a bound)."""

    delegates: tuple[str, ...] = ()
    """In a wrapper that reads and writes by asking the blocks it holds: the fields that hold them."""

    period = 1
    """Shifting every position by a multiple of this many tokens leaves the outputs unchanged."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def init_state(self, batch_size: int) -> State:
        """A fresh state of ``batch_size`` rows: learned initial values, not zeros. ``None``: stateless."""
        return None

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read ``x`` [batch, time, dim]; ``mask`` [batch, time] bool, true at real tokens. ``state=None`` is fresh."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, state, *, mask)")

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """A fresh state that has been given persistent ``tokens`` [batch, count, dim], and the outputs at them.

        By default they are read as ordinary first tokens. Attention keeps them in sight for good. On the meta device
        nothing is computed, since torch would first import sympy for it: a bounded state has its shapes from the start.
        """
        if tokens.is_meta and not self.grows:
            return tokens, self.init_state(tokens.shape[0])
        # what a fresh memory holds has been written into it, frozen or not, and is no part of what is read
        with thawed(self), unwatched():
            return self(tokens, self.init_state(tokens.shape[0]))

    def every(self, x: Tensor, state: State = None, *, step: int, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """``forward``, with the outputs at every ``step``-th token alone: ``[batch, time / step, dim]``.

        ``time`` is a multiple of ``step``, and ``mask`` the same for all tokens of a step. A block that can spare what
        only the other outputs need overrides this.
        """
        y, state = self(x, state, mask=mask)
        return y[:, step - 1 :: step], state

    def decoder(self, rows: int, *, time: int = 1, step: int = 1) -> Decoder | None:
        """``every`` for a few tokens of ``rows`` rows, many times: ``decoding.decoder`` says what is asked of it.

        ``None``, as here: there is nothing to prepare, and the block is called.
        """
        return None

    def bound(self, tokens: int) -> None:
        """Told once, by a block that starts this one anew at least every ``tokens`` tokens."""

    def refuse(self, device: torch.device) -> str | None:
        """Why this block cannot run on ``device``, in words; ``None``: it can. Asked before it gets values there."""
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters this block owns, and no child block's. Must not depend on old values."""
        for child in self.children():
            _reset_own(child)

    def flops(self, length: int) -> int:
        """Forward FLOPs (a multiply-add is 2) for one row of ``length`` tokens from a fresh state."""
        own = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return 2 * own * length

    def every_flops(self, length: int, step: int) -> int:
        """``flops`` of :meth:`every`."""
        return self.flops(length)

    def state_bytes(self) -> int:
        """Bytes of state for one row."""
        with torch.no_grad():
            return nbytes(self.init_state(1))


class Memory(Protocol):
    """What a block has besides that can stand where the neural memory stands."""

    def read(self, x: Tensor, state: State) -> Tensor:
        """What it answers to each token of ``x`` [batch, time, dim] as if that came next; nothing is written."""
        ...

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        """The state after every token of ``x`` was written: that of ``forward``."""
        ...


def as_memory(block: Block) -> Memory:
    """``block``, of which validation has made sure that it can read and write."""
    return cast(Memory, block)


def read_flops(block: Block, length: int) -> int:
    """FLOPs of ``read``; 0 where the block does not say."""
    count = getattr(block, "read_flops", None)
    return 0 if count is None else cast(int, count(length))


class Blocks(nn.ModuleList):
    """Child blocks, in order. A ``ModuleList`` that type checkers know to hold blocks."""

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]


def _reset_own(module: Any) -> None:
    if isinstance(module, Block):
        return
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    for child in module.children():
        _reset_own(child)


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def materialise(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None, seed: int | None) -> None:
    """Give a module built on the meta device real, initialised parameters, in place.

    Parameters are drawn in float32 on the CPU's generator, so that one seed gives one model whatever the
    ``device`` and ``dtype``. ``seed=None`` uses (and advances) the global generator.

    Raises ``RuntimeError`` naming a parameter that no block's ``reset_parameters`` has set, ``ValueError`` for a
    seed that is none, and ``Unavailable`` where a block cannot run on the ``device``.
    """
    check_seed(seed)
    refused = [child.refuse(torch.device(device)) for child in module.modules() if isinstance(child, Block)]
    problems = [Problem("", reason) for reason in dict.fromkeys(refused) if reason is not None]
    if problems:
        raise Unavailable(problems, "model")
    module.to_empty(device="cpu")
    if dtype is not None:
        module.float()  # whatever the default dtype was when it was made
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    devices: list[Any] = []
    owners: list[Any] = [child for child in module.modules() if isinstance(child, Block) or child is module]
    # on the CPU whatever the default device is
    with torch.random.fork_rng(devices, enabled=seed is not None), torch.no_grad(), torch.device("cpu"):
        if seed is not None:
            torch.manual_seed(seed)
        for owner in owners:
            owner.reset_parameters()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.isnan().any():
            raise RuntimeError(
                f"{name} {list(tensor.shape)} was left uninitialised: set it in its block's reset_parameters"
            )
    module.to(device=device, dtype=dtype)


def as_rows(state: State, rows: int) -> State:
    """Expand a one-row state to ``rows`` rows without copying."""
    return map_state(lambda tensor: tensor.expand(rows, *tensor.shape[1:]), state)


def check_seed(seed: int | None) -> None:
    """Raise ``ValueError`` unless ``seed`` is one that torch's generators take."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")


def check_input(block: Block, x: Tensor, mask: Tensor | None, name: str = "x", *, like: Tensor | None = None) -> None:
    """Raise ``ValueError`` or ``TypeError``, naming the argument, unless ``x`` and ``mask`` fit the block.

    ``like``: a parameter of the block, whose dtype ``x`` must have; under autocast it may have another.
    """
    kind = type(block).__name__
    if not isinstance(x, Tensor):
        raise TypeError(f"{kind}: {name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != block.dim:
        raise ValueError(f"{kind}: {name} {list(x.shape)}: expected [batch, time, {block.dim}]")
    if like is not None and x.dtype != like.dtype and not _is_cast(x):
        raise TypeError(f"{kind}: {name} is {x.dtype}: expected {like.dtype}, as the block's parameters are")
    if like is not None and x.device != like.device:
        raise ValueError(f"{kind}: {name} is on {x.device}: expected {like.device}, as the block's parameters are")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{kind}: mask: expected a tensor, got {type(mask).__name__}")
        if mask.device != x.device:
            raise ValueError(f"{kind}: mask is on {mask.device}: expected {x.device}, as {name} is")
        if mask.dtype != torch.bool:
            raise TypeError(f"{kind}: mask is {mask.dtype}: expected torch.bool, true at real tokens")
        if mask.shape != x.shape[:2]:
            raise ValueError(f"{kind}: mask {list(mask.shape)}: expected {list(x.shape[:2])}")


def check_state(block: Block, state: State, kind: type[Any], rows: int) -> None:
    """Raise ``TypeError`` unless ``state`` is a ``kind``, and ``ValueError`` unless it has ``rows`` rows.

    ``kind`` is a named tuple with a ``position``, which alone is looked at: this runs at every token.
    """
    if not isinstance(state, kind):
        raise TypeError(f"{type(block).__name__}: state is {_what(state)}: expected {kind.__name__}")
    found = state.position.shape[0]
    if found != rows:
        raise ValueError(f"{type(block).__name__}: state has {found} rows: expected x's {rows}")


def check_kept(
    block: Block, name: str, found: Tensor | None, expected: tuple[int | None, ...] | None, dtype: torch.dtype
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the state's tensor ``name`` is of this shape and dtype.

    ``None`` in place of ``expected``: there is to be no tensor; in it, first of all the rows: any number.
    """
    whose = f"{type(block).__name__}: the state is of another block: {name} is"
    if found is None or expected is None:
        if found is not expected:
            got = "not there" if found is None else list(found.shape)
            raise ValueError(f"{whose} {got}, expected {'none' if expected is None else _shape(expected)}")
    elif found.dim() != len(expected) or not all(n in (m, None) for m, n in zip(found.shape, expected)):
        raise ValueError(f"{whose} {list(found.shape)}, expected {_shape(expected)}")
    elif found.dtype != dtype:
        raise TypeError(f"{whose} {found.dtype}, expected {dtype}")


def _shape(expected: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if n is None else str(n) for n in expected) + "]"


def check_parts(block: Block, state: State, count: int) -> None:
    """Raise ``TypeError`` unless ``state`` is a plain tuple of the states of ``count`` child blocks."""
    if type(state) is not tuple or len(state) != count:
        raise TypeError(f"{type(block).__name__}: state is {_what(state)}: expected a tuple of {count}, one per block")


def _is_cast(x: Tensor) -> bool:
    return x.is_floating_point() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _what(state: State) -> str:
    name = type(state).__name__
    return f"a tuple of {len(state)}" if type(state) is tuple else name

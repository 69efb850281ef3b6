"""``adapt``: any module as a block, from a function that makes it and a few that say how it keeps its state."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...kernels.padding import align
from ...registry import Problem, Unavailable, register, show
from ..block import Block
from ..state import State, batch_size, map_state, named_tensors
from .rows import by_kind, by_length

Make: TypeAlias = Callable[..., nn.Module]
Fresh: TypeAlias = Callable[[Any, int], State]
"""From the module and a number of rows to what it carries at the start: a tree of tensors with the rows first."""
Run: TypeAlias = Callable[[Any, Tensor, State], tuple[Tensor, State]]
"""From the module, tokens ``[rows, time, dim]`` and what it carries to the outputs and what it carries then."""


class AdaptedState(NamedTuple):
    """What an adapted module carries from token to token."""

    carried: State
    """The module's own, as its ``state`` function lays it out."""
    position: Tensor
    """``[batch]`` int64: tokens read."""


class Declaration(NamedTuple):
    """How a module from elsewhere is used: what :func:`adapt` was told."""

    make: Make
    state: Fresh | None
    run: Run | None
    step: Run | None
    refuse: Callable[[torch.device], str | None] | None


class Adapted(Block):
    """A block around a module from elsewhere; :func:`adapt` makes a subclass for each kind of module.

    The module sees rows of equal length without padding, and copies of what it carries, which it may write into.
    """

    declaration: ClassVar[Declaration]
    kind: ClassVar[str]
    """The name in a recipe."""

    def __init__(self, dim: int, **fields: Any) -> None:
        super().__init__(dim)
        self.fields = fields
        self.inner = self._made()

    def init_state(self, batch_size: int) -> AdaptedState | None:
        fresh = self.declaration.state
        if fresh is None:
            return None
        reference = next(iter([*self.inner.parameters(), *self.inner.buffers()]), torch.empty(0))
        position = torch.zeros(batch_size, dtype=torch.int64, device=reference.device)
        return AdaptedState(self._checked(fresh(self.inner, batch_size), batch_size), position)

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        if self.declaration.state is None:
            if mask is None:
                return self._run(x, None)
            real = mask.unsqueeze(-1)
            return torch.where(real, self._run(torch.where(real, x, 0.0), None)[0], 0.0), None
        if state is None:
            state = self.init_state(x.shape[0])
        if mask is None:
            return self._read(x, state)
        layout = align(mask)
        y, state = by_length(self._read, layout.spread(x), state, layout.length.tolist())
        return layout.collect(y), state

    def _read(self, x: Tensor, state: AdaptedState) -> tuple[Tensor, AdaptedState]:
        """Tokens without padding, after rows that may be at different positions."""
        time = x.shape[1]
        if time == 0:
            return x, state
        if self.declaration.step is None:
            y, carried = self._run(x, state.carried)
            return y, AdaptedState(carried, state.position + time)
        # such a module reads many tokens at once only from its beginning
        begun = [int(position > 0) for position in state.position.tolist()]
        return by_kind(self._go_on, x, state, begun)

    def _go_on(self, x: Tensor, state: AdaptedState, begun: int) -> tuple[Tensor, AdaptedState]:
        carried, outputs = state.carried, []
        for part in x.split(1, dim=1) if begun else (x,):
            y, carried = self._run(part, carried, begun=bool(begun))
            outputs.append(y)
        return torch.cat(outputs, dim=1), AdaptedState(carried, state.position + x.shape[1])

    def _run(self, x: Tensor, carried: State, begun: bool = False) -> tuple[Tensor, State]:
        """The module itself, once."""
        run = self.declaration.step if begun else self.declaration.run
        if self.declaration.state is None:
            y, after = self.inner(x) if run is None else run(self.inner, x, None), None
        else:
            # the module may write into what it is given, which is nobody else's
            given = map_state(lambda tensor: tensor.clone(), carried)
            made = self.inner(x, given) if run is None else run(self.inner, x, given)
            if not isinstance(made, tuple) or len(made) != 2:
                got = f"{len(made)} things" if isinstance(made, tuple) else type(made).__name__
                raise TypeError(f"{self.kind}: the module made {got}: expected (outputs, what it carries)")
            y, after = made
            after = self._like(after, carried)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{self.kind}: the module made {shape} of {list(x.shape)}: expected the same shape")
        return y.to(x.dtype), after

    def _like(self, after: State, before: State) -> State:
        """What the module carries now, in the dtypes that were declared; its shapes must be those."""

        def same(new: Tensor, old: Tensor) -> Tensor:
            if new.shape != old.shape:
                raise ValueError(
                    f"{self.kind}: the module carries {list(new.shape)} where its state was declared as "
                    f"{list(old.shape)}"
                )
            return new.to(old.dtype)

        try:
            return map_state(same, after, before)
        except TypeError as error:
            raise TypeError(f"{self.kind}: what the module carries is not what was declared: {error}") from None

    def _checked(self, fresh: State, rows: int) -> State:
        try:
            found = batch_size(fresh)  # whose errors say which tensor lacks the rows
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kind}: its state function: {error}") from None
        if found != rows:
            raise ValueError(f"{self.kind}: its state function gave {found} rows: expected {rows}")
        return fresh

    def refuse(self, device: torch.device) -> str | None:
        ask = self.declaration.refuse
        said = None if ask is None else ask(device)
        return None if said is None else f"{self.kind}: {said}"

    def reset_parameters(self) -> None:
        """As the module's own constructor does it: one more is made, and its values are taken over."""
        with torch.device("cpu"), _nothing_left_to_chance():
            made = self._made()
        mine = {**dict(self.inner.named_parameters()), **dict(self.inner.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
                if mine[name] is tensor:
                    raise ValueError(
                        f"{self.kind}: the function made the same {name} twice: expected a new module each time"
                    )
                mine[name].copy_(tensor)

    def flops(self, length: int) -> int:
        """The matrix products, and two multiply-adds for every number that is carried: it is read, and written."""
        state = self.init_state(1)
        carried = 0 if state is None else sum(tensor.numel() for _, tensor in named_tensors(state.carried))
        return super().flops(length) + 4 * carried * length

    def _made(self) -> nn.Module:
        try:
            made = self.declaration.make(self.dim, **self.fields)
        except ImportError as error:
            raise Unavailable([Problem("", f"{self.kind}: {error}")], "block") from error
        if not isinstance(made, nn.Module):
            raise TypeError(f"{self.kind}: the function made {type(made).__name__}: expected an nn.Module")
        return made


@contextlib.contextmanager
def _nothing_left_to_chance() -> Iterator[None]:
    """What is made and given no values is NaN, which is then found, rather than what lay in memory before."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)


def adapt(
    name: str,
    *,
    state: Fresh | None = None,
    run: Run | None = None,
    step: Run | None = None,
    refuse: Callable[[torch.device], str | None] | None = None,
    problems: Callable[[int | None, dict[str, Any]], Iterable[tuple[str, str]]] | None = None,
    replace: bool = False,
) -> Callable[[Make], type[Adapted]]:
    """Register a function that makes a module as the block ``name``; its signature is the block's schema.

    The function takes ``dim`` and annotated keyword fields, like the constructor of a ``Block``, and returns an
    ``nn.Module``, initialised as it should be. In its place stands the class of the block from then on::

        @tb.adapt("gru", state=lambda gru, rows: gru.weight_ih_l0.new_zeros(rows, gru.hidden_size), run=read)
        def gru(dim: int, *, bias: bool = True) -> nn.Module:
            return nn.GRU(dim, dim, bias=bias, batch_first=True)

    ``state(module, rows)``: what the module carries before the first token: a tensor, or named tuples of tensors, each
    ``[rows, ...]`` and of the same shape ever after; ``None`` for a module that treats every token on its own.
    ``run(module, x, carried)``: outputs and what is carried after ``x`` [rows, time, dim], with no padding in it; by
    default the module is called with the same two, and one without state with ``x`` alone. What it is given to carry
    is a copy that it may write into. ``step``: likewise for one token, in a module that can read several at once only
    from its beginning; the block then goes on token by token. ``refuse(device)``: why it cannot run there, in words, or
    ``None``. ``problems(dim, fields)``: what is wrong with fields together, as ``(field, message)``.

    Whether the block that comes of it obeys the laws, ``check_block`` can say. Raises what ``register`` does.
    """
    for argument, given in {"state": state, "run": run, "step": step, "refuse": refuse, "problems": problems}.items():
        if given is not None and not callable(given):
            raise TypeError(f"adapt({show(name)}): {argument} is {show(given)}: expected a function")
    if not isinstance(name, str):  # as a decorator without its parentheses is
        raise TypeError(f"adapt({show(name)}): expected the block's name, as in @adapt('gru')")
    if step is not None and state is None:
        raise ValueError(f"adapt({name!r}): step goes on from a state, and there is no state function")

    def add(make: Make) -> type[Adapted]:
        def construct(self: Adapted, dim: int, **fields: Any) -> None:
            Adapted.__init__(self, dim, **fields)

        functools.update_wrapper(construct, make)
        signature = inspect.signature(make)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        construct.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()], return_annotation=inspect.Signature.empty
        )
        body: dict[str, Any] = {
            "__init__": construct,
            "__doc__": make.__doc__,
            "__module__": make.__module__,
            "__qualname__": make.__qualname__,
            "declaration": Declaration(make, state, run, step, refuse),
            "kind": name,
        }
        if problems is not None:
            body["problems"] = staticmethod(problems)
        return register(name, replace=replace)(type(make.__name__, (Adapted,), body))

    return add

"""``adapt`` registers any PyTorch module as a block, given functions that describe its state."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.padding import align
from ...registry import Problem, Unavailable, register, show
from ..block import Block
from ..state import State, batch_size, concatenate, map_state, named_tensors, select

Make: TypeAlias = Callable[..., nn.Module]
Fresh: TypeAlias = Callable[[Any, int], State]
"""``(module, rows)`` -> the initial state: a tree of tensors ``[rows, ...]``."""
Run: TypeAlias = Callable[[Any, Tensor, State], tuple[Tensor, State]]
"""``(module, x [rows, time, dim], state)`` -> outputs and the next state."""


class AdaptedState(NamedTuple):
    """The state of an adapted module."""

    carried: State
    """The state of the module, with the structure of its ``state`` function."""
    position: Tensor
    """``[batch]`` int64: number of tokens so far."""


class Declaration(NamedTuple):
    """The arguments of :func:`adapt`."""

    make: Make
    state: Fresh | None
    run: Run | None
    step: Run | None
    refuse: Callable[[torch.device], str | None] | None


class Adapted(Block):
    """A block that runs the module ``inner``. :func:`adapt` creates a subclass for each kind of module.

    The module receives rows of equal length without padding, and copies of the state, which it may modify.
    """

    declaration: ClassVar[Declaration]
    kind: ClassVar[str]
    """The registered name."""

    def __init__(self, dim: int, **fields: Any) -> None:
        super().__init__(dim)
        self.fields = fields
        self.inner = self._make()

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
            valid = mask.unsqueeze(-1)
            return torch.where(valid, self._run(torch.where(valid, x, 0.0), None)[0], 0.0), None
        if state is None:
            state = self.init_state(x.shape[0])
        if mask is None:
            return self._run_unpadded(x, state)
        layout = align(mask)
        y, state = run_grouped_by_length(self._run_unpadded, layout.spread(x), state, layout.length.tolist())
        return layout.collect(y), state

    def _run_unpadded(self, x: Tensor, state: AdaptedState) -> tuple[Tensor, AdaptedState]:
        """Process tokens without padding. The rows of the state may be at different positions."""
        if x.shape[1] == 0:
            return x, state
        if self.declaration.step is None:
            return self._run_pieces(x, state, started=False)
        # with a step function, only fresh rows may process several tokens at once
        started = [int(position > 0) for position in state.position.tolist()]
        return run_grouped(self._run_pieces, x, state, started)

    def _run_pieces(self, x: Tensor, state: AdaptedState, started: int) -> tuple[Tensor, AdaptedState]:
        carried, outputs = state.carried, []
        for piece in x.split(1, dim=1) if started else (x,):
            y, carried = self._run(piece, carried, started=bool(started))
            outputs.append(y)
        return torch.cat(outputs, dim=1), AdaptedState(carried, state.position + x.shape[1])

    def _run(self, x: Tensor, carried: State, started: bool = False) -> tuple[Tensor, State]:
        """Run the module once."""
        run = self.declaration.step if started else self.declaration.run
        if self.declaration.state is None:
            y, after = self.inner(x) if run is None else run(self.inner, x, None), None
        else:
            given = map_state(lambda tensor: tensor.clone(), carried)
            result = self.inner(x, given) if run is None else run(self.inner, x, given)
            if not isinstance(result, tuple) or len(result) != 2:
                got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
                raise TypeError(f"{self.kind}: the module returned {got}: expected (outputs, state)")
            y, after = result[0], self._converted(result[1], carried)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{self.kind}: the module returned {shape} for inputs {list(x.shape)}: expected this shape"
            )
        return y.to(x.dtype), after

    def _converted(self, after: State, before: State) -> State:
        """Convert the returned state to the declared dtypes, and check its shapes."""

        def convert(new: Tensor, old: Tensor) -> Tensor:
            if new.shape != old.shape:
                shapes = f"{list(new.shape)}, declared as {list(old.shape)}"
                raise ValueError(f"{self.kind}: the module returned a state of shape {shapes}")
            return new.to(old.dtype)

        try:
            return map_state(convert, after, before)
        except TypeError as error:
            raise TypeError(f"{self.kind}: the returned state differs from the declared one: {error}") from None

    def _checked(self, fresh: State, rows: int) -> State:
        try:
            found = batch_size(fresh)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.kind}: its state function: {error}") from None
        if found != rows:
            raise ValueError(f"{self.kind}: its state function returned {found} rows: expected {rows}")
        return fresh

    def refuse(self, device: torch.device) -> str | None:
        refuse = self.declaration.refuse
        reason = None if refuse is None else refuse(device)
        return None if reason is None else f"{self.kind}: {reason}"

    def reset_parameters(self) -> None:
        """Create the module again, and copy the values of the new one."""
        with torch.device("cpu"), _empty_as_nan():
            new = self._make()
        own = {**dict(self.inner.named_parameters()), **dict(self.inner.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
                if own[name] is tensor:
                    raise ValueError(f"{self.kind}: the function returned {name} of an earlier call: expected new ones")
                own[name].copy_(tensor)
        self._check_state_is_used()

    def _check_state_is_used(self) -> None:
        """Raise unless two calls give the outputs of one, where float32 on the CPU is what the module runs on."""
        reference = next(self.inner.parameters(), None)
        if self.declaration.state is None or reference is None or reference.dtype != torch.float32:
            return
        if not reference.is_cpu or self.refuse(reference.device) is not None:
            return
        training = [(module, module.training) for module in self.inner.modules()]
        self.inner.eval()
        x = torch.randn(1, 8, self.dim, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            whole, _ = self(x)
            y, state = self(x[:, :-1])
            last, _ = self(x[:, -1:], state)
        for module, mode in training:
            module.training = mode
        difference = (torch.cat([y, last], dim=1) - whole).abs().max()
        if difference > 1e-3 * whole.abs().max():
            reason = "8 tokens in two calls with its state have other outputs than in one call (largest difference"
            hint = f"{float(difference):.1e}): check that the state reaches the module, in this version of its library"
            raise Unavailable([Problem("", f"{self.kind}: {reason} {hint}")], "block")

    def flops(self, length: int) -> int:
        """The matrix products, and for each token and number of the state two multiply-adds: a read and a write."""
        state = self.init_state(1)
        size = 0 if state is None else sum(tensor.numel() for _, tensor in named_tensors(state.carried))
        return super().flops(length) + 4 * size * length

    def _make(self) -> nn.Module:
        try:
            module = self.declaration.make(self.dim, **self.fields)
        except ImportError as error:
            raise Unavailable([Problem("", f"{self.kind}: {error}")], "block") from error
        if not isinstance(module, nn.Module):
            raise TypeError(f"{self.kind}: the function returned {type(module).__name__}: expected an nn.Module")
        return module


@contextlib.contextmanager
def _empty_as_nan() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that ``materialize`` finds tensors that are left uninitialized."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)


def run_grouped_by_length(
    run: Callable[[Tensor, State], tuple[Tensor, State]], x: Tensor, state: State, lengths: Sequence[int]
) -> tuple[Tensor, State]:
    """Apply ``run`` to the first ``lengths[b]`` tokens of each row of ``x`` [batch, time, dim]. The rest becomes zero.

    Rows of equal length are processed together, without padding. Rows of length 0 keep their state.
    """

    def run_group(x: Tensor, state: State, length: int) -> tuple[Tensor, State]:
        if length == 0:
            return torch.zeros_like(x), state
        y, state = run(x[:, :length], state)
        return F.pad(y, (0, 0, 0, x.shape[1] - length)), state

    return run_grouped(run_group, x, state, lengths)


def run_grouped(
    run: Callable[[Tensor, State, int], tuple[Tensor, State]], x: Tensor, state: State, groups: Sequence[int]
) -> tuple[Tensor, State]:
    """Apply ``run(x, state, group)`` to the rows of each group, and return all rows in their order."""
    if len(set(groups)) == 1:
        return run(x, state, groups[0])
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    outputs, states = zip(*(run(x[rows], select(state, rows), group) for group, rows in members.items()))
    order = torch.tensor([row for rows in members.values() for row in rows], device=x.device).argsort()
    return torch.cat(outputs).index_select(0, order), select(concatenate(states), order)


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument of ``forward``, a method, that takes a cache. It differs between versions of libraries.

    Raises ``ImportError`` if it has none of the known names: the module would run without its state.
    """
    known = ("cache", "past_key_values", "cache_params", "inference_params")
    parameters = inspect.signature(forward).parameters
    found = next((name for name in known if name in parameters), None)
    if found is None:
        raise ImportError(
            f"{forward.__qualname__} ({forward.__module__}) takes {', '.join(list(parameters)[1:])}: expected a cache "
            f"under one of the names {', '.join(known)}; install another version of {forward.__module__.split('.')[0]}"
        )
    return found


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
    """Register a function that creates a module as the block ``name``. Its signature is the schema of the block.

    The function takes ``dim`` and annotated keyword fields, like the constructor of a ``Block``, and returns an
    initialized ``nn.Module``. The decorated name refers to the class of the block::

        @tb.adapt("gru", state=lambda gru, rows: gru.weight_ih_l0.new_zeros(rows, gru.hidden_size), run=read)
        def gru(dim: int, *, bias: bool = True) -> nn.Module:
            return nn.GRU(dim, dim, bias=bias, batch_first=True)

    ``state(module, rows)``: returns the initial state: a tensor, or named tuples of tensors, each ``[rows, ...]`` and
    of constant shape. ``None``: the module has no state. ``run(module, x, state)``: returns the outputs and the next
    state after ``x`` [rows, time, dim], which has no padding. By default ``module(x, state)``, or ``module(x)`` without
    a state. The state it receives is a copy, which it may modify. ``step``: the same for one token, if ``run`` can only
    start from the initial state; further tokens are then processed one by one. ``refuse(device)``: returns why the
    module cannot run on the device, or ``None``. ``problems(dim, fields)``: yields problems that concern several
    fields, as ``(field, message)``.

    ``check_block`` tests whether the block obeys the laws. Raises the errors of ``register``.
    """
    for argument, given in {"state": state, "run": run, "step": step, "refuse": refuse, "problems": problems}.items():
        if given is not None and not callable(given):
            raise TypeError(f"adapt({show(name)}): {argument} is {show(given)}: expected a function")
    if not isinstance(name, str):  # such as for a decorator without parentheses
        raise TypeError(f"adapt({show(name)}): expected the block's name, as in @adapt('gru')")
    if step is not None and state is None:
        raise ValueError(f"adapt({name!r}): step continues from a state, and there is no state function")

    def decorate(make: Make) -> type[Adapted]:
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

    return decorate

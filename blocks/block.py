"""``Block``: the common interface of attention, memories, convolutions and feed-forward networks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..kernels.custom_op import NOT_TRACED
from ..kernels.dispatch import copied, expect_values
from ..kernels.documents import Documents
from ..kernels.linear import is_unmodified
from .documents import expect_documents, run_documents
from .freezing import thawed
from .observers import suppressed
from .state import DocumentState, State, map_state, named_tensors, nbytes

_T = TypeVar("_T")


def with_parameters(method: Callable[..., _T]) -> Callable[..., _T]:
    """Make a method load the parameters of its module if accelerate has offloaded them.

    accelerate loads them for ``forward`` only, and FSDP gathers them for calls of the modules that it was given. Raises
    ``RuntimeError`` where they cannot be had.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **named: Any) -> _T:
        if call.shard is not None:
            with unsharded():  # such as persistent tokens, which every rank processes
                return run(self, *args, **named)
        if "torch.distributed.tensor" in sys.modules and any(map(is_sharded, self.parameters(recurse=False))):
            raise _missing(self, method, "sharded", "given to fully_shard")
        if "forward" not in vars(self) or "accelerate" not in sys.modules:
            return method(self, *args, **named)
        with contextlib.ExitStack() as stack:
            for module in (self, *(child for child in self.children() if isinstance(child, nn.ParameterList))):
                stack.enter_context(_loaded(module))
            if _has_meta(self) and not all(parameter.is_meta for parameter in self.parameters()):
                raise _missing(self, method, "offloaded", "given to accelerate")
            return method(self, *args, **named)

    return run


def _missing(module: nn.Module, method: Callable[..., Any], how: str, given: str) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__}.{method.__name__}: the parameters are {how}, and there only while the module {given} "
        "is called: give a module around this one, such as a layer of the model"
    )


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse=False))


def _loaded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context inside which the module's own parameters are loaded, if accelerate has offloaded them."""
    if not _has_meta(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    loaded: contextlib.AbstractContextManager[None] = align_module_device(module)
    return loaded


class _OfChildren:
    """An attribute that is computed from the blocks inside, unless a class or an instance sets it."""

    def __init__(self, name: str, combine: Any) -> None:
        self.name, self.combine = name, combine

    def __get__(self, block: Any, owner: Any = None) -> Any:
        children = () if block is None else child_blocks(block)
        return self.combine(getattr(child, self.name) for child in children)


class Block(nn.Module):
    """Base class of all blocks: a causal map ``(x, state) -> (y, state)`` of sequences ``[batch, time, dim]``.

    A subclass defines ``init_state``, ``forward`` and ``reset_parameters``, and is registered with ``@register(name)``.
    Its constructor takes ``dim`` first and all other arguments by keyword. The signature is its schema in a recipe.
    Fields of type ``Spec`` are other blocks, which ``create(field, dim=dim)`` creates.

    The contract, which ``check_block`` tests:

    * a sequence may be split at any token, with the same outputs and final state; ``time = 1`` is decoding;
    * outputs do not depend on later tokens or on other rows;
    * tokens where ``mask`` is false do not change the state, and their outputs are zero;
    * inputs and states are not modified;
    * a counter of tokens is an int64 tensor of the state named ``position``.

    Calling a block checks the inputs and the state before ``forward`` runs. A state must have the structure, shapes and
    dtypes of ``init_state``.
    """

    grows: bool = cast(bool, _OfChildren("grows", any))
    """Whether the state grows with the number of tokens. By default, whether that of any block inside does."""

    period: int = cast(int, _OfChildren("period", lambda periods: math.lcm(*periods)))
    """Shifting all positions by a multiple of ``period`` leaves the outputs unchanged. By default, the least common
    multiple of the periods of the blocks inside."""

    delegates: tuple[str, ...] = ()
    """Names of the fields of a wrapper whose blocks process its tokens, and to which ``read`` and ``write`` pass on."""

    has_every = False
    """Whether the class that defines ``forward`` defines ``every`` too, which ``context`` then calls."""

    sharding: Literal["local", "pipelined"] | None = None
    """How a part of a sequence gets what it needs of the tokens before, where ``parallelize`` divides sequences.

    ``"local"``: an output depends on its own token, and otherwise only on blocks inside, which get it themselves.
    ``"pipelined"``: the state after the tokens before is all that it needs, so the ranks run one after the other; those
    of a block with ``past`` run side by side. ``None``: each rank computes all tokens. A subclass with a ``forward`` of
    its own says it anew.
    """

    takes_documents = False
    """Whether ``forward`` takes ``documents``. Otherwise each document is given to it as a row."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        own = vars(cls)
        if "forward" in own:
            cls.has_every = "every" in own
            cls.takes_documents = "documents" in inspect.signature(cls.forward).parameters
            cls.sharding = own.get("sharding")
        for name in {"init_state", "prefix", "read"} & own.keys():
            setattr(cls, name, with_parameters(own[name]))

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._parameter: tuple[nn.Module, str] | None = None
        self._expected_states: dict[Any, State] = {}

    def init_state(self, batch_size: int) -> State:
        """Return a fresh state of ``batch_size`` rows, with learned initial values. ``None`` by default: stateless."""
        return None

    def forward(self, x: Tensor, state: State = None, *, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Process ``x`` [batch, time, dim] from ``state``, by default a fresh one.

        ``mask`` [batch, time] bool is true at valid tokens. Returns outputs of the shape of ``x`` and the next state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(x, state, *, mask)")

    def __call__(
        self,
        x: Tensor,
        state: State = None,
        *others: Any,
        mask: Tensor | None = None,
        documents: Tensor | Documents | None = None,
        cu_seqlens: Tensor | None = None,
        **named: Any,
    ) -> Any:
        check_input(self, x, mask)
        if not torch.compiler.is_compiling() and call.shard is not None and self.sharding != "local":
            assert documents is None or isinstance(documents, Documents)
            sharded: tuple[Tensor, State] = call.shard.run(self, x, state, mask, documents, named)
            return sharded
        if mask is not None:
            named["mask"] = mask
        if documents is not None or cu_seqlens is not None or type(state) is DocumentState:
            # packings differ from batch to batch: each would be compiled anew
            compiling = torch.compiler.is_compiling()
            run = torch.compiler.disable(self._run_documents) if compiling else self._run_documents
            return run(x, state, documents, cu_seqlens, named)
        # the state of a block inside is part of the one that was checked
        if torch.compiler.is_compiling() or call.inside:
            return super().__call__(x, state, *others, **named)
        if torch.jit.is_tracing() and (others or type(self).init_state is not Block.init_state):
            # the exporter to ONNX gives all arguments by position
            raise RuntimeError(NOT_TRACED)
        if state is not None:
            check_state(self, state, x.shape[0])
        call.inside = True
        try:
            return super().__call__(x, state, *others, **named)
        finally:
            call.inside = False

    def _run_documents(
        self,
        x: Tensor,
        state: State,
        documents: Tensor | Documents | None,
        cu_seqlens: Tensor | None,
        named: dict[str, Any],
    ) -> tuple[Tensor, State]:
        """Implements calls with ``documents``, ``cu_seqlens`` or the state after such a call."""
        mask = named.get("mask")
        if isinstance(documents, Documents):  # a block inside of another
            inside, call.inside = call.inside, True
            try:
                if self.takes_documents:
                    return cast("tuple[Tensor, State]", super().__call__(x, state, documents=documents, **named))
                if type(self).init_state is Block.init_state:
                    return cast("tuple[Tensor, State]", self(x, state, **named))

                def run(x: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
                    return cast("tuple[Tensor, State]", self(x, state, **{**named, "mask": mask}))

                return run_documents(run, documents, [x], state, mask, self.init_state, grows=self.grows)
            finally:
                call.inside = inside
        before = None
        if type(state) is DocumentState:
            state, before = state
            rows, name = x.shape[0], type(self).__name__
            if not isinstance(before, Tensor) or before.dtype != torch.int64 or before.dim() != 1:
                got = f"{before.dtype} {list(before.shape)}" if isinstance(before, Tensor) else type(before).__name__
                raise TypeError(f"{name}: document of the state: expected int64 [{rows}], got {got}")
            if len(before) != rows:
                raise ValueError(f"{name}: the state has {len(before)} rows (document), the inputs have {rows}")
        if documents is None and cu_seqlens is None:
            y, state = self(x, state, **named)
            return y, state if before is None else DocumentState(state, before)
        if state is not None:
            check_state(self, state, x.shape[0])
        found = expect_documents(self, documents, cu_seqlens, x, mask, before)
        y, state = self(x, state, documents=found, **named)
        return y, DocumentState(state, found.after)

    def past(self) -> int | None:
        """The number of tokens before any token that its output and the next state depend on; ``None``: all.

        What does not depend on tokens, and counters named ``position``, are left out.
        """
        return None

    def prefix(self, tokens: Tensor) -> tuple[Tensor, State]:
        """Return the outputs at persistent ``tokens`` [batch, count, dim], and the fresh state after them.

        By default they are processed as ordinary first tokens. Attention keeps them visible to all later tokens. On the
        meta device, a bounded state is returned without computing (torch would import sympy).
        """
        if tokens.is_meta and not self.grows:
            return tokens, self.init_state(tokens.shape[0])
        # persistent tokens are written even if memories are frozen, and are not part of the observed sequence
        with thawed(self), suppressed():
            return cast("tuple[Tensor, State]", self(tokens, self.init_state(tokens.shape[0])))

    def refuse(self, device: torch.device) -> str | None:
        """Return why this block cannot run on ``device``, or ``None`` if it can."""
        return None

    def reset_parameters(self) -> None:
        """Initialize the parameters of this block, not those of child blocks. Must not depend on previous values."""
        for child in self.children():
            _reset_own(child)

    def flops(self, length: int) -> int:
        """Forward FLOPs (a multiply-add counts 2) for one row of ``length`` tokens from a fresh state."""
        return count_flops(self, length)

    def state_bytes(self) -> int:
        """Size of the state of one row in bytes."""
        with torch.no_grad():
            return nbytes(self.init_state(1))


@functools.singledispatch
def count_flops(block: Block, length: int) -> int:
    """Implements ``Block.flops`` by class (see ``flops.py``). By default, the products with all matrices."""
    return 2 * length * sum(p.numel() for p in block.parameters() if p.dim() > 1)


class Memory(Protocol):
    """The methods of a block that can be the memory of ``context``."""

    def read(self, x: Tensor, state: State) -> Tensor:
        """Query the memory with each token of ``x`` [batch, time, dim] as if it came next. Does not write."""
        ...

    def write(self, x: Tensor, state: State, mask: Tensor | None = None) -> State:
        """Return the state after all tokens of ``x`` are written, which is that of ``forward``."""
        ...


def as_memory(block: Block) -> Memory:
    """Cast ``block`` to a memory. Validation has checked that it has ``read`` and ``write``."""
    return cast(Memory, block)


class Blocks(nn.ModuleList):
    """A ``ModuleList`` whose items are blocks for type checkers."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[Block]: ...


def child_blocks(module: nn.Module) -> Iterator[Block]:
    """Yield the child blocks of ``module``, also those inside other modules such as ``ModuleList``."""
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
    return state if rows == 1 else map_state(lambda x: copied(x.expand(rows, *x.shape[1:]), x, rows), state)


# -- checks ------------------------------------------------------------------------------------------------------------


class _Call(threading.local):
    inside = False
    """True while a block of this thread runs."""
    shard: Any = None
    """The ``ContextCall`` of a model whose tokens are shared out over ranks."""


call = _Call()


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Within the ``with`` block, this rank computes all tokens that a block is given."""
    shard, call.shard = call.shard, None
    try:
        yield
    finally:
        call.shard = shard


def check_call(block: Block, x: Tensor, state: State) -> None:
    """Check inputs and state as a call does, for other methods such as ``read``."""
    check_input(block, x)
    if not (call.inside or torch.compiler.is_compiling()):
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
        owner, parameter = block._parameter or _find_parameter(block)
        like = getattr(owner, parameter) if parameter else None
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
        expect_values(f"{kind}: mask", mask)


def _find_parameter(module: Any) -> tuple[nn.Module, str]:
    """Return the owner and the name of a floating-point parameter: "" if there is none. Cache them.

    Those of linear layers come late, because other modules take their place, and those of the module itself come last,
    because those of the outermost module cannot be loaded if accelerate has offloaded them.
    """
    places = []
    for path, owner in module.named_modules():
        for name, x in owner.named_parameters(recurse=False):
            if x.is_floating_point():
                places.append((2 if owner is module else isinstance(owner, nn.Linear), path, name))
    _, path, name = min(places, default=(0, "", ""))
    # not registered as a child
    vars(module)["_parameter"] = place = module.get_submodule(path), name
    return place


def like_of(module: Any) -> Any:
    """Return a floating-point parameter, for the dtype and device of the module; ``None`` if there is none."""
    if torch.compiler.is_compiling():  # a cache that changes would compile the caller again
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter
        return None
    owner, name = getattr(module, "_parameter", None) or _find_parameter(module)
    with _loaded(owner) if "accelerate" in sys.modules else contextlib.nullcontext():
        return getattr(owner, name) if name else None


def initial_state(block: Block, rows: int) -> State:
    """``block.init_state(rows)``; by a call without tokens if the parameters are there for calls only."""
    like = like_of(block)
    if like is None or like.is_meta or not (is_sharded(like) or _has_meta(block)):
        return block.init_state(rows)
    return block(torch.zeros(rows, 0, block.dim, dtype=like.dtype, device=like.device))[1]


def is_sharded(x: Tensor) -> bool:
    """Whether this process has only a part of ``x``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _check_like(block: Block, x: Tensor, name: str) -> None:
    """Raise if the dtype or device differs from that of the current parameters. Modules may have been replaced."""
    owner, parameter = _find_parameter(block)
    like, kind = getattr(owner, parameter) if parameter else x, type(block).__name__
    autocast = x.is_floating_point() and not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if not autocast and all(x.dtype != parameter.dtype for parameter in block.parameters()):
        raise TypeError(f"{kind}: {name} is {x.dtype}: expected {like.dtype}, as the block's parameters are")
    if x.device != like.device and is_unmodified(owner, "forward"):  # otherwise it may be offloaded
        raise ValueError(f"{kind}: {name} is on {x.device}: expected {like.device}, as the block's parameters are")


_KEPT = 16
"""Maximum number of cached expected states."""
_MISSING = object()


def check_state(module: Any, state: State, rows: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``state`` is a state of ``module`` with ``rows`` rows.

    Structure, shapes and dtypes must be those of ``init_state(rows)``, or of ``prefix`` if a block stores persistent
    tokens separately. Dimension 1 may differ if the state grows. Expected states are cached on the meta device.
    """
    like = like_of(module)
    key = (rows, None, None) if like is None else (rows, like.dtype, like.device)
    expected = module._expected_states.get(key, _MISSING)
    if expected is _MISSING:
        expected = map_state(lambda x: torch.empty_like(x, device="meta"), _fresh(module, rows))
        if len(module._expected_states) >= _KEPT:
            module._expected_states.clear()
        module._expected_states[key] = expected
    if not (_fits(state, expected, key[2], False) or (module.grows and _fits(state, expected, key[2], True))):
        module._expected_states.clear()  # the module may have changed
        _compare(module, state, rows)


def _fresh(module: Any, rows: int, prefix: bool = False) -> State:
    """Call ``init_state``, or ``prefix`` with one token, without gradients, checks and observers. Return the state."""
    inside, call.inside = call.inside, True
    try:
        with torch.no_grad(), suppressed(), unsharded():
            if not prefix:
                return initial_state(module, rows) if isinstance(module, Block) else module.init_state(rows)
            like = like_of(module)
            dtype, device = (None, None) if like is None else (like.dtype, like.device)
            return module.prefix(torch.zeros(rows, 1, module.dim, dtype=dtype, device=device))[1]
    finally:
        call.inside = inside


def _fits(state: State, expected: State, device: torch.device | None, grows: bool) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(state, Tensor) or state.dtype is not expected.dtype:
            return False
        if device is not None and state.device != device:
            return False
        shape, wanted = state.shape, expected.shape
        return shape == wanted or (
            grows and len(shape) == len(wanted) and shape[:1] == wanted[:1] and shape[2:] == wanted[2:]
        )
    if type(state) is not type(expected) or expected is None:
        return state is expected
    return len(state) == len(expected) and all(_fits(*parts, device, grows) for parts in zip(state, expected))


def _compare(module: Any, state: State, rows: int) -> None:
    """Raise an error that names the first difference between ``state`` and the state that ``module`` expects."""
    name = type(module).__name__
    other = f"{name}: the state is of another {'block' if isinstance(module, Block) else 'model'}"
    fresh = _fresh(module, rows)
    kinds = [f"a tuple of {len(s)}" if type(s) is tuple else type(s).__name__ for s in (state, fresh)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"{name}: state is {kinds[0]}: expected {kinds[1]}")
    given, expected = dict(named_tensors(state)), dict(named_tensors(fresh))
    # persistent tokens may be stored separately, and a cache may have been created before ``bound`` was called
    optional = dict(named_tensors(_fresh(module, rows, prefix=True))) if isinstance(module, Block) else {}
    grows = module.grows or hasattr(module, "bound")
    for path in [*expected, *given]:
        tensor, wanted = given.get(path), expected.get(path)
        any_length = grows or wanted is None
        at = path or "it"  # a state that is one tensor
        wanted = optional.get(path) if wanted is None else wanted
        if tensor is None or wanted is None:
            shapes = ["absent" if x is None else list(x.shape) for x in (tensor, wanted)]
            raise ValueError(f"{other}: {at} is {shapes[0]}, expected {shapes[1]}")
        shape = ["any" if any_length and i == 1 else n for i, n in enumerate(wanted.shape)]
        if tensor.dim() != len(shape) or any(n not in (m, "any") for m, n in zip(tensor.shape[1:], shape[1:])):
            raise ValueError(f"{other}: {at} is {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")
        if tensor.shape[:1] != wanted.shape[:1]:
            raise ValueError(f"{name}: the state has {tensor.shape[0]} rows ({at}), the inputs have {rows}")
        if tensor.device != wanted.device:
            raise ValueError(f"{name}: state is on {tensor.device}, expected {wanted.device} ({at})")
        autocast = tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)
        if tensor.dtype != wanted.dtype and not (autocast and wanted.is_floating_point()):
            raise TypeError(f"{other}: {at} is {tensor.dtype}, expected {wanted.dtype}")

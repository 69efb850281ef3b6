"""What a compiler cannot look into is one operator to it.

A C kernel is no PyTorch code, and a loop over chunks asks for values that are not there yet. While ``torch.compile``
traces, and only then, a call of such a backend becomes a call of the operator ``titans_build::<operation>``: its
tensors in a list, and all else about it as text. The operator runs the backend as it is.

Backward is an operator too, and the backend's own. The forward operator records what autograd would, and puts out, as
one output more, a tensor of one byte that stands for the recording, which lives for as long as that tensor does. Should
the byte have been copied meanwhile (to be kept elsewhere, say), backward records once more.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .constant import constant

NAMESPACE = "titans_build"

OPAQUE: dict[str, Opaque] = {}
"""By the name of the operation."""


class Opaque:
    """An operation some of whose backends are opaque to compilers.

    Args:
        name: the operation's.
        runs: those backends' functions, by name. They take and return tensors, ``None``, numbers, strings, and
            (named) tuples of them.
        outputs: from the same arguments, tensors of the shapes and dtypes that are returned, in the same tuples;
            ``None`` where one is ``None``. What they hold does not matter.
        tuples: the kinds of named tuples among the arguments.
    """

    def __init__(
        self,
        name: str,
        runs: Mapping[str, Callable[..., Any]],
        outputs: Callable[..., Any],
        tuples: Sequence[type[Any]] = (),
    ) -> None:
        self.name, self.runs, self.outputs = name, runs, outputs
        self.tuples = {kind.__name__: kind for kind in tuples}
        OPAQUE[name] = self

    def call(self, backend: str, *arguments: Any, **options: Any) -> Any:
        """The operator in place of the backend. A compiler traces this."""
        tensors: list[Tensor] = []
        numbers: list[int] = []
        text = describe((backend, arguments, options), tensors, numbers)
        # which gradients are wanted is known while tracing
        wanted = [i for i, x in enumerate(tensors) if torch.is_grad_enabled() and x.requires_grad]
        found = operator(self.name)(tensors, numbers, text, wanted)
        return _rebuild(self.outputs(*arguments, **options), iter(found))

    def arguments(
        self, tensors: Sequence[Tensor], numbers: Sequence[int], text: str
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """What :func:`describe` was given."""
        left, count = iter(tensors), iter(numbers)

        def fill(x: Any) -> Any:
            if x is Ellipsis:
                return next(left)
            if x == NUMBER:
                return next(count)
            if isinstance(x, set):
                return float.fromhex(*x)
            if isinstance(x, tuple):
                return tuple([fill(each) for each in x])
            if isinstance(x, list):
                return self.tuples[x[0]](*[fill(each) for each in x[1:]])
            if isinstance(x, dict):
                return {name: fill(value) for name, value in x.items()}
            return x

        backend, arguments, options = fill(_parsed(text))
        return backend, arguments, options

    def run(self, tensors: Sequence[Tensor], numbers: Sequence[int], text: str) -> list[Tensor]:
        """The outputs that are tensors, in order."""
        backend, arguments, options = self.arguments(tensors, numbers, text)
        return list(_tensors(self.runs[backend](*arguments, **options)))


NUMBER = b""
"""What stands for a whole number in the text."""


def describe(x: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    """``x`` as a Python literal. Named tuples become lists that begin with their name, and real numbers sets.

    ``...`` and ``NUMBER`` stand for tensors and whole numbers, which are put into the lists: those that a tracer takes
    for symbols have no text of their own. Of a real number, ``hex`` is what makes a tracer settle on its value.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return "..."
    if isinstance(x, (tuple, list)):
        inner = "".join([f"{describe(each, tensors, numbers)}," for each in x])
        return f"[{type(x).__name__!r},{inner}]" if hasattr(x, "_fields") else f"({inner})"
    if isinstance(x, dict):
        return "{" + "".join([f"{name!r}:{describe(value, tensors, numbers)}," for name, value in x.items()]) + "}"
    if isinstance(x, float):
        return "{'" + x.hex() + "'}"
    if isinstance(x, int) and not isinstance(x, bool):
        numbers.append(x)
        return f"{NUMBER!r}"
    return repr(x)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    return ast.literal_eval(text)


def _rebuild(like: Any, found: Iterator[Tensor]) -> Any:
    """The tensors ``found`` in the tuples of ``like``."""
    if isinstance(like, Tensor):
        return next(found)
    if not isinstance(like, (tuple, list)):
        return like
    parts = [_rebuild(each, found) for each in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from _tensors(each)


# -- the operators -----------------------------------------------------------------------------------------------------


class _Recording(bytearray):
    """One byte, and what autograd recorded. The tensor made of the byte keeps it alive."""

    given: list[Tensor]
    """The operator's tensors, cut off from what came before."""
    edges: list[Any]
    """For each output, where its gradient enters, or ``None``."""

    def tensor(self) -> Tensor:
        byte = torch.frombuffer(self, dtype=torch.uint8)
        _RECORDINGS[byte.data_ptr()] = self
        return byte


_RECORDINGS: WeakValueDictionary[int, _Recording] = WeakValueDictionary()
"""By the address of the byte, which is no other's while the recording lives."""


@contextmanager
def _with_autograd() -> Iterator[None]:
    """Inside of an operator, which is called with autograd left behind."""
    keys, key = torch._C.DispatchKeySet, torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for each in (key.AutogradFunctionality, key.ADInplaceOrView):
        excluded = excluded - keys(each)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def _record(
    operation: Opaque, tensors: Sequence[Tensor], numbers: Sequence[int], text: str, wanted: Sequence[int]
) -> tuple[Any, Any]:
    recording = _Recording(1)
    with _with_autograd(), torch.enable_grad():
        recording.given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        outputs = operation.run(recording.given, numbers, text)
        recording.edges = [torch.autograd.graph.get_gradient_edge(y) if y.requires_grad else None for y in outputs]
    return outputs, recording


def _owned(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Dense, and no two of them, nor one and an input, in one piece of memory: operators promise that."""
    taken = {x.untyped_storage()._cdata for x in inputs}
    owned = []
    for y in outputs:
        y = y.detach().contiguous()
        if y.untyped_storage()._cdata in taken:
            y = y.clone(memory_format=torch.contiguous_format)
        taken.add(y.untyped_storage()._cdata)
        owned.append(y)
    return owned


def _forward(
    operation: Opaque, tensors: list[Tensor], numbers: list[int], text: str, wanted: list[int]
) -> list[Tensor]:
    if not wanted:
        with _with_autograd(), torch.no_grad():
            return _owned(operation.run([x.detach() for x in tensors], numbers, text), tensors)
    outputs, recording = _record(operation, tensors, numbers, text, wanted)
    return [*_owned(outputs, tensors), recording.tensor()]


def _forward_shapes(
    operation: Opaque, tensors: list[Tensor], numbers: list[int], text: str, wanted: list[int]
) -> list[Tensor]:
    _, arguments, options = operation.arguments(tensors, numbers, text)
    outputs = [_like(y) for y in _tensors(operation.outputs(*arguments, **options))]
    return [*outputs, torch.empty(1, dtype=torch.uint8, device="cpu")] if wanted else outputs


def _backward(
    operation: Opaque,
    grads: list[Tensor],
    tensors: list[Tensor],
    recorded: Tensor,
    numbers: list[int],
    text: str,
    wanted: list[int],
    given: list[int],
) -> list[Tensor]:
    """The gradients of the ``wanted`` tensors, from ``grads`` of the ``given`` outputs."""
    recording = _RECORDINGS.get(recorded.data_ptr())
    if recording is None:
        recording = _record(operation, tensors, numbers, text, wanted)[1]
    pairs = [(recording.edges[i], grad) for i, grad in zip(given, grads) if recording.edges[i] is not None]
    asked = [recording.given[i] for i in wanted]
    if not pairs:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in asked]
    edges, pushed = zip(*pairs)
    with _with_autograd():
        # it is released with the byte; before, backward may come once more
        found = torch.autograd.grad(edges, asked, pushed, retain_graph=True, allow_unused=True, materialize_grads=True)
    return _owned(found, [*grads, *tensors])


def _backward_shapes(
    operation: Opaque,
    grads: list[Tensor],
    tensors: list[Tensor],
    recorded: Tensor,
    numbers: list[int],
    text: str,
    wanted: list[int],
    given: list[int],
) -> list[Tensor]:
    return [_like(tensors[i]) for i in wanted]


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.numbers, ctx.text, ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[-1])


def _pull(name: str, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *tensors, recorded = ctx.saved_tensors
    given = [i for i, grad in enumerate(grads) if grad is not None]
    pull = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")
    found = iter(pull([grads[i] for i in given], tensors, recorded, ctx.numbers, ctx.text, ctx.wanted, given))
    # what is no list of tensors has one gradient, None; a list with nothing in it may be one
    nothing: list[None] | None = None if ctx.numbers else []
    return [next(found) if i in ctx.wanted else None for i in range(len(tensors))], nothing, None, None


def operator(name: str) -> Any:
    """``titans_build::<name>``, the operator of the operation ``name``; ``_define`` has its signature."""
    _define(name)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@constant
def _define(name: str) -> None:
    """Make the operators of an operation, once: it takes milliseconds. A tracer calls this, and does not trace it."""
    operation, qualified = OPAQUE[name], f"{NAMESPACE}::{name}"
    if operation in _DEFINED:
        return
    _DEFINED.append(operation)
    options: Any = dict(mutates_args=(), tags=_TAGS)
    forward = torch.library.custom_op(
        qualified,
        functools.partial(_forward, operation),
        schema="(Tensor[] tensors, SymInt[] numbers, str text, int[] wanted) -> Tensor[]",
        **options,
    )
    forward.register_fake(functools.partial(_forward_shapes, operation))
    forward.register_autograd(functools.partial(_pull, name), setup_context=_keep)
    backward = torch.library.custom_op(
        f"{qualified}_backward",
        functools.partial(_backward, operation),
        schema="(Tensor[] grads, Tensor[] tensors, Tensor recorded, SymInt[] numbers, str text, int[] wanted, "
        "int[] given) -> Tensor[]",
        **options,
    )
    backward.register_fake(functools.partial(_backward_shapes, operation))


_DEFINED: list[Opaque] = []
# they look at values and keep what they recorded outside of tensors, which a replay of launches would not do
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

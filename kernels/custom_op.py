"""Backends that a compiler cannot trace, as one operator each.

A C kernel is not PyTorch code, and a loop over chunks reads values that do not exist while tracing. While
``torch.compile`` traces, and only then, a call of such a backend becomes a call of the operator
``titans_build::<operation>``: its tensors in a list, everything else about it as text. The operator runs the backend.

Backward is an operator too, and runs the backend's own backward. The forward operator records the backend with autograd
and returns, as one more output, a tensor of one byte that stands for the recording and keeps it alive. Where the byte
was copied meanwhile (saved tensors moved elsewhere, say), backward records again.
"""

from __future__ import annotations

import ast
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


def format_symint(number: int) -> int | str:
    """``number`` for a message. Formatting a symbolic number would make a tracer specialize on its value."""
    return "several" if torch.compiler.is_compiling() else number


NAMESPACE = "titans_build"
NOT_TRACED = (
    "ONNX and torch.jit.trace cannot represent the kernels and the loops of titans-build: "
    "export with torch.export, or run it in PyTorch"
)

OPAQUE_OPERATIONS: dict[str, OpaqueOperation] = {}
"""By name."""


class OpaqueOperation:
    """An operation with backends that a compiler cannot trace.

    Args:
        name: of the operation.
        runs: the functions of these backends, by name. They take and return tensors, ``None``, numbers, strings, and
            (named) tuples of them.
        outputs: a function of the same arguments that returns tensors of the right shapes and dtypes, in the same
            tuples, and ``None`` where an output is ``None``; their values do not matter.
        tuples: classes of the named tuples among the arguments.
        differentiates: whether the functions use autograd themselves, also where no gradient of theirs is wanted.
    """

    def __init__(
        self,
        name: str,
        runs: Mapping[str, Callable[..., Any]],
        outputs: Callable[..., Any],
        tuples: Sequence[type[Any]] = (),
        differentiates: bool = False,
    ) -> None:
        self.name, self.runs, self.outputs, self.differentiates = name, runs, outputs, differentiates
        self.tuples = {kind.__name__: kind for kind in tuples}
        OPAQUE_OPERATIONS[name] = self
        _define(self)

    def call(self, backend: str, *arguments: Any, **options: Any) -> Any:
        """The operator in place of the backend; this is what a compiler traces."""
        tensors: list[Tensor] = []
        numbers: list[int] = []
        text = serialize((backend, arguments, options), tensors, numbers)
        # which gradients are wanted is known while tracing
        wanted = [i for i, x in enumerate(tensors) if torch.is_grad_enabled() and x.requires_grad]
        found = operator(self.name)(tensors, numbers, text, wanted)
        return _rebuild(self.outputs(*arguments, **options), iter(found))

    def arguments(
        self, tensors: Sequence[Tensor], numbers: Sequence[int], text: str
    ) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The arguments that :func:`serialize` was given."""
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
        with running():
            return list(_tensors(self.runs[backend](*arguments, **options)))


NUMBER = b""
"""Stands for an integer in the text."""


def serialize(x: Any, tensors: list[Tensor], numbers: list[int]) -> str:
    """``x`` as a Python literal. Named tuples become lists that begin with their name, and floats sets.

    ``...`` and ``NUMBER`` stand for tensors and integers, which are appended to the lists: symbolic integers have no
    text. ``float.hex`` makes a tracer specialize on a float's value.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return "..."
    if isinstance(x, (tuple, list)):
        inner = "".join([f"{serialize(each, tensors, numbers)}," for each in x])
        return f"[{type(x).__name__!r},{inner}]" if hasattr(x, "_fields") else f"({inner})"
    if isinstance(x, dict):
        return "{" + "".join([f"{name!r}:{serialize(value, tensors, numbers)}," for name, value in x.items()]) + "}"
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
    """The tensors ``found``, in tuples as in ``like``."""
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
    """One byte, and the graph that autograd recorded. The tensor made of the byte keeps both alive."""

    given: list[Tensor]
    """The operator's tensors, detached."""
    edges: list[Any]
    """For each output its ``GradientEdge``, or ``None``."""

    def tensor(self) -> Tensor:
        byte = torch.frombuffer(self, dtype=torch.uint8)
        _RECORDINGS[byte.data_ptr()] = self
        return byte


_RECORDINGS: WeakValueDictionary[int, _Recording] = WeakValueDictionary()
"""By the address of the byte, which is unique while the recording lives."""


class _Thread(threading.local):
    runs_operator = False


THREAD = _Thread()


@contextmanager
def running() -> Iterator[None]:
    """Where the tensors are those of an operator, which no mode of a tracer sees."""
    before, THREAD.runs_operator = THREAD.runs_operator, True
    try:
        yield
    finally:
        THREAD.runs_operator = before


def _with_autograd(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """``function(...)`` in a thread of its own: in the thread that runs an operator, autograd is switched off."""

    def run() -> Any:
        with running():
            return function(*arguments, **options)

    return _threads(os.getpid()).submit(run).result()


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Of this process: a forked one has none."""
    return ThreadPoolExecutor(thread_name_prefix="titans-build operators")


def _record(
    operation: OpaqueOperation, tensors: Sequence[Tensor], numbers: Sequence[int], text: str, wanted: Sequence[int]
) -> tuple[Any, Any]:
    recording = _Recording(1)
    recording.given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    outputs = operation.run(recording.given, numbers, text)
    recording.edges = [torch.autograd.graph.get_gradient_edge(y) if y.requires_grad else None for y in outputs]
    return outputs, recording


def _run_alone(
    operation: OpaqueOperation, tensors: Sequence[Tensor], numbers: Sequence[int], text: str
) -> Sequence[Tensor]:
    # autograd does not save the tensors of inference mode
    given = [x.clone() if x.is_inference() else x.detach() for x in tensors]
    with torch.no_grad():
        return operation.run(given, numbers, text)


def _owned(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs dense, none sharing storage with an input or another output: operators may not."""
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    owned = []
    for y in outputs:
        y = y.detach().contiguous()
        if y.untyped_storage().data_ptr() in taken:
            y = y.clone(memory_format=torch.contiguous_format)
        taken.add(y.untyped_storage().data_ptr())
        owned.append(y)
    return owned


def _forward(
    operation: OpaqueOperation, tensors: list[Tensor], numbers: list[int], text: str, wanted: list[int]
) -> list[Tensor]:
    if not wanted and operation.differentiates:
        return _owned(_with_autograd(_run_alone, operation, tensors, numbers, text), tensors)
    if not wanted:
        with torch.no_grad():
            return _owned(operation.run([x.detach() for x in tensors], numbers, text), tensors)
    outputs, recording = _with_autograd(_record, operation, tensors, numbers, text, wanted)
    return [*_owned(outputs, tensors), recording.tensor()]


def _forward_shapes(
    operation: OpaqueOperation, tensors: list[Tensor], numbers: list[int], text: str, wanted: list[int]
) -> list[Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(NOT_TRACED)
    _, arguments, options = operation.arguments(tensors, numbers, text)
    outputs = [_like(y) for y in _tensors(operation.outputs(*arguments, **options))]
    return [*outputs, torch.empty(1, dtype=torch.uint8, device="cpu")] if wanted else outputs


def _backward(
    operation: OpaqueOperation,
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
        recording = _with_autograd(_record, operation, tensors, numbers, text, wanted)[1]
    pairs = [(recording.edges[i], grad) for i, grad in zip(given, grads) if recording.edges[i] is not None]
    inputs = [recording.given[i] for i in wanted]
    if not pairs:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    edges, pushed = zip(*pairs)
    # the graph is released with the byte; until then, backward may run again
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    found = _with_autograd(torch.autograd.grad, edges, inputs, pushed, **options)
    return _owned(found, [*grads, *tensors])


def _backward_shapes(
    operation: OpaqueOperation,
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


def _vjp(name: str, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *tensors, recorded = ctx.saved_tensors
    given = [i for i, grad in enumerate(grads) if grad is not None]
    backward = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")
    found = iter(backward([grads[i] for i in given], tensors, recorded, ctx.numbers, ctx.text, ctx.wanted, given))
    # the gradient of an argument that is not a list of tensors is None; an empty list counts as a list of tensors
    nothing: list[None] | None = None if ctx.numbers else []
    return [next(found) if i in ctx.wanted else None for i in range(len(tensors))], nothing, None, None


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# they read values and keep recordings outside of tensors, which a replayed CUDA graph would not
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_FORWARD = "(Tensor[] tensors, SymInt[] numbers, str text, int[] wanted) -> Tensor[]"
_BACKWARD = (
    "(Tensor[] grads, Tensor[] tensors, Tensor recorded, SymInt[] numbers, str text, int[] wanted, int[] given) "
    "-> Tensor[]"
)


def _define(operation: OpaqueOperation) -> None:
    """The operators ``titans_build::<name>`` and ``titans_build::<name>_backward``, unless they are there.

    They are there where this folder is imported a second time: transformers imports a package ``kernels`` if it finds
    one, and finds this folder in programs that are run in the root of the repository.
    """
    if hasattr(getattr(torch.ops, NAMESPACE), operation.name):
        return
    for name, schema, run, shapes in (
        (operation.name, _FORWARD, _forward, _forward_shapes),
        (f"{operation.name}_backward", _BACKWARD, _backward, _backward_shapes),
    ):
        _LIBRARY.define(name + schema, tags=_TAGS)
        _LIBRARY.impl(name, functools.partial(run, operation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", functools.partial(shapes, operation), lib=_LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{operation.name}", functools.partial(_vjp, operation.name), setup_context=_keep, lib=_LIBRARY
    )


def operator(name: str) -> Any:
    """The operator ``titans_build::<name>``."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default

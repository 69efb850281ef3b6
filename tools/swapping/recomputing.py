"""Forward passes inside of a backward one: which call of the model they repeat.

Gradient checkpointing runs parts of a model again while gradients are taken, long after the call they belong to has
ended. Gradients reach such a part through what the call returned, or what a module around the part did: whoever
returns a tensor leaves a note on it, and the note is read when the gradient passes by.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Variable

Frame: TypeAlias = Any
"""A call of a model: ``frame.Frame``. Nothing is asked of it here."""

_passing: dict[int, dict[int, weakref.ref[Frame]]] = {}
"""For each backward pass, for each of its threads: the call whose gradients passed by last."""


def backward_pass() -> int:
    """The number of the backward pass that this is part of; -1 outside of all."""
    return torch._C._current_graph_task_id()


def note(output: Any, frame: Frame) -> None:
    """Leave the note that ``output`` comes from this call."""
    if torch.is_grad_enabled():
        for tensor in tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(functools.partial(_pass, frame))


def repeated() -> Frame | None:
    """The call that is repeated just now."""
    threads = _passing.get(backward_pass())
    if not threads:
        return None
    return (threads.get(threading.get_ident()) or next(reversed(threads.values())))()


def _pass(frame: Frame, gradient: Tensor) -> None:
    task = backward_pass()
    if task not in _passing:
        _passing[task] = {}
        Variable._execution_engine.queue_callback(functools.partial(_forget, task))
    threads = _passing[task]
    threads.pop(threading.get_ident(), None)  # the newest is last
    threads[threading.get_ident()] = weakref.ref(frame)  # a pass that fails takes nothing back


def _forget(task: int) -> None:
    _passing.pop(task, None)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in what a module returns: tuples, lists, mappings, and objects of the model's own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        for item in vars(value).values():
            if isinstance(item, Tensor | Mapping | tuple | list):
                yield from tensors(item)

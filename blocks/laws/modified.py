"""The law about layers that are modified from outside: they are called, whatever path computes the outputs."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..block import Block
from .subject import Result, Subject

FACTOR = 1.5


def hooked(subject: Subject) -> None:
    """A modified layer (hooks, LoRA, parametrizations) gives what the same change of its weights gives, in every path.

    The paths: several tokens from a fresh state and from a later one, few tokens, one token, a decoder, and ``read``.
    All linear layers are modified together in every way, and each alone in one. Hooks of the blocks inside run too.
    """
    modified, plain = copy.deepcopy(subject.module), copy.deepcopy(subject.module)
    layers = [name for name, layer in modified.named_modules() if isinstance(layer, nn.Linear)]
    blocks = [name for name, layer in modified.named_modules() if isinstance(layer, Block)]
    with torch.no_grad():
        for scales_bias in (False, True) if layers else ():
            alike = [one for one in _MODIFICATIONS if (one in _ON_OUTPUTS) == scales_bias]
            _compare(subject, modified, plain, layers, alike)
        for name, modification in zip(layers, itertools.cycle(_MODIFICATIONS)):
            _compare(subject, modified, plain, [name], [modification])
        for name in blocks:
            with _forward_of_instance(modified, name) as replaced, _forward_hook(modified, name) as calls:
                results = _results(subject, modified)
            what = name or "the block"
            if not calls or not replaced:
                subject.fail(f"{'a hook' if replaced else 'the replaced forward'} of {what} was not called")
            for path in ("few tokens", "one token", "a decoder"):
                subject.same_result(f"{path}, with a hook of {what}", results[path], results["several tokens"])


def _compare(
    subject: Subject, modified: Any, plain: Any, layers: list[str], modifications: Sequence[_Modification]
) -> None:
    """Modify ``layers`` of ``modified``, scale their weights in ``plain``, and compare the outputs and states."""
    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(_scaled(plain, name, modifications[0] in _ON_OUTPUTS))
        expected = _results(subject, plain)
    for modification in modifications:
        with ExitStack() as stack:
            for name in layers:
                stack.enter_context(modification.apply(modified, name))
            for path, result in _results(subject, modified).items():
                what = f"{path}, with {modification.kind} {', '.join(layers)}"
                subject.same_result(f"{what}, and with other weights", result, expected[path])


def _results(subject: Subject, module: Any) -> dict[str, Result]:
    """The outputs and states of every path."""
    x, rest = subject.tokens(2, subject.length), min(5, subject.length // 2)
    after = subject.length - rest
    first, start = subject.run(x[:, :after], module=module)
    results = {"a fresh state": Result(first, start)}
    run = functools.partial(subject.run, module=module)
    with torch.inference_mode():
        for path, call, cuts in (
            ("several tokens", run, [rest]),
            ("few tokens", run, [rest // 2, rest - rest // 2]),
            ("one token", run, [1] * rest),
            ("a decoder", subject.decoder(2, module), [1] * rest),
        ):
            outputs, state = [], start
            for part in x[:, after:].split(cuts, dim=1):
                y, state = call(part, state)
                outputs.append(y.clone())
            results[path] = Result(torch.cat(outputs, dim=1), state)
        for time in (1, rest) if _is_memory(module) else ():
            results[f"read of {time}"] = Result(module.read(x[:, :time], start), None)
    return results


def _is_memory(module: Any) -> bool:
    inner = [module.get_submodule(field) for field in getattr(module, "delegates", ())]
    children = [child for field in inner for child in (field if isinstance(field, nn.ModuleList) else [field])]
    return hasattr(module, "read") and all(map(_is_memory, children))


# -- modifications -----------------------------------------------------------------------------------------------------


@contextmanager
def _scaled(root: nn.Module, name: str, scales_bias: bool) -> Iterator[None]:
    """Multiply the weights by ``FACTOR``."""
    tensors = [p for field, p in root.get_submodule(name).named_parameters() if scales_bias or field != "bias"]
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.mul_(FACTOR)
    yield
    for tensor, before in zip(tensors, kept):
        tensor.copy_(before)


def _scale(output: Any) -> Any:
    return (FACTOR * output[0], *output[1:]) if isinstance(output, tuple) else FACTOR * output


@contextmanager
def _forward_hook(root: nn.Module, name: str) -> Iterator[list[str]]:
    calls: list[str] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(name)
        return _scale(output)

    with root.get_submodule(name).register_forward_hook(hook):
        yield calls


@contextmanager
def _forward_of_instance(root: nn.Module, name: str) -> Iterator[list[str]]:
    layer: Any = root.get_submodule(name)
    calls: list[str] = []
    forward = layer.forward

    def call(*args: Any, **named: Any) -> Any:
        calls.append(name)
        return _scale(forward(*args, **named))

    layer.forward = call
    yield calls
    del layer.forward


@contextmanager
def _forward_pre_hook(root: nn.Module, name: str) -> Iterator[None]:
    with root.get_submodule(name).register_forward_pre_hook(lambda layer, args: (FACTOR * args[0], *args[1:])):
        yield


class _Adapter(nn.Module):
    """A layer with an adapter beside it, as LoRA is. Its weight is that of the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + (FACTOR - 1) * nn.functional.linear(x, self.weight)


@contextmanager
def _adapter(root: nn.Module, name: str) -> Iterator[None]:
    layer = root.get_submodule(name)
    root.set_submodule(name, _Adapter(layer))  # type: ignore[arg-type]
    yield
    root.set_submodule(name, layer)


class _Scale(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return FACTOR * weight


@contextmanager
def _parametrization(root: nn.Module, name: str) -> Iterator[None]:
    layer = root.get_submodule(name)
    parametrize.register_parametrization(layer, "weight", _Scale())
    yield
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


class _Modification(NamedTuple):
    kind: str
    apply: Callable[[nn.Module, str], AbstractContextManager[list[str] | None]]


_ON_OUTPUTS = [_Modification("a hook of", _forward_hook), _Modification("a replaced forward of", _forward_of_instance)]
"""They scale the bias too."""
_MODIFICATIONS = [
    *_ON_OUTPUTS,
    _Modification("a pre-hook of", _forward_pre_hook),
    _Modification("an adapter of", _adapter),
    _Modification("a parametrization of", _parametrization),
]

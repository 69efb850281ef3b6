"""Activation checkpointing: a layer keeps its inputs alone, and runs again when its gradients are wanted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from ...blocks.language_model import LanguageModel


@contextlib.contextmanager
def recomputing(model: LanguageModel, by: Callable[..., Any] | None = None, every: int = 1) -> Iterator[None]:
    """For the length of a ``with`` block, every layer of ``model`` does so, or one in ``every``.

    ``by``: calls a function with arguments, and again when gradients are wanted; ``None`` is PyTorch's. The state
    goes in and out of a layer like any other argument, so gradients through it are the same, too. No module is wrapped
    in another: parameters keep their names.
    """
    by = functools.partial(checkpoint, use_reentrant=False) if by is None else by
    layers: list[Any] = list(model.layers)[::every]
    for layer in layers:
        layer.forward = functools.partial(by, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)

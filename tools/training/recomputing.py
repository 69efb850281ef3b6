"""Activation checkpointing: a layer keeps its inputs alone, and runs again when its gradients are wanted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from ...blocks.language_model import LanguageModel


@contextlib.contextmanager
def recomputing(model: LanguageModel) -> Iterator[None]:
    """For the length of a ``with`` block, every layer of ``model`` does so.

    The state goes in and out of a layer like any other argument, so gradients through it are the same, too. No
    module is wrapped in another: parameters keep their names.
    """
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)

"""Saves swaps: without their model, in a file with the weights of their blocks, or with a model of transformers."""

from __future__ import annotations

import json
import os
import sys

from torch import nn

from ...recipes.saved_format import StorageError
from ...recipes.saved_state import read_state_file, write_state_file
from ...registry import show
from .adapter import SwapError
from .install import has_adapters, sites_of_swaps, swap, swaps, unswap
from .plan import FIELDS, Plan, moved
from .site import WHEN_MADE, in_use

FORMAT = "titans-build swaps"


def save_swaps(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the swaps in ``model`` and the weights of their blocks to a safetensors file, which is replaced atomically.

    The model's own weights are not in it: :func:`load_swaps` puts the blocks into any model that has the modules.

    Raises ``SwapError`` for a model without swaps and for blocks that were given as modules, ``StorageError`` if the
    file cannot be written.
    """
    records = [plan.record for plan in swaps(model)]
    if not records:
        raise SwapError(f"save_swaps: {type(model).__name__} has no swaps in it")
    tensors = {}
    for index, (_, sites) in enumerate(sites_of_swaps(model)):
        for place, site in sites.items():
            trained = in_use(site)
            if has_adapters(trained):
                raise SwapError(f"save_swaps: {place}: the block has adapters of PEFT: merge_and_unload() merges them")
            tensors.update({f"{index}.{place}.{name}": tensor for name, tensor in trained.state_dict().items()})
    write_state_file(path, FORMAT, tensors, swaps=json.dumps(records))


def load_swaps(model: nn.Module, path: str | os.PathLike[str]) -> list[Plan]:
    """Repeat the swaps of a file of :func:`save_swaps` in ``model``, with the weights of their blocks.

    Returns the plans. ``model`` may have another head than the model that was saved, or be quantized.

    Raises ``SwapError`` if the swaps do not fit the model, and ``StorageError`` if the file is not of swaps or is
    damaged. Leaves the model unchanged.
    """
    metadata, tensors = read_state_file(path, FORMAT)
    records = json.loads(metadata.get("swaps", "null"))
    if not isinstance(records, list) or not all(isinstance(one, dict) and set(one) == set(FIELDS) for one in records):
        raise StorageError(f"{path}: expected records of swaps, got {show(records)}")
    made: list[Plan] = []
    try:
        for index, record in enumerate(records):
            made.append(swap(model, **moved(record, model)))
            _, sites = sites_of_swaps(model)[-1]
            for before, site in zip(record["where"], sites.values(), strict=True):
                start = f"{index}.{before}."
                site.load_state_dict(
                    {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
                )
    except BaseException as error:
        for plan in reversed(made):
            unswap(model, plan)
        if isinstance(error, RuntimeError):
            raise StorageError(f"{path}: the weights do not fit the swaps: {error}") from None
        raise
    return made


def _register_with_transformers() -> None:
    """Have models of transformers save the swaps in them."""
    if "transformers.modeling_utils" in sys.modules:
        from . import pretrained  # noqa: F401


WHEN_MADE.append(_register_with_transformers)

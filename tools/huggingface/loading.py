"""Back from a folder: whatever ``save_pretrained`` or ``tb.save`` has written there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ...recipes import StorageError, load
from ...registry import show
from .model import as_pretrained, is_saved_model
from .swapped import AUTO


def from_pretrained(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model in ``folder``: one of a recipe, or one of transformers, with swaps in it or without.

    ``kwargs``: as ``from_pretrained`` of transformers takes them (``dtype``, ``device_map``, ...); of a folder that
    ``tb.save`` wrote, ``dtype`` alone. The class is the one that was saved. Runs no code from the folder.

    Raises ``StorageError`` where the weights are not those of the model that is described, and whatever transformers
    raises for a folder that holds no model.
    """
    place = Path(folder)
    if is_saved_model(place):
        dtype = kwargs.pop("dtype", None)
        if kwargs:
            raise TypeError(f"{place}: a folder of tb.save is read with dtype alone, got {', '.join(kwargs)}")
        return as_pretrained(load(place, dtype=None if dtype == "auto" else dtype)).eval()
    config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    wanted = (config.architectures or ["?"])[0]
    for name in AUTO:
        auto: Any = getattr(modeling_auto, name)
        kind = auto._model_mapping.get(type(config), None)
        if getattr(kind, "__name__", None) == wanted:
            return auto.from_pretrained(str(place), trust_remote_code=False, **kwargs)
    raise StorageError(f"{place}: no class {show(wanted)} is known that reads a {type(config).__name__}")

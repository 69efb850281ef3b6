"""Loads models of transformers from folders: recipe models, models with swaps, and others."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from ...recipes import StorageError, load
from ...registry import show
from ..swapping import SwapError, swaps
from ..swapping.pretrained import METHOD, SwappedConfig, method_of  # which registers what reads swapped models
from .model import as_pretrained, expect_whole, is_saved_model

AUTO = ("", "_FOR_CAUSAL_LM", "_FOR_MASKED_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_SEQUENCE_CLASSIFICATION",
        "_FOR_TOKEN_CLASSIFICATION", "_FOR_QUESTION_ANSWERING")  # fmt: skip
"""The Auto classes with which other libraries register models: ``transformers.MODEL*_MAPPING``."""


def from_pretrained(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model in ``folder``, in the class that was saved: whatever ``save_pretrained`` or ``tb.save`` wrote there.

    ``kwargs``: as for ``from_pretrained`` of transformers (``dtype``, ``device_map``, ...); for a folder that
    ``tb.save`` wrote, ``dtype`` alone. Runs no code from the folder.

    Raises ``StorageError`` if the weights do not belong to the configuration, ``SwapError`` if a model with swaps is
    to be quantized, and what transformers raises for a folder without a model.
    """
    place = Path(folder)
    if is_saved_model(place):
        dtype = kwargs.pop("dtype", None)
        if kwargs:
            raise TypeError(f"{place}: a folder of tb.save is read with dtype alone, got {', '.join(kwargs)}")
        return as_pretrained(load(place, dtype=None if dtype == "auto" else dtype)).eval()
    config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    wanted = (config.architectures or ["?"])[0]
    registered = [getattr(transformers, f"MODEL{name}_MAPPING").get(type(config), None) for name in AUTO]
    kinds = [kind for kind in registered if getattr(kind, "__name__", None) == wanted]
    kind: Any = kinds[0] if kinds else getattr(transformers, wanted, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise StorageError(f"{place}: no class {show(wanted)} is known that reads a {type(config).__name__}")
    if SwappedConfig.get_config_dict(str(place))[0].get("model_type") == SwappedConfig.model_type:
        kwargs.setdefault("config", config)  # which the class of the model cannot read
    if kwargs.get("quantization_config") is not None and method_of(config) == METHOD:
        raise SwapError(
            f"{place}: a model with swaps is not quantized when it is loaded: quantize the model without them, and "
            "tb.load_swaps puts in what tb.save_swaps has saved"
        )
    if "config" in kwargs and hasattr(config, "quantization_config"):
        kwargs["config"] = copy.deepcopy(kwargs["config"])
        kwargs["config"].quantization_config = config.quantization_config  # the swaps, which no other configuration has
    output_loading_info = kwargs.pop("output_loading_info", False)
    reader: Any = kind
    model, info = reader.from_pretrained(str(place), trust_remote_code=False, output_loading_info=True, **kwargs)
    if swaps(model) or any(".titans" in name for name in info["unexpected_keys"]):
        expect_whole(info, str(place), f"the {wanted} with its swaps")
    return (model, info) if output_loading_info else model

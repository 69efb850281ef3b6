"""Loads models of transformers from folders: recipe models, models with swaps, and others."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ...recipes import StorageError, load
from ...registry import show
from ..swapping.config_record import FIELDS, MODEL_TYPE, VERSION, config_from_record, records_of
from ..swapping.install import frozen_names, swap
from .model import as_pretrained, expect_whole, is_saved_model

AUTO = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
"""The Auto classes, and their mappings from configurations to classes of models."""


def from_pretrained(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The model in ``folder``, in the class that was saved: whatever ``save_pretrained`` or ``tb.save`` wrote there.

    ``kwargs``: as for ``from_pretrained`` of transformers (``dtype``, ``device_map``, ...); for a folder that
    ``tb.save`` wrote, ``dtype`` alone. Runs no code from the folder.

    Raises ``StorageError`` if the weights do not belong to the configuration, and what transformers raises for a folder
    without a model.
    """
    place = Path(folder)
    if is_saved_model(place):
        dtype = kwargs.pop("dtype", None)
        if kwargs:
            raise TypeError(f"{place}: a folder of tb.save is read with dtype alone, got {', '.join(kwargs)}")
        return as_pretrained(load(place, dtype=None if dtype == "auto" else dtype)).eval()
    config = AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    wanted = (config.architectures or ["?"])[0]
    for auto, _ in _auto_classes(type(config), wanted):
        return auto.from_pretrained(str(place), trust_remote_code=False, **kwargs)
    raise StorageError(f"{place}: no class {show(wanted)} is known that reads a {type(config).__name__}")


class SwappedConfig(PreTrainedConfig):
    """The ``config.json`` of a swapped model. ``AutoConfig`` reads it as the configuration of the original model.

    It contains the records of the swaps, which are repeated, in order, when a model is created from it.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises ``StorageError`` for what was written by a later version or by something else."""
        record, architectures = config_dict.get("titans_build"), config_dict.get("architectures")
        record = record if isinstance(record, dict) else {}
        kind, swaps = record.get("into"), record.get("swaps")
        if not isinstance(swaps, list) or not isinstance(config_dict.get("config"), dict):
            raise StorageError(f"config.json: expected the swaps of a {MODEL_TYPE} model, got {show(config_dict)}")
        if record.get("version") != VERSION:
            raise StorageError(
                f"config.json: expected version {VERSION} of the record of swaps, got {show(record.get('version'))}; "
                "a later one needs a later titans-build"
            )
        odd = [one for one in swaps if not isinstance(one, dict) or set(one) != set(FIELDS)]
        if odd:
            raise StorageError(
                f"config.json: swaps: expected each with the keys {', '.join(FIELDS)}, got {show(odd[0])}"
            )
        if kind not in CONFIG_MAPPING or not isinstance(architectures, list) or len(architectures) != 1:
            raise StorageError(
                f"config.json: swaps into a model of type {show(kind)} (class {show(architectures)}), which this "
                "transformers does not have"
            )
        original = CONFIG_MAPPING[kind]
        result = config_from_record(original, config_dict, **kwargs)
        swapped: Any = type(result[0] if isinstance(result, tuple) else result)
        for auto, model_class in _auto_classes(original, architectures[0]):
            auto.register(swapped, _with_swaps(model_class, swapped), exist_ok=True)
        return result


def _auto_classes(config: type, architecture: str) -> list[tuple[Any, Any]]:
    """The Auto classes that create an ``architecture`` from a ``config``, each with that class."""
    found = []
    for auto, mapping in AUTO.items():
        kind = getattr(transformers, mapping).get(config, None)
        if getattr(kind, "__name__", None) == architecture:
            found.append((getattr(transformers, auto), kind))
    return found


@functools.cache
def _with_swaps(kind: Any, config_type: type) -> type:
    """A subclass of ``kind`` that makes the swaps of its configuration in ``__init__``. Loading returns a ``kind``."""

    class WithSwaps(kind):
        config_class = config_type

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for record in records_of(config):
                swap(self, **record)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            output_loading_info = kwargs.pop("output_loading_info", False)
            kwargs.setdefault("use_safetensors", True)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model.__class__ = kind
            expect_whole(info, str(pretrained_model_name_or_path), f"the {kind.__name__} with its swaps")
            for name in frozen_names(model):
                model.get_parameter(name).requires_grad_(False)
            return (model, info) if output_loading_info else model

    WithSwaps.__name__ = WithSwaps.__qualname__ = kind.__name__
    return WithSwaps


AutoConfig.register(MODEL_TYPE, SwappedConfig, exist_ok=True)

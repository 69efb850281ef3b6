"""Models of transformers with swaps in them, read back: built as their configuration says, swapped, and then filled."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...recipes import StorageError
from ...registry import show
from ..swapping.config_record import FIELDS, MODEL_TYPE, VERSION, attach_records, records_of
from ..swapping.swap import frozen_names, swap
from .checking import expect_whole

AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


class SwappedConfig(PreTrainedConfig):
    """How ``AutoConfig`` reads the ``config.json`` of a swapped model: as the configuration of what was swapped into.

    It holds the records of the swaps, which are done again, in order, when a model is made of it.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises ``StorageError`` for what was written by a later version or by something else."""
        record, data = config_dict.get("titans_build"), config_dict.get("config")
        architectures = config_dict.get("architectures")
        if not isinstance(record, dict) or not isinstance(data, dict) or not isinstance(record.get("swaps"), list):
            raise StorageError(f"config.json: expected the swaps of a {MODEL_TYPE} model, got {show(config_dict)}")
        if record.get("version") != VERSION:
            raise StorageError(
                f"config.json: expected version {VERSION} of the record of swaps, got {show(record.get('version'))}; "
                "a later one needs a later titans-build"
            )
        for swap_record in record["swaps"]:
            if not isinstance(swap_record, dict) or set(swap_record) != set(FIELDS):
                raise StorageError(
                    f"config.json: swaps: expected each with the keys {', '.join(FIELDS)}, got {show(swap_record)}"
                )
        kind = record.get("into")
        if kind not in CONFIG_MAPPING or not isinstance(architectures, list) or len(architectures) != 1:
            raise StorageError(
                f"config.json: swaps into a model of type {show(kind)} (class {show(architectures)}), which this "
                "transformers does not have"
            )
        given = kwargs.pop("return_unused_kwargs", False)
        config, unused = CONFIG_MAPPING[kind].from_dict(dict(data), return_unused_kwargs=True, **kwargs)
        base = type(config)
        attach_records(config, architectures[0], record["swaps"])
        _make_known(base, type(config), architectures[0])
        return (config, unused) if given else config


def _make_known(base: type, config: type, architecture: str) -> None:
    """Let the Auto class that reads ``architecture`` read it with swaps."""
    for name in AUTO:
        auto: Any = getattr(modeling_auto, name)
        kind = auto._model_mapping.get(base, None)
        if getattr(kind, "__name__", None) == architecture:
            auto.register(config, _swapped(kind, config), exist_ok=True)


@functools.cache
def _swapped(kind: Any, config_type: type) -> type:
    """``kind`` with the swaps of its configuration put in when it is made; what is read is a ``kind`` again."""

    class Swapped(kind):
        config_class = config_type

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for record in records_of(config):
                swap(self, **record)

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            tell = kwargs.pop("output_loading_info", False)
            kwargs.setdefault("use_safetensors", True)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model.__class__ = kind
            expect_whole(info, str(pretrained_model_name_or_path), f"the {kind.__name__} with its swaps")
            for name in frozen_names(model):
                model.get_parameter(name).requires_grad_(False)
            return (model, info) if tell else model

    Swapped.__name__ = Swapped.__qualname__ = kind.__name__
    return Swapped


AutoConfig.register(MODEL_TYPE, SwappedConfig, exist_ok=True)

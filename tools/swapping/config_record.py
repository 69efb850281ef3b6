"""What ``save_pretrained`` writes for a swapped model: its swaps as data, in a configuration of a type of its own.

A reader that does not know of swaps therefore fails, and does not load the model without them. In every other respect
the configuration is that of the model. This file does not import transformers.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...recipes.atomic_write import atomic_write
from .adapter import SwapError
from .plan import Plan

MODEL_TYPE = "titans_build_swapped"
VERSION = 1
FIELDS = ("where", "block", "how", "gate", "train", "dim", "adapter")
"""Of the record of a swap."""
_SWAPS = "_titans_build_swaps"


def record_swaps(model: nn.Module, plans: Sequence[Plan]) -> None:
    """Record ``plans``, the swaps in ``model`` now, in its configuration, if it is a model of transformers."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    if plans:
        config = model.config if _SWAPS in vars(model.config) else _own_config(model)
        attach_records(config, type(model).__name__, [_record(plan) for plan in plans])
    elif _SWAPS in vars(model.config):
        del vars(model.config)[_SWAPS]
        model.config.__class__ = type(model.config).__bases__[0]


def attach_records(config: Any, model_class: str, records: Sequence[dict[str, Any] | str]) -> None:
    """Add the records of swaps in a ``model_class`` to ``config``. A string says why there is no record."""
    if _SWAPS not in vars(config):
        kind: Any = type(config)
        config.__class__ = _with_swaps(kind)
    vars(config)[_SWAPS] = {"of": model_class, "swaps": list(records)}


def records_of(config: Any) -> list[dict[str, Any]]:
    """The records of swaps in ``config``."""
    return list(vars(config).get(_SWAPS, {}).get("swaps", ()))


def _own_config(model: Any) -> Any:
    """The configuration of ``model``, copied, since other models may have the same one.

    That of a model without a head is not copied: the model may be part of another, which checks it when it is saved.
    """
    shared = model.config
    if model.base_model is model:
        return shared
    own = copy.copy(shared)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if value is shared]:
            vars(module)[name] = own
    return own


def _record(plan: Plan) -> dict[str, Any] | str:
    try:
        return plan.record
    except SwapError as error:
        return str(error)


@functools.cache
def _with_swaps(base: Any) -> Any:
    """The class of configurations ``base`` with swaps."""

    class WithSwaps(base):
        def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
            """Raises ``SwapError`` for a swap without a record, and for one in a part of the model."""
            data = json.loads(self.to_json_string(use_diff=use_diff))
            model_class, records = vars(self)[_SWAPS].values()
            problem = next((record for record in records if isinstance(record, str)), None)
            saved = data.get("architectures") or [model_class]
            if problem is None and model_class not in saved:
                problem = (
                    f"the swap was made in the {model_class} that is part of this {saved[0]}: swap into the whole "
                    "model, by paths from its top"
                )
            if problem is not None:
                raise SwapError(f"save_pretrained: {problem}")
            whole = {
                "model_type": MODEL_TYPE,
                "architectures": saved,
                # no dtype, on purpose: a class that is named outright reads any file as its own, and fails here
                "dtype": "this model has swaps in it: read it with titans_build.huggingface",
                "titans_build": {"version": VERSION, "into": data.pop("model_type"), "swaps": records},
                "config": data,
            }
            with atomic_write(Path(json_file_path)) as temporary:
                temporary.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        def to_dict(self) -> dict[str, Any]:
            return {name: value for name, value in super().to_dict().items() if name != _SWAPS}

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """From a folder with swaps or without: PEFT reads a model's configuration again by its class."""
            if config_dict.get("model_type") != MODEL_TYPE:
                return base.from_dict(config_dict, **kwargs)
            return config_from_record(base, config_dict, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _restore, (base, dict(vars(self)))

    WithSwaps.__name__ = WithSwaps.__qualname__ = f"Swapped{base.__name__}"
    return WithSwaps


def config_from_record(base: Any, written: dict[str, Any], **kwargs: Any) -> Any:
    """``base.from_dict`` of the original configuration in ``written``, with the records of its swaps."""
    return_unused = kwargs.pop("return_unused_kwargs", False)
    config, unused = base.from_dict(dict(written["config"]), return_unused_kwargs=True, **kwargs)
    attach_records(config, written["architectures"][0], written["titans_build"]["swaps"])
    return (config, unused) if return_unused else config


def _restore(base: Any, values: dict[str, Any]) -> Any:
    """A copy of a configuration, in a process that may not have created its class yet."""
    config: Any = object.__new__(_with_swaps(base))
    vars(config).update(values)
    return config

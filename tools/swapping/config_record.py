"""What ``save_pretrained`` writes of a swapped model: its swaps as data, in a configuration of a type of its own.

A reader that does not know of swaps then fails, rather than reading the model without them. In every other respect the
configuration is that of the model. transformers is not imported here.
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
    """Let the configuration of a transformers model hold ``plans``, the swaps in it now. Others are left alone."""
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
    """Let ``config`` be written with swaps: the records of those in a ``model_class``, or why there is no record."""
    if _SWAPS not in vars(config):
        kind: Any = type(config)
        config.__class__ = _with_swaps(kind)
    vars(config)[_SWAPS] = {"of": model_class, "swaps": list(records)}


def records_of(config: Any) -> list[dict[str, Any]]:
    """The records of the swaps that ``config`` holds."""
    return list(vars(config).get(_SWAPS, {}).get("swaps", ()))


def _own_config(model: Any) -> Any:
    """The configuration of ``model``, copied if other models may have the same one.

    That of a model without a head stays: it may be part of another model, which has to know when it is saved.
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
def _with_swaps(base: Any) -> type:
    """The class of configurations ``base`` with swaps."""

    class WithSwaps(base):
        def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
            """Raises ``SwapError`` for a swap without a record, and for one made in a part of the model alone."""
            data = json.loads(self.to_json_string(use_diff=use_diff))
            kept = vars(self)[_SWAPS]
            problem = next((record for record in kept["swaps"] if isinstance(record, str)), None)
            if problem is not None:
                raise SwapError(f"save_pretrained: {problem}")
            saved = data.get("architectures") or [kept["of"]]
            if kept["of"] not in saved:
                raise SwapError(
                    f"save_pretrained: the swap was made in the {kept['of']} that is part of this {saved[0]}: swap "
                    "into the whole model, by paths from its top"
                )
            whole = {
                "model_type": MODEL_TYPE,
                "architectures": saved,
                # no dtype, on purpose: a class that is named outright reads any file as its own, and fails here
                "dtype": "this model has swaps in it: read it with titans_build.huggingface",
                "titans_build": {"version": VERSION, "into": data.pop("model_type"), "swaps": kept["swaps"]},
                "config": data,
            }
            with atomic_write(Path(json_file_path)) as temporary:
                temporary.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        def to_dict(self) -> dict[str, Any]:
            data: dict[str, Any] = super().to_dict()
            data.pop(_SWAPS, None)
            return data

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """From a folder with swaps or without: PEFT reads a model's configuration again by its class."""
            swapped = config_dict.get("model_type") == MODEL_TYPE
            return_unused = kwargs.pop("return_unused_kwargs", False)
            data = dict(config_dict["config"] if swapped else config_dict)
            config, unused = base.from_dict(data, return_unused_kwargs=True, **kwargs)
            if swapped:
                attach_records(config, config_dict["architectures"][0], config_dict["titans_build"]["swaps"])
            return (config, unused) if return_unused else config

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _restore, (base, dict(vars(self)))

    WithSwaps.__name__ = WithSwaps.__qualname__ = f"Swapped{base.__name__}"
    return WithSwaps


def _restore(base: Any, values: dict[str, Any]) -> Any:
    """A copy of a configuration, whose class another process may not have made yet."""
    config: Any = object.__new__(_with_swaps(base))
    vars(config).update(values)
    return config

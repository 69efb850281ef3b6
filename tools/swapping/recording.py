"""What ``save_pretrained`` writes of a swapped model: its swaps as data, in a configuration of a kind of its own.

Whoever does not know of the swaps cannot read such a folder as if there were none. The configuration is still that of
the model in every other respect; only what is written of it differs. transformers is not imported here.
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

from ...recipes.replacing import replacing
from .error import SwapError
from .plan import Plan

MODEL_TYPE = "titans_build_swapped"
VERSION = 1
FIELDS = ("where", "block", "how", "gate", "train", "dim", "adapter")
"""Of the record of a swap."""
_HELD = "_titans_build_swaps"


def remember(model: nn.Module, plans: Sequence[Plan]) -> None:
    """``plans`` are the swaps of ``model`` now. Nothing for models that are none of transformers."""
    known: Any = sys.modules.get("transformers.modeling_utils")
    if known is None or not isinstance(model, known.PreTrainedModel):
        return
    config = model.config if not plans or _HELD in vars(model.config) else _own_config(model)
    if plans:
        hold(config, type(model).__name__, [_record(plan) for plan in plans])
    elif _HELD in vars(config):
        del vars(config)[_HELD]
        config.__class__ = type(config).__bases__[0]


def _own_config(model: Any) -> Any:
    """The configuration of ``model``, which is no other model's from now on: two may be made of one.

    That of a model without a head stays: it may be part of another, which has to know when it is saved.
    """
    given = model.config
    if model.base_model is model:
        return given
    own = copy.copy(given)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if value is given]:
            vars(module)[name] = own
    return own


def hold(config: Any, of: str, records: Sequence[dict[str, Any] | str]) -> None:
    """Let ``config`` be written with swaps: ``records`` of those in a model of class ``of``, or why there is none."""
    if _HELD not in vars(config):
        kind: Any = type(config)
        config.__class__ = _recording(kind)
    vars(config)[_HELD] = {"of": of, "swaps": list(records)}


def held(config: Any) -> list[dict[str, Any]]:
    """The records of the swaps that go with ``config``."""
    return list(vars(config).get(_HELD, {}).get("swaps", ()))


def _record(plan: Plan) -> dict[str, Any] | str:
    try:
        return plan.record
    except SwapError as error:
        return str(error)


@functools.cache
def _recording(base: Any) -> type:
    """The class of configurations ``base`` with swaps."""

    class Recording(base):
        def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
            """Raises ``SwapError`` where a swap cannot be written down, and of a model that is only part of another."""
            data = json.loads(self.to_json_string(use_diff=use_diff))
            kept = vars(self)[_HELD]
            unwritten = [record for record in kept["swaps"] if isinstance(record, str)]
            if unwritten:
                raise SwapError(f"save_pretrained: {unwritten[0]}")
            saved = data.get("architectures") or [kept["of"]]
            if kept["of"] not in saved:
                raise SwapError(
                    f"save_pretrained: the swap was made in the {kept['of']} that is part of this {saved[0]}: swap "
                    "into the whole model, by paths from its top"
                )
            whole = {
                "model_type": MODEL_TYPE,
                "architectures": saved,
                # no type of numbers, on purpose: a class that is named outright takes any file for its own, and stops
                "dtype": "this model has swaps in it: read it with titans_build.huggingface",
                "titans_build": {"version": VERSION, "into": data.pop("model_type"), "swaps": kept["swaps"]},
                "config": data,
            }
            with replacing(Path(json_file_path)) as temporary:
                temporary.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Of a folder with swaps or without: PEFT asks the class of a model's configuration to read it again."""
            swapped = config_dict.get("model_type") == MODEL_TYPE
            given = kwargs.pop("return_unused_kwargs", False)
            data = dict(config_dict["config"] if swapped else config_dict)
            config, unused = base.from_dict(data, return_unused_kwargs=True, **kwargs)
            if swapped:
                hold(config, config_dict["architectures"][0], config_dict["titans_build"]["swaps"])
            return (config, unused) if given else config

        def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
            super()._remove_keys_not_serialized(d)
            d.pop(_HELD, None)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _again, (base, dict(vars(self)))

    Recording.__name__ = Recording.__qualname__ = f"Swapped{base.__name__}"
    return Recording


def _again(base: Any, values: dict[str, Any]) -> Any:
    """A copy: the class is made anew where a process has not made it yet."""
    config: Any = object.__new__(_recording(base))
    vars(config).update(values)
    return config

"""Saves and loads swapped models of transformers by its registered quantizers, which may change a model before its
weights are loaded.

``save_pretrained`` writes the records of the swaps as the ``quantization_config`` of ``config.json``. Everything else
in the file is the configuration of the model without swaps. ``from_pretrained`` of any class repeats the swaps.
This file imports transformers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...recipes.saved_format import StorageError, list_differences
from ...registry import show
from .adapter import NO_CONTINUOUS_BATCHING, SwapError
from .install import frozen_names, swap
from .plan import FIELDS, Plan, Row, moved
from .site import Site, sites_in

METHOD = "titans_build.huggingface"
"""Name of the quantizer. A process in which it is not registered warns with this name: it is what to import."""
VERSION = 1


def plans_in(model: nn.Module) -> list[Plan]:
    """The swaps in ``model``, first to last, by their paths in it: made in it, in its parts or around it."""
    found: dict[int, tuple[Site, list[Row]]] = {}
    for path, site in sites_in(model):
        row = next(row for row in site.plan.rows if row.path == site.path)
        found.setdefault(id(site.plan), (site, []))[1].append(row._replace(path=path))
    in_order = sorted(found.values(), key=lambda one: one[0].order)
    return [dataclasses.replace(site.plan, rows=tuple(rows)) for site, rows in in_order]


def _save_pretrained(save: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    config = model.config
    if method_of(config) not in (None, METHOD):
        raise SwapError(
            "save_pretrained: a quantized model is not saved with its memories: tb.save_swaps saves these alone, and "
            "tb.load_swaps puts them into the quantized model again"
        )
    own = vars(config).get("quantization_config")
    try:
        config.quantization_config = SwapsConfig([plan.record for plan in plans_in(model)])
        return save(model, *args, **kwargs)
    except SwapError as error:
        raise SwapError(f"save_pretrained: {error}") from None
    finally:
        vars(config).pop("quantization_config", None)
        if own is not None:
            config.quantization_config = own


def _refuse_batching(batch: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    raise SwapError(NO_CONTINUOUS_BATCHING)


def _with_swaps(method: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """``method``; or ``instead(method, ...)`` in models with swaps in them."""

    @functools.wraps(method)
    def chosen(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, Site) for module in model.modules()):
            return instead(method, model, *args, **kwargs)
        return method(model, *args, **kwargs)

    return chosen


# A swap may be made in a part of a model, which knows nothing of the model around it: of any model that is saved, the
# modules themselves say which swaps are in it.
PreTrainedModel.save_pretrained = _with_swaps(PreTrainedModel.save_pretrained, _save_pretrained)
GenerationMixin.init_continuous_batching = _with_swaps(GenerationMixin.init_continuous_batching, _refuse_batching)


def method_of(config: Any) -> Any:
    """The method that a configuration says the model is quantized with."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)


@register_quantization_config(METHOD)
class SwapsConfig(QuantizationConfigMixin):
    """The records of swaps. Raises ``StorageError`` for ones of a later version or of something else."""

    def __init__(self, swaps: Any = None, version: Any = VERSION, **others: Any) -> None:
        self.quant_method = METHOD
        self.version, self.swaps = version, swaps
        if version != VERSION:
            raise StorageError(
                f"config.json: expected version {VERSION} of the record of swaps, got {show(version)}; "
                "a later one needs a later titans-build"
            )
        if not isinstance(swaps, list):
            raise StorageError(f"config.json: expected the swaps of a model, got {show(swaps)}")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "version": self.version, "swaps": copy.deepcopy(self.swaps)}


@register_quantizer(METHOD)
class SwapsQuantizer(HfQuantizer):
    """Repeats the swaps in a model that ``from_pretrained`` is about to load the weights of. Quantizes nothing."""

    def preprocess_model(self, model: Any, dtype: Any = None, checkpoint_files: Any = None, **kwargs: Any) -> None:
        """Raises ``SwapError`` for a swap that does not fit the model, ``StorageError`` for the weights of others."""
        for record in self.quantization_config.swaps:
            if not isinstance(record, dict) or set(record) != set(FIELDS):
                raise StorageError(
                    f"config.json: swaps: expected each with the keys {', '.join(FIELDS)}, got {show(record)}"
                )
            swap(model, **moved(record, model, _swapped_part(model)))
        if checkpoint_files:
            _expect_weights(model, checkpoint_files)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """The model is not quantized: its configuration is that of the model without swaps."""
        del model.hf_quantizer, model.config.quantization_config
        vars(model.config.get_text_config(decoder=True)).pop("quantization_config", None)
        for name in frozen_names(model):
            model.get_parameter(name).requires_grad_(False)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _swapped_part(model: Any) -> str:
    """Path of the part of ``model`` whose configuration, inside that of ``model``, has the swaps; else empty."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config or method_of(text) != METHOD:
        return ""
    return next((f"{path}." for path, part in model.named_modules() if getattr(part, "config", None) is text), "")


def _expect_weights(model: Any, files: Sequence[str]) -> None:
    """Raise ``StorageError`` unless files contain the weights of all blocks in ``model``, and of no others.

    transformers itself only warns, and draws what is missing. It may also rename the modules around a block, so names
    are compared from the block on.
    """
    expected: Counter[str] = Counter()
    for name, site in model.named_modules():
        if isinstance(site, Site):
            last = "" if site.how == "replace" else name.rpartition(".")[2] + "."
            others = tuple(f"{child}." for child, other in site.named_children() if isinstance(other, Site))
            expected.update(f".{last}{inside}" for inside in site.state_dict() if not inside.startswith(others))
    found: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                ends = [name for name in expected if key.endswith(name)]
                if ends or ".titans" in key:
                    found[max(ends, key=len, default=key)] += 1
    wrong = [
        f"{name[1:]} is missing in {n - found[name]} of {n} places" for name, n in expected.items() if found[name] < n
    ]
    wrong += [f"{name.lstrip('.')} is not part of the model" for name, n in found.items() if n > expected[name]]
    if wrong:
        if not found:
            wrong.insert(
                0,
                "there is no block at all: to read a plain model made with the configuration of a swapped one, "
                "take quantization_config out of config.json (before saving: del model.config.quantization_config)",
            )
        raise StorageError(f"{files[0]}: the weights do not fit the swaps of config.json: {list_differences(wrong)}")


class SwappedConfig(PreTrainedConfig):
    """The ``config.json`` of a swapped model that version 0.1 wrote. It is read as that of the model without swaps."""

    model_type = "titans_build_swapped"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        record = config_dict.get("titans_build")
        record, inner = record if isinstance(record, dict) else {}, config_dict.get("config")
        if record.get("into") not in CONFIG_MAPPING or not isinstance(inner, dict):
            raise StorageError(
                f"config.json: swaps into a model of type {show(record.get('into'))} (class "
                f"{show(config_dict.get('architectures'))}), which this transformers does not have"
            )
        swaps = SwapsConfig(record.get("swaps"), record.get("version"))
        return CONFIG_MAPPING[record["into"]].from_dict({**inner, "quantization_config": swaps.to_dict()}, **kwargs)


AutoConfig.register(SwappedConfig.model_type, SwappedConfig, exist_ok=True)

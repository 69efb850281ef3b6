"""Saves and loads swapped models of transformers by its registered quantizers, which may change a model before its
weights are loaded.

``save_pretrained`` writes the records of the swaps as the ``quantization_config`` of ``config.json``. Everything else
in the file is the configuration of the model without swaps. ``from_pretrained`` of any class repeats the swaps.
This file imports transformers.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...recipes.saved_format import StorageError, list_differences
from ...registry import show
from .adapter import NO_CONTINUOUS_BATCHING, SwapError
from .install import frozen_names, swap, swaps
from .plan import FIELDS, Plan, moved
from .site import Site

METHOD = "titans_build.huggingface"
"""Name of the quantizer. A process in which it is not registered warns with this name: it is what to import."""
VERSION = 1


def follow_swaps(model: Any, plans: Sequence[Plan]) -> None:
    """Make ``save_pretrained`` of ``model``, and of the models of transformers in it, save ``plans``, its swaps now."""
    for name, method in (("save_pretrained", _save_pretrained), ("init_continuous_batching", _refuse_batching)):
        vars(model).pop(name, None)
        if plans:
            vars(model)[name] = functools.partial(method, model)
    for path, part in model.named_modules():
        if part is not model and isinstance(part, PreTrainedModel) and not swaps(part):
            vars(part).pop("save_pretrained", None)
            if any(f"{row.path}.".startswith(f"{path}.") for plan in plans for row in plan.rows):
                vars(part)["save_pretrained"] = functools.partial(_save_part, model, path)
    if model.base_model is model and _quantization(model.config) in (None, METHOD):
        # it may be part of another model, which is saved with the same configuration
        vars(model.config).pop("quantization_config", None)
        if plans:
            model.config.quantization_config = SwapsConfig([_record_or_reason(plan) for plan in plans])
            model.config.quantization_config.alone = model.config.base_config_key not in ("", "text_config")


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    both = next((part for part in model.modules() if part is not model and swaps(part)), None)
    if both is not None:
        raise SwapError(
            f"save_pretrained: swaps were made in {type(model).__name__} and in its {type(both).__name__}, and only "
            "one of the two could be saved: unswap one, and make all swaps in the same model"
        )
    return _save(model, lambda: [plan.record for plan in swaps(model)], *args, **kwargs)


def _save_part(model: Any, path: str, *args: Any, **kwargs: Any) -> Any:
    """Save the part of ``model`` at ``path`` with the swaps in it."""

    def records() -> list[dict[str, Any]]:
        found = []
        for record in (plan.record for plan in swaps(model)):
            where = [name for name in record["where"] if name.startswith(f"{path}.")]
            if where:
                dim = {name.removeprefix(f"{path}."): record["dim"][name] for name in where}
                found.append({**record, "where": list(dim), "dim": dim})
        return found

    return _save(model.get_submodule(path), records, *args, **kwargs)


def _save(model: Any, records: Callable[[], list[dict[str, Any]]], *args: Any, **kwargs: Any) -> Any:
    config = model.config
    if _quantization(config) not in (None, METHOD):
        raise SwapError(
            "save_pretrained: a quantized model is not saved with its memories: tb.save_swaps saves these alone, and "
            "tb.load_swaps puts them into the quantized model again"
        )
    own = vars(config).get("quantization_config")
    try:
        config.quantization_config = SwapsConfig(records())
        return type(model).save_pretrained(model, *args, **kwargs)
    except SwapError as error:
        raise SwapError(f"save_pretrained: {error}") from None
    finally:
        vars(config).pop("quantization_config", None)
        if own is not None:
            config.quantization_config = own


def _refuse_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise SwapError(NO_CONTINUOUS_BATCHING)


def _record_or_reason(plan: Plan) -> Any:
    try:
        return plan.record
    except SwapError as error:
        return str(error)


def _quantization(config: Any) -> Any:
    """The method that a configuration says the model is quantized with."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)


@register_quantization_config(METHOD)
class SwapsConfig(QuantizationConfigMixin):
    """The records of swaps. Raises ``StorageError`` for ones of a later version or of something else."""

    alone = False
    """Whether it can be read from the configuration of the swapped model only, and not inside of another's."""
    in_part = False
    """Whether it is a copy for another configuration, or of the configuration without its model."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> SwapsConfig:
        copied = type(self)(copy.deepcopy(self.swaps, memo), self.version)
        copied.alone = self.alone
        copied.in_part = self.alone and not any(isinstance(item, PreTrainedModel) for item in memo.values())
        return copied

    def to_dict(self) -> dict[str, Any]:
        """Raises ``SwapError`` in a configuration around that of the swapped part, which is written with a copy."""
        if self.in_part:
            raise SwapError(
                "the swaps were made in a part of this model that has a configuration of its own, where they could not "
                "be read again: tb.unswap(part), and tb.swap(model, ...) with the whole model"
            )
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
        follow_swaps(model, swaps(model))
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
    if text is model.config or _quantization(text) != METHOD:
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
            expected.update(f".{last}{inside}" for inside in site.state_dict())
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

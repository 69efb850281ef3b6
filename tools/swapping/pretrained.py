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
import gc
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...recipes.saved_format import StorageError, list_differences
from ...registry import show
from .adapter import NO_CONTINUOUS_BATCHING, SwapError
from .install import frozen_names, has_swaps, swap, swaps
from .plan import FIELDS, Plan, moved
from .site import Site

METHOD = "titans_build.huggingface"
"""Name of the quantizer. A process in which it is not registered warns with this name: it is what to import."""
VERSION = 1


def follow_swaps(module: nn.Module) -> None:
    """Make ``save_pretrained`` save the swaps in ``module`` now: of ``module``, and of the models around and in it."""
    for whole in _models_around(module):
        made = [(holder, _plans(holder, path)) for path, holder in whole.named_modules() if swaps(holder)]
        for path, part in whole.named_modules():
            if isinstance(part, PreTrainedModel):
                inside = set(part.modules())
                found = ([_in_part(plan, path) for plan in plans] for holder, plans in made if holder not in inside)
                outer = [some for plans in found if (some := [plan for plan in plans if plan.rows])]
                _follow(part, outer, bool(outer) or has_swaps(part))


def _follow_child(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """A module is about to be put into another."""
    if child is not None and has_swaps(child):
        for whole in _models_around(parent):
            _follow(whole, [], True)


register_module_module_registration_hook(_follow_child)


def _models_around(module: nn.Module) -> list[Any]:
    """The models of transformers that ``module`` is or is a part of, the smallest first."""
    # modules know no parents; a dictionary of modules alone may be that of the children of one
    dictionaries = (one for one in gc.get_referrers(module) if isinstance(one, dict))
    if not any(all(value is None or isinstance(value, nn.Module) for value in one.values()) for one in dictionaries):
        return [module] if isinstance(module, PreTrainedModel) else []
    found = [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]
    around = [whole for whole in found if any(part is module for part in whole.modules())]
    return sorted(around, key=lambda whole: len(list(whole.modules())))


def _follow(model: Any, outer: list[list[Plan]], swapped: bool) -> None:
    """``outer``: the swaps that were made in models around ``model``, by their paths in it."""
    for name, method in (("save_pretrained", _save_pretrained), ("init_continuous_batching", _refuse_batching)):
        if swapped:
            vars(model)[name] = functools.partial(method, model, outer)
        elif getattr(vars(model).get(name), "func", None) is method:
            del vars(model)[name]


def _plans(holder: nn.Module, path: str) -> list[Plan]:
    """The swaps that were made in ``holder``, by their paths in the model in which it is at ``path``."""
    start = f"{path}." if path else ""
    return [
        dataclasses.replace(plan, rows=tuple(row._replace(path=start + row.path) for row in plan.rows))
        for plan in swaps(holder)
    ]


def _in_part(plan: Plan, path: str) -> Plan:
    """A plan of the whole model in the part at ``path``, without the modules elsewhere."""
    rows = [row._replace(path=row.path[len(path) + 1 :]) for row in plan.rows if row.path.startswith(f"{path}.")]
    return dataclasses.replace(plan, rows=tuple(rows))


def _save_pretrained(model: Any, outer: list[list[Plan]], *args: Any, **kwargs: Any) -> Any:
    made = [*outer, *(_plans(holder, path) for path, holder in model.named_modules() if swaps(holder))]
    for plans, others in itertools.combinations(made, 2):
        paths, other_paths = ([path for plan in some for path in plan.paths] for some in (plans, others))
        for path, other in itertools.product(paths, other_paths):
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                raise SwapError(
                    f"save_pretrained: swaps were made at {path} both in {type(model).__name__} and in a part of it, "
                    "and which is the first is unknown: unswap one, and make all swaps in the same model"
                )
    config = model.config
    if method_of(config) not in (None, METHOD):
        raise SwapError(
            "save_pretrained: a quantized model is not saved with its memories: tb.save_swaps saves these alone, and "
            "tb.load_swaps puts them into the quantized model again"
        )
    own = vars(config).get("quantization_config")
    try:
        config.quantization_config = SwapsConfig([plan.record for plans in made for plan in plans])
        return type(model).save_pretrained(model, *args, **kwargs)
    except SwapError as error:
        raise SwapError(f"save_pretrained: {error}") from None
    finally:
        vars(config).pop("quantization_config", None)
        if own is not None:
            config.quantization_config = own


def _refuse_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise SwapError(NO_CONTINUOUS_BATCHING)


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

"""Which parameters train, which of them decay, and the optimizer over them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...blocks.block import Block
from ...registry import Problem, RecipeError, list_blocks, lookup, nearest, show
from .settings import Settings


def matching(model: nn.Module, patterns: Sequence[str], path: str) -> set[str]:
    """Names of the model's parameters that the patterns choose.

    A pattern is that of a dotted name (``layers.0.*``, ``*.qkv.weight``), or ``@memory``: all that lies in a block of
    that registered type. ``!`` before it takes out what the earlier ones have chosen; where the first one takes out,
    everything is chosen to begin with.

    Raises ``RecipeError``, at ``path``, for a pattern that fits nothing.
    """
    chosen, idle = _choose(model, patterns)
    problems = [Problem(f"{path}.{index}", message) for index, message in idle.items()]
    if not problems and not chosen:
        problems.append(Problem(path, f"no parameter is left to train by {show(list(patterns))}"))
    if problems:
        raise RecipeError(problems, "settings")
    return chosen


def trained(model: nn.Module, settings: Settings) -> list[set[str]]:
    """Names of the parameters that train, for each stage. Raises ``RecipeError`` for patterns that fit nothing."""
    return [matching(model, stage.train, f"stages.{i}.train") for i, stage in enumerate(settings.parts)]


def idle_patterns(model: nn.Module, no_decay: Sequence[str]) -> list[str]:
    """What is to be said of the patterns of ``no_decay`` that fit nothing, but for the defaults, which fit many models.

    It may be right of one model that others are compared with, and is therefore no error.
    """
    usual = Settings.model_fields["no_decay"].default
    idle = _choose(model, no_decay)[1]
    return [f"no_decay.{index}: {message}" for index, message in idle.items() if no_decay[index] not in usual]


def _choose(model: nn.Module, patterns: Sequence[str]) -> tuple[set[str], dict[int, str]]:
    """What the patterns choose, and what is wrong with those, by their index, that fit nothing."""
    names = [name for name, _ in model.named_parameters()]
    chosen = set(names) if patterns and patterns[0].startswith("!") else set()
    idle = {}
    for index, pattern in enumerate(patterns):
        bare = pattern.removeprefix("!")
        found = _of_type(model, bare[1:]) if bare.startswith("@") else set(fnmatch.filter(names, bare))
        if not found:
            near = nearest(bare[1:], list_blocks()) if bare.startswith("@") else nearest(bare, names)
            what = "no block of this type has a parameter" if bare.startswith("@") else "no parameter has such a name"
            idle[index] = f"{what}: {show(bare)}{near}"
        chosen = chosen - found if pattern.startswith("!") else chosen | found
    return chosen, idle


def _of_type(model: nn.Module, kind: str) -> set[str]:
    if kind not in list_blocks():
        return set()
    cls = lookup(kind).cls
    inside = [name for name, module in model.named_modules() if isinstance(module, Block) and isinstance(module, cls)]
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{place}.") for place in inside)}


def groups(model: nn.Module, no_decay: Sequence[str], decay: float) -> list[dict[str, object]]:
    """AdamW's parameter groups, ``decay`` and ``no_decay``, with the names in each.

    Vectors and scalars never decay; of the rest, what a pattern of ``no_decay`` fits does not (``matching``): gains
    that are kept per head, the memories' initial weights, learned tokens. Each parameter is in one group.
    """
    kept, _ = _choose(model, no_decay)
    names: dict[str, list[str]] = {"decay": [], "no_decay": []}
    parameters: dict[str, list[Tensor]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        group = "no_decay" if parameter.dim() < 2 or name in kept else "decay"
        names[group].append(name)
        parameters[group].append(parameter)
    return [
        {"name": group, "params": parameters[group], "names": names[group], "weight_decay": weight}
        for group, weight in (("decay", decay), ("no_decay", 0.0))
    ]


def make_optimizer(model: nn.Module, settings: Settings, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over all parameters; those that do not train at a time have no gradient, and stay as they are."""
    made = groups(model, settings.no_decay, settings.weight_decay)
    kept = [{key: value for key, value in group.items() if key != "names"} for group in made if group["params"]]
    return torch.optim.AdamW(kept, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused or None)


class Average:
    """Weights averaged over the steps. What each update does is torch's own (``torch.optim.swa_utils``)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._update: Callable[..., None] = get_ema_multi_avg_fn(decay)
        self._parameters = dict(model.named_parameters())

    def update(self) -> None:
        """Take in the parameters as they are after a step."""
        with torch.no_grad():
            self._update(list(self.tensors.values()), [p.detach() for p in self._parameters.values()], None)

    def __enter__(self) -> None:
        """The model has the averaged weights for the length of a ``with`` block."""
        self.swap()

    def __exit__(self, *exception: object) -> None:
        self.swap()

    def swap(self) -> None:
        """Exchange the model's weights and the averaged ones."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                mine = parameter.detach().clone()
                parameter.copy_(self.tensors[name])
                self.tensors[name].copy_(mine)

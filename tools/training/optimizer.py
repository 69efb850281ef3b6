"""The optimizer: which parameters train and which decay, the learning-rate schedule, and averaged weights."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...blocks.block import Block
from ...registry import Problem, RecipeError, list_blocks, lookup, nearest, show
from .settings import Settings, Stage


class StagePosition(NamedTuple):
    """A step: the number of its stage, the stage, and the step within it; counted from 0."""

    number: int
    stage: Stage
    step: int


def stage_at(step: int, settings: Settings) -> StagePosition:
    """The stage of ``step``; past the end of the run, the last step of the last stage."""
    for index, stage in enumerate(settings.all_stages):
        if step < stage.steps:
            return StagePosition(index, stage, step)
        step -= stage.steps
    return StagePosition(index, stage, stage.steps - 1)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then cosine decay, within each stage. ``step`` counts from 0; the rate is never 0."""
    _, stage, at = stage_at(step, settings)
    peak = settings.lr if stage.lr is None else stage.lr
    warmup = math.ceil(settings.warmup * stage.steps)
    if at < warmup:
        return peak * (at + 1) / (warmup + 1)
    progress = (at - warmup) / max(stage.steps - warmup, 1)
    low = settings.final_lr
    return peak * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)


def match_parameters(model: nn.Module, patterns: Sequence[str], path: str) -> set[str]:
    """Names of the model's parameters that ``patterns`` select.

    A pattern is a wildcard over dotted names (``layers.0.*``, ``*.qkv.weight``) or ``@memory``: everything in blocks
    of that registered type. A leading ``!`` removes matches from what the earlier patterns selected; if the first
    pattern has one, the selection starts with every parameter.

    Raises ``RecipeError``, at ``path``, for a pattern that matches nothing.
    """
    selected, unmatched = _select(model, patterns)
    problems = [Problem(f"{path}.{index}", message) for index, message in unmatched.items()]
    if not problems and not selected:
        problems.append(Problem(path, f"{show(list(patterns))} selects no parameter to train"))
    if problems:
        raise RecipeError(problems, "settings")
    return selected


def trainable_parameters(model: nn.Module, settings: Settings) -> list[set[str]]:
    """Names of the parameters that train, for each stage. Raises ``RecipeError`` for patterns that match nothing."""
    stages = enumerate(settings.all_stages)
    return [match_parameters(model, stage.train, f"stages.{index}.train") for index, stage in stages]


def unmatched_patterns(model: nn.Module, no_decay: Sequence[str]) -> list[str]:
    """A warning for each pattern of ``no_decay`` that matches nothing, except the defaults.

    This is no error: several models may share the settings, and a pattern may apply to only some of them.
    """
    defaults = Settings.model_fields["no_decay"].default
    unmatched = _select(model, no_decay)[1]
    return [f"no_decay.{index}: {message}" for index, message in unmatched.items() if no_decay[index] not in defaults]


def _select(model: nn.Module, patterns: Sequence[str]) -> tuple[set[str], dict[int, str]]:
    """The selected names, and a message for each pattern that matches nothing, by its index."""
    names = [name for name, _ in model.named_parameters()]
    selected = set(names) if patterns and patterns[0].startswith("!") else set()
    unmatched = {}
    for index, pattern in enumerate(patterns):
        bare = pattern.removeprefix("!")
        if bare.startswith("@"):
            found, near = _in_blocks(model, bare[1:]), nearest(bare[1:], list_blocks())
            what = "no block of this type has a parameter"
        else:
            found, near = set(fnmatch.filter(names, bare)), nearest(bare, names)
            what = "no parameter has such a name"
        if not found:
            unmatched[index] = f"{what}: {show(bare)}{near}"
        selected = selected - found if pattern.startswith("!") else selected | found
    return selected, unmatched


def _in_blocks(model: nn.Module, kind: str) -> set[str]:
    if kind not in list_blocks():
        return set()
    cls = lookup(kind).cls
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block) and isinstance(module, cls)]
    return {name for name, _ in model.named_parameters() if any(name.startswith(f"{block}.") for block in blocks)}


def parameter_groups(
    model: nn.Module, weight_decay: float, no_decay: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The parameters of ``model`` for an optimizer of torch, in the groups ``decay`` and ``no_decay``.

    Vectors and scalars never decay. Of the rest, those that ``no_decay`` selects do not (``match_parameters``), by
    default gains per head, the memories' initial weights, and learned tokens. ``model`` may be any: a recipe model, one
    with swaps, or one with adapters of PEFT.
    """
    selected, _ = _select(model, Settings.model_fields["no_decay"].default if no_decay is None else no_decay)
    groups: dict[str, list[tuple[str, Tensor]]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        groups["no_decay" if parameter.dim() < 2 or name in selected else "decay"].append((name, parameter))
    weights = {"decay": weight_decay, "no_decay": 0.0}
    return [{"name": name, "params": group, "weight_decay": weights[name]} for name, group in groups.items() if group]


def make_optimizer(model: nn.Module, settings: Settings, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over all parameters: those that a stage does not train have no gradient and do not change."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay, settings.no_decay),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=fused or None,
    )


class WeightAverage:
    """An exponential moving average of the weights, updated as ``torch.optim.swa_utils`` does.

    As a context manager it exchanges the model's weights and the averaged ones for the duration of the block.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._update: Callable[..., None] = get_ema_multi_avg_fn(decay)
        self._parameters = dict(model.named_parameters())

    def update(self) -> None:
        """Average in the current parameters."""
        with torch.no_grad():
            self._update(list(self.tensors.values()), [p.detach() for p in self._parameters.values()], None)

    def __enter__(self) -> None:
        self.swap()

    def __exit__(self, *exception: object) -> None:
        self.swap()

    def swap(self) -> None:
        """Exchange the model's weights and the averaged ones."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                current = parameter.detach().clone()
                parameter.copy_(self.tensors[name])
                self.tensors[name].copy_(current)

"""The modules that a pattern matches, and the plan of a swap, which can be printed, saved and repeated."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...registry import nearest, show
from .adapter import Adapter, SwapError
from .site import Gated, Site

HOWS = ("replace", "beside", "before", "after")
FIELDS = ("where", "block", "how", "gate", "train", "dim", "adapter")
"""Of ``Plan.record``."""


class Row(NamedTuple):
    """One module of a plan."""

    path: str
    kind: str
    """Class of the module at ``path``."""
    dim: int
    parameters: int
    """Number of new parameters."""
    device: torch.device
    dtype: torch.dtype
    adapter: Adapter


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`swap` did, or, after a dry run, would do. ``print`` shows it as a table."""

    model: str
    """Class of the model."""
    how: str
    block: Any
    """The block's description with every field given; ``None`` for a block that was given as a module."""
    label: str
    """The block's name in the table."""
    rows: tuple[Row, ...]
    train: str
    gate: float
    frozen: int
    """Number of parameters (elements, not tensors) that the swap freezes."""

    @property
    def paths(self) -> list[str]:
        """Of the modules, in the model's order."""
        return [row.path for row in self.rows]

    @property
    def parameters(self) -> int:
        """Number of new parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def record(self) -> dict[str, Any]:
        """The swap as plain data, fit for JSON: ``tb.swap(model, **record)`` repeats it in a model of the same kind.

        Raises ``SwapError`` for a block that was given as a module.
        """
        if self.block is None:
            raise SwapError(
                f"the block ({self.label}) was given as a module, and has no record: "
                "register it (@tb.register) and describe it, block={'type': ...}"
            )
        first, *others = (dataclasses.asdict(row.adapter) for row in self.rows)
        return {
            "where": self.paths,
            "block": self.block,
            "how": self.how,
            "gate": self.gate,
            "train": self.train,
            "dim": {row.path: row.dim for row in self.rows},
            "adapter": first if all(adapter == first for adapter in others) else None,
        }

    def __str__(self) -> str:
        where = "in the place of" if self.how == "replace" else self.how
        head = f"{self.model}: {self.label} {where} {len(self.rows)} module{'' if len(self.rows) == 1 else 's'}"
        table = [("module", "class", "dim", "parameters", "on")]
        table += [
            (row.path, row.kind, str(row.dim), f"{row.parameters:,}", f"{row.device} {str(row.dtype)[6:]}")
            for row in self.rows
        ]
        path, kind, dim, count, _ = (max(map(len, column)) for column in zip(*table))
        lines = [f"  {p:{path}}  {k:{kind}}  {d:>{dim}}  {n:>{count}}  {place}" for p, k, d, n, place in table]
        gate = "" if self.how == "replace" else f"; gates start at {self.gate:g}"
        frozen = f"; {self.frozen:,} others do not train" if self.train == "memory" else ""
        return "\n".join([head, *lines, f"{self.parameters:,} new parameters{gate}{frozen}"])


def match(model: nn.Module, where: str | Sequence[str], every: int = 1, start: int = 0) -> dict[str, nn.Module]:
    """Modules by path that the patterns ``where`` match, in the model's order: each ``every``-th from ``start``.

    A pattern is compared name by name: ``*`` stands for one name or a part of it, ``**`` for any number of names.
    Blocks that swaps have installed are not matched.

    Raises ``SwapError`` for a pattern that matches nothing, modules matched twice, and ones that contain each other.
    """
    patterns = [where] if isinstance(where, str) else list(where) if isinstance(where, list | tuple) else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise SwapError(f"where: expected a pattern such as 'layers.*.self_attn', or a list of them, got {show(where)}")
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Site))
    modules = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if path and not isinstance(module, Gated) and not path.startswith(inside)
    }
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = [path for path in modules if _matches(pattern.split("."), path.split("."))]
        if not paths:
            raise SwapError(
                f"where: {show(pattern)} matches no module of {type(model).__name__}{_hint(pattern, list(modules))}"
            )
        for path in paths:
            if path in found:
                raise SwapError(f"where: {path} is matched twice: by {show(found[path])} and by {show(pattern)}")
            found[path] = pattern
    chosen = dict([(path, module) for path, module in modules.items() if path in found][start::every])
    if not chosen:
        raise SwapError(f"where: {len(found)} modules match, and start={start} is past the last of them")
    names: dict[nn.Module, str] = {}
    for path, module in chosen.items():
        if names.setdefault(module, path) != path:
            raise SwapError(f"where: {names[module]} and {path} are one and the same module: name one of them")
        outer = next((other for other in chosen if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise SwapError(f"where: {path} is inside {outer}, which is matched, too: swap one of them")
    return chosen


def moved(record: dict[str, Any], model: nn.Module, part: str = "") -> dict[str, Any]:
    """``Plan.record`` with the paths that its modules have in ``model``, which may be the model that was swapped with
    another head, or inside another model: at ``part``, if that is known."""
    paths, names = record["where"], {name for name, _ in model.named_modules(remove_duplicate=False)}
    if not isinstance(paths, list) or all(path in names for path in paths):
        return record
    shorter = f"{getattr(model, 'base_model_prefix', '')}."
    prefixes = {name.removesuffix(paths[0]) for name in names if name.endswith(f".{paths[0]}")}
    prefixes = {part} & prefixes or prefixes
    choices = [{path: path.removeprefix(shorter) for path in paths}, *({p: q + p for p in paths} for q in prefixes)]
    fit = [choice for choice in choices if all(path in names for path in choice.values())]
    if len(fit) != 1:
        return record  # the swap names the paths that the model does not have
    dim = record["dim"]
    dim = {fit[0].get(path, path): width for path, width in dim.items()} if isinstance(dim, dict) else dim
    return {**record, "where": list(fit[0].values()), "dim": dim}


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], path) or _matches(pattern, path[1:])
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])


def _hint(pattern: str, paths: list[str]) -> str:
    """The names that the model has where the pattern stops matching."""
    parts = pattern.split(".")
    if "**" in parts:
        return ""
    split = [[], *(path.split(".") for path in paths)]
    depth = max(d for d in range(len(parts)) if any(_matches(parts[:d], path) for path in split))
    names = sorted({path[depth] for path in split if len(path) > depth and _matches(parts[:depth], path[:depth])})
    at = ".".join(parts[:depth]) or "the top"
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{nearest(parts[depth], names)} (at {at} there are: {listed or 'none'})"

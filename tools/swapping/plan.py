"""A plan: what a swap puts where, to look at beforehand, to keep, and to carry out again."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ...registry import show
from .adapter import Adapter
from .error import SwapError

HOWS = ("replace", "beside", "before", "after")
TRAINS = ("all", "memory")


class Row(NamedTuple):
    """One module of a plan."""

    path: str
    kind: str
    """Class of the module that is there."""
    dim: int
    parameters: int
    """Of what is put in."""
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
    """The description of the block with every field given; ``None`` for a module that was handed over built."""
    label: str
    """What the block is called in the table."""
    rows: tuple[Row, ...]
    train: str
    gate: float
    frozen: int
    """Parameters (numbers, not tensors) that do not train any more."""

    @property
    def paths(self) -> list[str]:
        """Of the modules, in the model's order."""
        return [row.path for row in self.rows]

    @property
    def parameters(self) -> int:
        """Of everything that is put in."""
        return sum(row.parameters for row in self.rows)

    @property
    def record(self) -> dict[str, Any]:
        """The swap as plain data, fit for JSON: ``tb.swap(model, **record)`` does it again in a model of the same kind.

        Raises ``SwapError`` for a block that was handed over built, which no data describes.
        """
        if self.block is None:
            raise SwapError(
                f"the block ({self.label}) was given as a module, which cannot be written down: "
                "register it (@tb.register) and describe it, block={'type': ...}"
            )
        adapters = {row.path: dataclasses.asdict(row.adapter) for row in self.rows}
        alike = next(iter(adapters.values()))
        return {
            "where": self.paths,
            "block": self.block,
            "how": self.how,
            "gate": self.gate,
            "train": self.train,
            "dim": {row.path: row.dim for row in self.rows},
            "adapter": alike if all(adapter == alike for adapter in adapters.values()) else None,
        }

    def __str__(self) -> str:
        where = {"replace": "in the place of", "beside": "beside", "before": "before", "after": "after"}[self.how]
        head = f"{self.model}: {self.label} {where} {len(self.rows)} module{'' if len(self.rows) == 1 else 's'}"
        table = [("module", "class", "dim", "parameters", "on")]
        table += [
            (row.path, row.kind, str(row.dim), f"{row.parameters:,}", f"{row.device} {str(row.dtype)[6:]}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table)]
        right = {2, 3}
        lines = [
            "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
            for line in table
        ]
        gate = "" if self.how == "replace" else f"; gates start at {self.gate:g}"
        tail = f"{self.parameters:,} new parameters{gate}"
        if self.train == "memory":
            tail += f"; {self.frozen:,} others do not train"
        return "\n".join([head, *(f"  {line}" for line in lines), tail])


def label_of(block: Any) -> str:
    """A block's description in few words."""
    if isinstance(block, dict):
        return str(block.get("type", "block"))
    if isinstance(block, torch.nn.Module):
        return type(block).__name__
    return show(block, 40).strip("'")

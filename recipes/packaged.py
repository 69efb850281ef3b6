"""The recipes that come with the package: one file each, and the sizes of the published models as changes to them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .overrides import override
from .parse import read_file

_FOLDER = Path(__file__).parent
_SIZES = "sizes"


def packaged_names() -> list[str]:
    """Every packaged recipe: ``mac``, ..., and every size of one: ``mac-170m``, ..."""
    return [*base_names(), *(f"{base}-{size}" for size, bases in _sizes().items() for base in bases)]


def read_packaged(name: str) -> dict[str, Any]:
    """Plain data of a packaged recipe. ``name`` is one of ``packaged_names()``."""
    if name in base_names():
        data: dict[str, Any] = read_file(_FOLDER / f"{name}.yaml")
        data["name"] = name
        return data
    base, _, size = name.rpartition("-")
    data = read_packaged(base)
    changes = _sizes()[size][base]
    problems = override(data, changes)
    if problems:
        raise ValueError(f"{_SIZES}.yaml, {name}: {'; '.join(map(str, problems))}")
    data["name"] = name
    return data


def base_names() -> list[str]:
    """Packaged recipes that are no size of another: those with a file of their own."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != _SIZES)


@cache
def _sizes() -> dict[str, dict[str, dict[str, Any]]]:
    """Size -> base recipe -> changes by path, in the order of ``sizes.yaml``, which explains itself."""
    data = read_file(_FOLDER / f"{_SIZES}.yaml")
    return {
        size: {
            base: {
                "dim": shape["dim"],
                "vocab": data["vocab"],
                "tie": data["tie"],
                **dict.fromkeys(places["depth"], shape["depth"]),
                **dict.fromkeys(places["heads"], shape["heads"]),
                **dict.fromkeys(places["hidden"], shape["hidden"][base]),
                **data["settings"][base],
            }
            for base, places in data["places"].items()
        }
        for size, shape in data["sizes"].items()
    }

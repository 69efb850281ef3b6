"""What a search may choose from: values of a recipe and of settings, one by one or from a range."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...recipes.reading import plain, read_file
from ...registry import Problem, RecipeError, nearest, show

PARTS = ("recipe", "train")
RANGE = ("low", "high", "log", "step")
Choice = dict[str, Any]
"""Values by name: ``train.lr``, ``recipe.layers.lmm.0.max_step``."""


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    """Evenly in their logarithms."""
    step: float | None = None
    """Only ``low + n * step``."""

    @property
    def whole(self) -> bool:
        """Whether they are integers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def at(self, share: float) -> float:
        """The number at a share from 0 to under 1 of the range."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.whole and not self.log and self.step is None:
            return int(self.low + math.floor(share * (self.high - self.low + 1)))
        if self.step is not None:
            count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
            return self.low + math.floor(share * count) * self.step
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return round(value) if self.whole else float(f"{value:.4g}")


class Space(NamedTuple):
    """A list of values or a range for each name."""

    of: dict[str, list[Any] | Range]

    def grid(self) -> Iterator[Choice]:
        """All combinations; the last name changes fastest. Raises ``RecipeError`` where there is a range."""
        values = []
        for name, of in self.of.items():
            if isinstance(of, Range):
                message = "a grid needs a list of values, or a step: a range is for --sampler random or optuna"
                if of.step is None:
                    raise RecipeError([Problem(name, message)], "space")
                count = math.floor((of.high - of.low) / of.step + 1e-9) + 1
                of = [of.low + number * of.step for number in range(count)]
            values.append(of)
        return (dict(zip(self.of, chosen)) for chosen in itertools.product(*values))

    def draw(self, seed: int, number: int) -> Choice:
        """Choice ``number`` of a random search: the same each time it is asked for."""
        chance = random.Random(f"{seed} {number}")
        return {
            name: of.at(chance.random()) if isinstance(of, Range) else chance.choice(of) for name, of in self.of.items()
        }


def as_space(given: Mapping[str, Any] | str | os.PathLike[str]) -> Space:
    """A space from a mapping or a YAML file::

        recipe:
          layers.lmm.0.max_step: {low: 0.1, high: 10.0, log: true}
          layers.lmm.0.chunk: [16, 32, 64]
        train:
          lr: [1e-3, 3e-3]

    Raises ``RecipeError`` with everything that is wrong.
    """
    source = "space"
    if isinstance(given, (str, os.PathLike)):
        source, given = str(given), read_file(given)
    data = plain(given, source)
    if not isinstance(data, dict):
        raise RecipeError([Problem("", f"expected a mapping with recipe or train, got {show(data)}")], source)
    problems = [
        Problem(str(key), f"unknown; expected recipe or train{nearest(key, PARTS)}") for key in data if key not in PARTS
    ]
    found: dict[str, list[Any] | Range] = {}
    for part in PARTS:
        values = data.get(part) or {}
        if not isinstance(values, dict):
            problems.append(Problem(part, f"expected what to choose from by name, got {show(values)}"))
            continue
        for name, of in values.items():
            path = f"{part}.{name}"
            if isinstance(of, list) and of:
                found[path] = of
            elif isinstance(of, dict):
                wrong = _wrong(of)
                problems += [Problem(path, message) for message in wrong]
                if not wrong:
                    found[path] = Range(**of)
            else:
                problems.append(Problem(path, f"expected a list of values, or low and high, got {show(of)}"))
    if not found and not problems:
        problems.append(Problem("", "there is nothing to choose from"))
    if problems:
        raise RecipeError(problems, source)
    return Space(found)


def _wrong(of: dict[str, Any]) -> list[str]:
    unknown = [
        f"unknown {show(key)}; expected {', '.join(RANGE)}{nearest(key, RANGE)}" for key in of if key not in RANGE
    ]
    if unknown:
        return unknown
    numbers = {key: of.get(key) for key in ("low", "high")}
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers.values()):
        return [f"expected numbers low and high, got {show(of)}"]
    low, high, step, log = of["low"], of["high"], of.get("step"), of.get("log", False)
    if not isinstance(log, bool):
        return [f"log: expected true or false, got {show(log)}"]
    if low >= high:
        return [f"expected low under high, got {show(low)} and {show(high)}"]
    if log and (low <= 0 or step is not None):
        return ["log: expected low > 0, and no step"]
    if step is not None and (isinstance(step, bool) or not isinstance(step, (int, float)) or step <= 0):
        return [f"step: expected a number > 0, got {show(step)}"]
    return []

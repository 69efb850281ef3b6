"""Models of the same size: one dial of a recipe is turned until it has as many parameters as another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...recipes import Recipe, build, load_recipe
from ...registry import Problem, RecipeError, lookup, nearest, show

DIAL = "ffn.hidden"
TOLERANCE = 0.01
"""Share of the target by which a fitted model may be larger or smaller."""
LARGEST = 2**20


class Fitted(NamedTuple):
    """A recipe of about the size that was asked for."""

    recipe: Recipe
    parameters: int
    changes: dict[str, int]
    """What was changed, by path; empty where nothing had to be."""


def parameters_of(recipe: Recipe) -> int:
    """How many numbers the model of a recipe learns. Nothing of its size is allocated."""
    return sum(parameter.numel() for parameter in build(recipe, device="meta").parameters())


def fit(recipe: Recipe, target: int, dial: str = DIAL, name: str = "recipe") -> Fitted:
    """``recipe`` with about ``target`` parameters: ``dial``, a block's field, is set alike wherever the block stands.

    A recipe that is within ``TOLERANCE`` stays as it is. ``name``: what errors call it. Raises ``RecipeError`` where
    the recipe has no such block, or no value of the field gives that size.
    """
    kind, _, field = dial.partition(".")
    _check_dial(kind, field, dial)
    as_it_is = parameters_of(recipe)
    if _near(as_it_is, target):
        return Fitted(recipe, as_it_is, {})
    paths = [f"layers.{path}.{field}" for path in _blocks(recipe.layers, kind)]
    if not paths:
        message = (
            f"has {as_it_is:,} parameters, not {target:,}, and no {kind} to fit: another --fit, or --parameters none"
        )
        raise RecipeError([Problem("", message)], name)

    def turned(value: int) -> Recipe:
        return load_recipe(recipe, dict.fromkeys(paths, value), allow_imports=True)

    # parameters grow with the dial: the last value that does not exceed the target, or the one above it
    low, high = 1, 2
    least = parameters_of(turned(low))
    while high < LARGEST and parameters_of(turned(high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters_of(turned(middle)) <= target else (low, middle)
    sizes = {value: parameters_of(turned(value)) for value in (low, high)}
    best = min(sizes, key=lambda value: abs(sizes[value] - target))
    if not _near(sizes[best], target):
        reach = f"at least {least:,}" if least > target else f"{sizes[best]:,} at {dial} = {best}"
        message = f"cannot be fitted to {target:,} parameters with {dial}: it has {reach}; give other --parameters"
        raise RecipeError([Problem("", message)], name)
    return Fitted(turned(best), sizes[best], dict.fromkeys(paths, best))


def _near(parameters: int, target: int) -> bool:
    return abs(parameters - target) <= TOLERANCE * target


def _check_dial(kind: str, field: str, dial: str) -> None:
    try:
        spec = lookup(kind)
    except RecipeError as error:
        raise RecipeError(error.problems, "--fit") from None
    if field not in spec.fields:
        message = f"expected BLOCK.FIELD with a field of {kind}, got {show(dial)}{nearest(field, list(spec.fields))}"
        raise RecipeError([Problem("", message)], "--fit")


def _blocks(given: Any, kind: str) -> Iterator[str]:
    """The paths of all blocks of a kind, wherever they are nested."""
    if isinstance(given, dict) and given.get("type") == kind:
        yield ""
    inside = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
    for key, value in inside:
        for path in _blocks(value, kind):
            yield f"{key}.{path}" if path else str(key)

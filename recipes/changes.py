"""Changes of a recipe that keep the weights of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..registry import Problem, RecipeError, join, lookup, show
from .build import assemble
from .loading import load_recipe
from .recipe import Recipe
from .saved_format import list_differences

Shapes = dict[str, tuple[int, ...]]


def change(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """``recipe`` with ``overrides`` by path, of which a model can have the weights of a model of ``recipe``.

    A field may change if its block marks it ``SameWeights``, and if the parameters have the same shapes. Raises
    ``RecipeError`` with every change that is invalid or not allowed.
    """
    if not overrides:
        return recipe
    # the modules of a recipe that is loaded were allowed
    changed = load_recipe(recipe, overrides, allow_imports="imports" not in overrides)
    problems = list(_problems(recipe, changed))
    if not problems:
        found = differences(*(shapes_of(tensors_of(assemble(each))) for each in (recipe, changed)))
        if found:
            paths = ", ".join(map(str, overrides))
            problems.append(Problem(paths, f"the weights do not fit this change: {list_differences(found)}"))
    if problems:
        raise RecipeError(problems, f"overrides of {recipe.name or 'recipe'}")
    return changed


def _problems(before: Recipe, after: Recipe) -> Iterator[Problem]:
    for key in ("dim", "vocab", "tie", "stack"):
        old, new = getattr(before, key), getattr(after, key)
        if old != new:
            yield _refused(key, old, new, "only fields of blocks may change")
    if before.layers.keys() == after.layers.keys():
        for name, blocks in before.layers.items():
            yield from _block_problems(blocks, after.layers[name], join("layers", name))
    else:
        yield _refused("layers", list(before.layers), list(after.layers), "no layer may be added or removed")


def _block_problems(before: Any, after: Any, path: str) -> Iterator[Problem]:
    """Problems of a block in full form, or of the blocks in a field's value."""
    if before == after:
        return
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after)):
            yield from _block_problems(old, new, join(path, index))
        return
    if not (isinstance(before, dict) and isinstance(after, dict) and before.get("type") == after.get("type")):
        yield _refused(path, before, after, "no block may be exchanged")
        return
    fields = lookup(before["type"]).fields
    for name, field in fields.items():
        if field.holds_blocks:
            yield from _block_problems(before[name], after[name], join(path, name))
        elif before[name] != after[name] and not field.keeps_weights:
            free = [other for other, each in fields.items() if each.keeps_weights]
            allowed = f"of {before['type']}, {', '.join(free)} may change" if free else "no field of it may change"
            yield _refused(join(path, name), before[name], after[name], allowed)


def _refused(path: str, old: Any, new: Any, allowed: str) -> Problem:
    return Problem(path, f"the weights do not fit this change: they are those of {show(old)}, not of {show(new)} "
                         f"({allowed})")  # fmt: skip


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers. A shared tensor occurs once."""
    saved = set(model.state_dict(keep_vars=True))
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in saved}}


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def differences(found: Shapes, expected: Shapes) -> list[str]:
    """What is missing, superfluous or of another shape."""
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not part of the model" for name in found if name not in expected),
        *(
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]

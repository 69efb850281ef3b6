"""``tb.swap`` and ``tb.unswap``: blocks into any model, and out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...registry import RecipeError
from .adapter import Adapter, as_adapter
from .building import Given, Place, description, make, reason
from .error import SwapError, refuse
from .matching import Where, match
from .plan import Plan, label_of
from .planning import expect_paths, expect_settings, row_of, to_freeze
from .putting_in import DONE, carry_out, expect_apart, expect_in_place, undo


def swap(
    model: nn.Module,
    where: Where,
    block: Given,
    how: str = "replace",
    *,
    every: int = 1,
    start: int = 0,
    train: str = "all",
    dry_run: bool = False,
    adapter: str | Adapter | Mapping[str, Any] | None = None,
    dim: int | Mapping[str, int] | None = None,
    gate: float = 0.0,
    seed: int | None = 0,
) -> Plan:
    """Put a block into modules of any model, in place, and return the plan, which ``print`` shows::

        tb.swap(model, "model.layers.*.self_attn", {"type": "memory", "chunk": 64}, "beside", every=4)

    ``where``: patterns of module paths, ``*`` for a name or part of one, ``**`` for any number of names. ``every``,
    ``start``: of those that match, in the model's order, each so-manieth from which on.

    ``block``: as in a recipe; or a built module, copied for each place; or a function from the width to one. It gets
    the device and dtype of the module it stands at; ``seed`` and the place draw its parameters.

    ``how``: ``replace`` the module; or add to it, through a learned gate per feature that starts at ``gate``:
    ``beside``, ``f(x) + gate * block(norm(x))``; ``before``, to ``x``; ``after``, to ``f(x)``. At zero the model
    computes what it did before. A block in the place of a whole layer is pre-normed and residual, as in a recipe.

    ``train``: ``memory`` freezes all parameters but those of swaps. ``dry_run``: make the plan, change nothing.
    ``adapter``: how the modules are called, where that cannot be told: a name or an ``Adapter``. ``dim``: their width,
    likewise.

    Raises ``SwapError`` naming the modules, and leaves the model as it was.
    """
    expect_settings(model, how, every, start, train, gate, seed)
    chosen = match(model, where, every, start)
    fixed = as_adapter(adapter)
    expect_paths(dim, [path for path, _ in chosen])
    rows, blocks, problems = [], [], []
    for index, (path, module) in enumerate(chosen):
        try:
            row = row_of(model, path, module, how, fixed, dim)
            spot = Place(row.dim, row.device, row.dtype, row.adapter.layer and how == "replace")
            described = description(block, row.dim)
            # the dry run makes no parameters
            made = make(block, spot, None if seed is None else seed + index, real=not dry_run)
        except (SwapError, RecipeError, ValueError, TypeError) as error:
            problems.append(f"{path}: {reason(error)}")
            continue
        rows.append(row._replace(parameters=_count(made) + (0 if how == "replace" else 2 * row.dim)))
        blocks.append(made)
    refuse(problems, "swap")
    frozen = to_freeze(model, [module for _, module in chosen] if how == "replace" else []) if train == "memory" else {}
    plan = Plan(
        type(model).__name__, how, described, label_of(described if described is not None else block), tuple(rows),
        train, gate, sum(frozen.values()),
    )  # fmt: skip
    if not dry_run:
        carry_out(model, plan, blocks, list(frozen))
    return plan


def unswap(model: nn.Module, plan: Plan | None = None) -> None:
    """Take out what swaps have put in: of one ``plan``, or everything, the last first.

    The modules that were replaced are put back, the same objects with the weights they had; hooks are removed, and what
    was frozen trains again. Raises ``SwapError``, and changes nothing, for a model without swaps, a plan that is not of
    it, one that a later swap rests on, and one whose modules were replaced meanwhile.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model: expected a module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    held = [module for module in model.modules() if vars(module).get(DONE)]
    if not held:
        raise SwapError(f"unswap: {type(model).__name__} has no swaps in it")
    if plan is None:
        for module in held:
            for done in vars(module)[DONE]:
                expect_in_place(module, done)
        for module in held:
            for done in reversed(list(vars(module)[DONE])):
                undo(module, done)
        return
    found = [(module, done) for module in held for done in vars(module)[DONE] if done.plan == plan]
    for module, done in sorted(found, key=lambda one: one[1].plan is not plan)[:1]:
        later = vars(module)[DONE]
        for other in later[later.index(done) + 1 :]:
            expect_apart(done.plan, other.plan)
        expect_in_place(module, done)
        undo(module, done)
        return
    raise SwapError(f"unswap: the plan is not one of the swaps in this {type(model).__name__}")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

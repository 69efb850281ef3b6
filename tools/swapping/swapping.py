"""``tb.swap`` and ``tb.unswap``: blocks into any model, and out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...blocks import Block, LanguageModel
from ...registry import RecipeError, nearest, show
from .adapter import Adapter, adapter_of, as_adapter, misfit
from .building import Given, Place, description, make, reason
from .error import SwapError, refuse
from .matching import Where, match
from .plan import HOWS, TRAINS, Plan, Row, label_of
from .recording import remember
from .site import Gated, Replacement, Site
from .width import place, same_width, width

_DONE = "_titans_build_swaps"
"""Attribute of a swapped model: what was done to it, first to last."""


@dataclasses.dataclass(eq=False)
class Done:
    """A swap that was carried out, and what it takes to undo it."""

    plan: Plan
    sites: dict[str, tuple[str, str]]
    """For each path of the plan: the name of what was put in, in the model's tree, and its key."""
    frozen: list[str]
    """Names of parameters that trained before."""
    unnested: list[str]
    """``nn.TransformerEncoder``s that would have packed padded batches as only their own layers understand them."""


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
    _expect_settings(model, how, every, start, train, gate)
    chosen = match(model, where, every, start)
    fixed = as_adapter(adapter)
    rows, blocks, problems = [], [], []
    for index, (path, module) in enumerate(chosen):
        try:
            row = _row(model, path, module, how, fixed, dim)
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
    frozen = (
        _to_freeze(model, [module for _, module in chosen] if how == "replace" else []) if train == "memory" else {}
    )
    plan = Plan(
        type(model).__name__, how, described, label_of(described if described is not None else block), tuple(rows),
        train, gate, sum(frozen.values()),
    )  # fmt: skip
    if not dry_run:
        _carry_out(model, plan, blocks, list(frozen))
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
    held = [module for module in model.modules() if vars(module).get(_DONE)]
    if not held:
        raise SwapError(f"unswap: {type(model).__name__} has no swaps in it")
    if plan is None:
        for module in held:
            for done in vars(module)[_DONE]:
                _expect_in_place(module, done)
        for module in held:
            for done in reversed(list(vars(module)[_DONE])):
                _undo(module, done)
        return
    found = [(module, done) for module in held for done in vars(module)[_DONE] if done.plan == plan]
    for module, done in sorted(found, key=lambda one: one[1].plan is not plan)[:1]:
        later = vars(module)[_DONE]
        for other in later[later.index(done) + 1 :]:
            _expect_apart(done.plan, other.plan)
        _expect_in_place(module, done)
        _undo(module, done)
        return
    raise SwapError(f"unswap: the plan is not one of the swaps in this {type(model).__name__}")


def swaps(model: nn.Module) -> list[Plan]:
    """The plans that were carried out on ``model`` itself, first to last; none where nothing was swapped."""
    return [done.plan for done in vars(getattr(model, "_orig_mod", model)).get(_DONE, ())]


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that swaps with ``train="memory"`` froze."""
    return [name for done in vars(model).get(_DONE, ()) for name in done.frozen]


# -- planning ------------------------------------------------------------------------------------------------------


def _expect_settings(model: Any, how: Any, every: Any, start: Any, train: Any, gate: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model: expected a module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or any(child._compiled_call_impl is not None for child in model.modules()):
        raise SwapError("swap: the model is compiled, and runs what was compiled: swap first, then compile")
    if isinstance(model, LanguageModel):
        raise SwapError("swap: a model of titans-build is changed in its recipe, where blocks nest and share one state")
    for name, value, known in (("how", how, HOWS), ("train", train, TRAINS)):
        if value not in known:
            near = nearest(value, known)
            raise SwapError(f"swap: {name}: expected {', '.join(known[:-1])} or {known[-1]}, got {show(value)}{near}")
    for name, value, least in (("every", every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SwapError(f"swap: {name}: expected an integer >= {least}, got {show(value)}")
    if isinstance(gate, bool) or not isinstance(gate, int | float):
        raise SwapError(f"swap: gate: expected a number, got {show(gate)}")


def _row(
    model: nn.Module, path: str, module: nn.Module, how: str, fixed: Adapter | None, dim: int | Mapping[str, int] | None
) -> Row:
    if isinstance(module, Block):
        raise SwapError(f"{type(module).__name__} is a block of titans-build: blocks nest in a recipe")
    if isinstance(module, torch.jit.ScriptModule):
        raise SwapError(f"{type(module).__name__} is scripted: nothing can be put into it")
    adapter = fixed
    if adapter is None:
        parts = path.split(".")
        around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        adapter = module.adapter if isinstance(module, Replacement) else adapter_of(module, around)
    wrong = misfit(module, adapter, how == "replace")
    if wrong is not None:
        raise SwapError(wrong)
    if how != "before" and not same_width(module):
        raise SwapError(f"{module} returns another width than it reads: no block does")
    wide = dim.get(path) if isinstance(dim, Mapping) else dim
    wide = width(module) if wide is None else wide
    if wide is None:
        raise SwapError(f"the width of what {type(module).__name__} reads cannot be told: say it, dim=...")
    if isinstance(wide, bool) or not isinstance(wide, int) or wide < 1:
        raise SwapError(f"dim: expected an integer >= 1, got {show(wide)}")
    return Row(path, type(module).__name__, wide, 0, *place(module, model), adapter)


def _to_freeze(model: nn.Module, replaced: Sequence[nn.Module]) -> dict[str, int]:
    """Names and sizes of the parameters that train and are none of a swap's; ``replaced`` will be gone by then."""
    ours = {p for module in model.modules() if isinstance(module, Site) for p in module.parameters()}
    staying = _parameters_without(model, set(replaced))
    named = model.named_parameters()
    return {name: p.numel() for name, p in named if p.requires_grad and p not in ours and p in staying}


def _parameters_without(module: nn.Module, gone: set[nn.Module]) -> set[nn.Parameter]:
    found = {parameter for parameter in module._parameters.values() if parameter is not None}
    for child in module._modules.values():
        if child is not None and child not in gone:
            found |= _parameters_without(child, gone)
    return found


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- carrying out --------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in it could not be trained
def _carry_out(model: nn.Module, plan: Plan, blocks: Sequence[Block], frozen: list[str]) -> None:
    done = Done(plan, {}, frozen, [])
    record: list[Done] = vars(model).setdefault(_DONE, [])
    record.append(done)
    try:
        for row, block in zip(plan.rows, blocks):
            _put_in(model, plan, row, block, done)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        remember(model, swaps(model))
    except BaseException:
        _undo(model, done)
        raise


def _put_in(model: nn.Module, plan: Plan, row: Row, block: Block, done: Done) -> None:
    from .hooks import install, replaced  # brings torch's compiler in

    module = model.get_submodule(row.path)
    training = module.training
    site: Site
    if plan.how == "replace":
        site = Replacement(block, row.path, row.adapter, module, replaced)
        above, _, name = row.path.rpartition(".")
        model.get_submodule(above)._modules[name] = site
        name, module = row.path, site
    else:
        site = Gated(block, row.path, plan.how, row.adapter, gate=plan.gate)
        last = next(name for name in ("titans", *(f"titans_{n}" for n in range(2, 1000))) if not hasattr(module, name))
        module.add_module(last, site)
        name = f"{row.path}.{last}"
    site.spec = plan.block
    done.sites[row.path] = (name, site.key)
    site.training = training  # not by train(), which would reach into what was replaced
    for child in site.children():
        child.train(training)
    parts = row.path.split(".")
    for depth in range(len(parts)):
        above_it = model.get_submodule(".".join(parts[:depth]))
        install(above_it)
        if isinstance(above_it, nn.TransformerEncoder) and getattr(above_it, "use_nested_tensor", False):
            above_it.use_nested_tensor = False
            done.unnested.append(".".join(parts[:depth]))
    install(module)


def _undo(model: nn.Module, done: Done) -> None:
    from .hooks import is_installed, remove

    for name, _ in reversed(list(done.sites.values())):
        site = model.get_submodule(name)
        above, _, last = name.rpartition(".")
        parent = model.get_submodule(above)
        if isinstance(site, Replacement):
            parent._modules[last] = site.original
        else:
            del parent._modules[last]
    for module in model.modules():
        if is_installed(module) and not any(isinstance(child, Site) for child in module.modules()):
            remove(module)
    for name in done.unnested:
        model.get_submodule(name).use_nested_tensor = True  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        if name in done.frozen:
            parameter.requires_grad_(True)
    record: list[Done] = vars(model)[_DONE]
    record.remove(done)
    remember(model, swaps(model))
    if not record:
        delattr(model, _DONE)


def _expect_in_place(model: nn.Module, done: Done) -> None:
    for path, (name, key) in done.sites.items():
        try:
            found = model.get_submodule(name)
        except AttributeError:
            found = None
        if not isinstance(found, Site) or found.key != key:
            now = "nothing" if found is None else f"a {type(found).__name__}"
            raise SwapError(
                f"unswap: {path}: at {name} there is {now} now, and not what the swap put in: unwrap it first"
            )
        if (
            isinstance(found, Replacement)
            and not found.original_is_there
            and not any(p.is_meta for p in found.parameters())
        ):
            raise SwapError(
                f"unswap: {path}: the module that was replaced was not saved with this model: it has no weights"
            )


def _expect_apart(plan: Plan, later: Plan) -> None:
    for path in plan.paths:
        for other in later.paths:
            if path == other or path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise SwapError(f"unswap: a later swap at {other} rests on that at {path}: undo the later one first")

"""Putting the blocks of a plan into a model, and taking them out again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from ...blocks import Block
from .error import SwapError
from .plan import Plan, Row
from .recording import remember
from .site import Gated, Replacement, Site

DONE = "_titans_build_swaps"
"""Attribute of a swapped model: what was done to it, first to last."""


@dataclasses.dataclass(eq=False)
class Done:
    """A swap that was carried out, and what it takes to undo it."""

    plan: Plan
    sites: dict[str, tuple[str, str]]
    """For each path of the plan: the name of what was put in, in the model's tree, and its key."""
    frozen: list[str]
    """Names of parameters that trained before."""


def swaps(model: nn.Module) -> list[Plan]:
    """The plans that were carried out on ``model`` itself, first to last; none where nothing was swapped."""
    return [done.plan for done in vars(getattr(model, "_orig_mod", model)).get(DONE, ())]


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that swaps with ``train="memory"`` froze."""
    return [name for done in vars(model).get(DONE, ()) for name in done.frozen]


@torch.inference_mode(False)  # parameters made in it could not be trained
def carry_out(model: nn.Module, plan: Plan, blocks: Sequence[Block], frozen: list[str]) -> None:
    """Put ``blocks`` where ``plan`` says and freeze the parameters that are named, or leave the model as it was."""
    done = Done(plan, {}, frozen)
    record: list[Done] = vars(model).setdefault(DONE, [])
    record.append(done)
    try:
        for row, block in zip(plan.rows, blocks):
            _put_in(model, plan, row, block, done)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        remember(model, swaps(model))
    except BaseException:
        undo(model, done)
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
        install(model.get_submodule(".".join(parts[:depth])))
    install(module)


def undo(model: nn.Module, done: Done) -> None:
    """Take out what was put in, hooks included, and let train again what was frozen."""
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
    record: list[Done] = vars(model)[DONE]
    record.remove(done)
    # another swap that trains the memory alone still wants these frozen
    heir = next((other for other in record if other.plan.train == "memory"), None)
    if heir is not None:
        heir.frozen += [name for name in done.frozen if name not in heir.frozen]
    else:
        for name in done.frozen:
            with contextlib.suppress(AttributeError):  # not in the model any more
                model.get_parameter(name).requires_grad_(True)
    remember(model, swaps(model))
    if not record:
        delattr(model, DONE)


def expect_in_place(model: nn.Module, done: Done) -> None:
    """Raise ``SwapError`` unless everything that was put in is where it was put."""
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


def expect_apart(plan: Plan, later: Plan) -> None:
    """Raise ``SwapError`` where a later swap stands at, in or around a module of ``plan``."""
    for path in plan.paths:
        for other in later.paths:
            if path == other or path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise SwapError(f"unswap: a later swap at {other} rests on that at {path}: undo the later one first")

"""``tb.swap`` and ``tb.unswap``: blocks into any model, and out again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...blocks import Block, LanguageModel
from ...registry import RecipeError, nearest, show, validate
from .adapter import Adapter, SwapError, as_adapter
from .config_record import record_swaps
from .infer import device_and_dtype, infer_adapter, input_width, keeps_width, mismatch, output_width
from .plan import HOWS, TRAINS, Plan, Row, label_of, match
from .site import BlockSpec, Gated, Replacement, Site, make_block

_APPLIED = "_titans_build_swaps"
"""Attribute of a swapped model: the swaps that were made in it, first to last."""
_HOOKS = "_titans_build_hooks"
"""Attribute of a module whose calls are followed: the handles of its hooks."""
_NESTED = "_titans_build_nested_tensor"
"""Attribute of an ``nn.TransformerEncoder`` that packed padded batches before a swap."""


@dataclasses.dataclass(eq=False)
class Applied:
    """A swap that was made, and what it takes to undo it."""

    plan: Plan
    sites: dict[str, tuple[str, str]]
    """For each path of the plan: the name of what was put in, in the model's tree, and its key."""
    frozen: list[str]
    """Names of parameters that trained before."""


def swap(
    model: nn.Module,
    where: str | Sequence[str],
    block: BlockSpec,
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
    ``start``: every ``every``-th match, in the model's order, from ``start``.

    ``block``: as in a recipe; or a built module, copied for each place; or a function from the width to one. It gets
    the device and dtype of the module it stands at; ``seed`` and the place draw its parameters.

    ``how``: ``replace`` the module; or add to it, through a learned gate per feature that starts at ``gate``:
    ``beside``, ``f(x) + gate * block(norm(x))``; ``before``, to ``x``; ``after``, to ``f(x)``. At zero the model
    computes what it did before. A block in the place of a whole layer is pre-normed and residual, as in a recipe.

    ``train``: ``memory`` freezes all parameters but those of swaps. ``dry_run``: make the plan, change nothing.
    ``adapter``: how the modules are called, where that cannot be inferred: a name or an ``Adapter``. ``dim``: their
    width, likewise.

    Raises ``SwapError`` naming the modules, and leaves the model as it was.
    """
    _check_settings(model, how, every, start, train, gate, seed)
    chosen = match(model, where, every, start)
    given = as_adapter(adapter)
    for path in dim if isinstance(dim, Mapping) else ():
        if path not in dict(chosen):
            raise SwapError(f"swap: dim: {show(path)} is no module of this swap{nearest(path, dict(chosen))}")
    rows, blocks, problems, described = [], [], [], None
    for index, (path, module) in enumerate(chosen):
        try:
            row = _row(model, path, module, how, given, dim)
            if isinstance(block, str | dict | list):
                described = validate(block, dim=row.dim)
            elif not callable(block):
                raise SwapError(
                    "block: expected a description ({'type': 'memory', ...}), a module, or a function from the width "
                    f"to one, got {show(block)}"
                )
            layer = row.adapter.layer and how == "replace"
            drawn = None if seed is None else seed + index
            made = make_block(block, row.dim, row.device, row.dtype, drawn, layer=layer, meta=dry_run)
        except (SwapError, RecipeError, ValueError, TypeError) as error:
            reason = "; ".join(map(str, error.problems)) if isinstance(error, RecipeError) else str(error)
            problems.append(f"{path}: {reason}")
            continue
        gates = 0 if how == "replace" else 2 * row.dim
        rows.append(row._replace(parameters=sum(p.numel() for p in made.parameters()) + gates))
        blocks.append(made)
    if problems:
        head = f"swap: {len(problems)} problem{'' if len(problems) == 1 else 's'}; the model is as it was"
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise SwapError("\n  ".join([head, *problems[:10], *more]))
    frozen = _trainable(model, [row.path for row in rows] if how == "replace" else []) if train == "memory" else {}
    label = label_of(block if described is None else described)
    plan = Plan(type(model).__name__, how, described, label, tuple(rows), train, gate, sum(frozen.values()))
    if not dry_run:
        _apply(model, plan, blocks, list(frozen))
    return plan


def unswap(model: nn.Module, plan: Plan | None = None) -> None:
    """Undo swaps: that of one ``plan``, or all, the last first.

    The modules that were replaced are put back, the same objects with the weights they had; hooks are removed, and
    parameters that the swap froze train again. Raises ``SwapError``, and changes nothing, for a model without swaps, a
    plan that is not of it, one that a later swap stands on, and one whose modules were replaced since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model: expected a module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    applied = [(module, one) for module in model.modules() for one in vars(module).get(_APPLIED, ())]
    if not applied:
        raise SwapError(f"unswap: {type(model).__name__} has no swaps in it")
    if plan is not None:
        equal = [(module, one) for module, one in applied if one.plan == plan]
        applied = sorted(equal, key=lambda found: found[1].plan is not plan)[:1]
        if not applied:
            raise SwapError(f"unswap: the plan is not one of the swaps in this {type(model).__name__}")
        module, one = applied[0]
        later = vars(module)[_APPLIED]
        for other in later[later.index(one) + 1 :]:
            _check_apart(one.plan, other.plan)
    for module, one in applied:
        _check_in_place(module, one)
    for module, one in reversed(applied):
        _undo(module, one)


def swaps(model: nn.Module) -> list[Plan]:
    """The plans of the swaps that were made in ``model`` itself, first to last."""
    return [applied.plan for applied in vars(getattr(model, "_orig_mod", model)).get(_APPLIED, ())]


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that swaps with ``train="memory"`` froze."""
    return [name for applied in vars(model).get(_APPLIED, ()) for name in applied.frozen]


# -- making the plan -------------------------------------------------------------------------------------------------


def _check_settings(model: Any, how: Any, every: Any, start: Any, train: Any, gate: Any, seed: Any) -> None:
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
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not math.isfinite(gate):
        raise SwapError(f"swap: gate: expected a number, got {show(gate)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise SwapError(f"swap: seed: expected an integer, or None for torch's own generator, got {show(seed)}")


def _row(
    model: nn.Module, path: str, module: nn.Module, how: str, given: Adapter | None, dim: int | Mapping[str, int] | None
) -> Row:
    if isinstance(module, Block):
        raise SwapError(f"{type(module).__name__} is a block of titans-build: blocks nest in a recipe")
    if isinstance(module, torch.jit.ScriptModule):
        raise SwapError(f"{type(module).__name__} is scripted: nothing can be put into it")
    if given is not None:
        adapter = given
    elif isinstance(module, Replacement):
        adapter = module.adapter
    else:
        adapter = infer_adapter(module, [model.get_submodule(above) for above in _ancestors(path)])
    wrong = mismatch(module, adapter, how == "replace")
    if wrong is not None:
        raise SwapError(wrong)
    if how in ("replace", "beside") and not keeps_width(module):
        raise SwapError(f"{module} returns another width than it reads: no block does")
    width = dim.get(path) if isinstance(dim, Mapping) else dim
    if width is None:
        width = output_width(module) if how == "after" else input_width(module)
    if width is None:
        does = "returns" if how == "after" else "reads"
        raise SwapError(f"the width of what {type(module).__name__} {does} cannot be told: say it, dim=...")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise SwapError(f"dim: expected an integer >= 1, got {show(width)}")
    return Row(path, type(module).__name__, width, 0, *device_and_dtype(module, model), adapter)


def _ancestors(path: str) -> list[str]:
    """Paths of the modules around a module, the model's own (empty) first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _trainable(model: nn.Module, replaced: Sequence[str]) -> dict[str, int]:
    """Names and sizes of the parameters that train, are no swap's, and stay when ``replaced`` modules are gone."""
    ours = {parameter for module in model.modules() if isinstance(module, Site) for parameter in module.parameters()}
    gone = tuple(f"{path}." for path in replaced)
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter not in ours and not name.startswith(gone):
            found.setdefault(parameter, name)
    return {name: parameter.numel() for parameter, name in found.items()}


# -- carrying it out, and undoing it ---------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters made in it could not be trained
def _apply(model: nn.Module, plan: Plan, blocks: Sequence[Block], frozen: list[str]) -> None:
    applied = Applied(plan, {}, frozen)
    vars(model).setdefault(_APPLIED, []).append(applied)
    try:
        for row, block in zip(plan.rows, blocks):
            _install(model, row, block, applied)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        record_swaps(model, swaps(model))
    except BaseException:
        _undo(model, applied)
        raise


def _install(model: nn.Module, row: Row, block: Block, applied: Applied) -> None:
    from .call import call_replacement  # loads torch's compiler

    plan, module = applied.plan, model.get_submodule(row.path)
    training = module.training
    site: Site
    if plan.how == "replace":
        site = Replacement(block, row.path, row.adapter, module, call_replacement)
        name = row.path
        model.set_submodule(name, site)
        module = site
    else:
        site = Gated(block, row.path, plan.how, row.adapter, gate=plan.gate)
        last = next(name for name in ("titans", *(f"titans_{n}" for n in range(2, 1000))) if not hasattr(module, name))
        module.add_module(last, site)
        name = f"{row.path}.{last}"
    site.spec = plan.block
    applied.sites[row.path] = (name, site.key)
    site.training = training  # not by train(), which would reach the replaced module
    for child in site.children():
        child.train(training)
    for above in _ancestors(row.path):
        _add_hooks(model.get_submodule(above))
    _add_hooks(module)


def _undo(model: nn.Module, applied: Applied) -> None:
    for name, _ in reversed(list(applied.sites.values())):
        site = model.get_submodule(name)
        above, _, last = name.rpartition(".")
        if isinstance(site, Replacement):
            model.set_submodule(name, site.original)
        else:
            delattr(model.get_submodule(above), last)
    for module in model.modules():
        if not _has_site(module):
            _remove_hooks(module)
    remaining: list[Applied] = vars(model)[_APPLIED]
    remaining.remove(applied)
    # another swap that trains the memory alone still needs these frozen
    heir = next((other for other in remaining if other.plan.train == "memory"), None)
    if heir is not None:
        heir.frozen += [name for name in applied.frozen if name not in heir.frozen]
    else:
        for name in applied.frozen:
            with contextlib.suppress(AttributeError):  # not in the model any more
                model.get_parameter(name).requires_grad_(True)
    record_swaps(model, swaps(model))
    if not remaining:
        delattr(model, _APPLIED)


def _add_hooks(module: nn.Module) -> None:
    """Follow a module's calls. The handles are copied and pickled with the module, and still remove its hooks."""
    from .call import after_any_forward, after_forward, before_forward  # loads torch's compiler

    if _HOOKS not in vars(module):
        vars(module)[_HOOKS] = [
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
            module.register_forward_hook(after_forward, with_kwargs=True),
            module.register_forward_hook(after_any_forward, always_call=True),
        ]
    # padded batches would be packed as only torch's own layers understand them
    if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _has_site(module.layers):
        module.use_nested_tensor = False
        vars(module)[_NESTED] = True


def _has_site(module: nn.Module) -> bool:
    return any(isinstance(child, Site) for child in module.modules())


def _remove_hooks(module: nn.Module) -> None:
    for handle in vars(module).pop(_HOOKS, ()):
        handle.remove()
    if vars(module).pop(_NESTED, False):
        module.use_nested_tensor = True  # type: ignore[assignment]


def _check_in_place(model: nn.Module, applied: Applied) -> None:
    """Raise ``SwapError`` unless everything that was put in is where it was put."""
    for path, (name, key) in applied.sites.items():
        try:
            found: Any = model.get_submodule(name)
        except AttributeError:
            found = None
        if not isinstance(found, Site) or found.key != key:
            now = "nothing" if found is None else f"a {type(found).__name__}"
            raise SwapError(f"unswap: {path}: at {name} there is {now} now, not what the swap put in: unwrap it first")
        on_meta = any(parameter.is_meta for parameter in found.parameters())
        if isinstance(found, Replacement) and not found.original_has_values and not on_meta:
            raise SwapError(
                f"unswap: {path}: the module that was replaced was not saved with this model: it has no weights"
            )


def _check_apart(plan: Plan, later: Plan) -> None:
    """Raise ``SwapError`` where a later swap is at, in or around a module of ``plan``."""
    for path in plan.paths:
        for other in later.paths:
            if path == other or path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise SwapError(f"unswap: a later swap at {other} stands on that at {path}: undo the later one first")

"""``tb.swap`` and ``tb.unswap``: blocks into any model, and out again."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...blocks import Block, LanguageModel
from ...registry import RecipeError, nearest, show, validate
from ...registry.validation import CHAIN
from .adapter import Adapter, SwapError, as_adapter, uncompiled
from .call import HOOKS, call_replacement
from .infer import check_adapter, device_and_dtype, infer_adapter, input_width, output_width, output_widths
from .plan import HOWS, Plan, Row, match
from .site import BlockSpec, Gated, Replacement, Site, make_block, sites_in

_SWAPS = "_titans_build_swaps"
"""Attribute of a swapped model: its swaps, first to last."""
_FROZEN = "_titans_build_frozen"
"""Attribute of a swapped model: names of the parameters that ``train="memory"`` froze."""
_HOOKS = "_titans_build_hooks"
"""Attribute of a module with blocks in it: the handles of its hooks."""
_NESTED = "_titans_build_nested_tensor"
"""Attribute of an ``nn.TransformerEncoder`` that used nested tensors before a swap."""


LAYER = "layer"
"""``type`` in the record of a list of blocks in a whole layer's place: each is pre-normed and residual."""


class Applied(NamedTuple):
    """A swap that was made."""

    plan: Plan
    sites: dict[str, tuple[str, str]]
    """For each path of the plan: the name of the site in the model, and its key."""


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
    ``start``: each ``every``-th match, in the model's order, from ``start``.

    ``block``: as in a recipe; or a built module, copied for each place; or a function from the width to one. It gets
    the device and dtype of the module at its place; ``seed`` and the place determine its initial parameters.

    ``how``: ``replace`` the module; or add to it, through a gate for each feature that is initialized to ``gate``:
    ``beside``, ``f(x) + gate * block(norm(x))``; ``before``, to ``x``; ``after``, to ``f(x)``. At zero the model
    computes what it did before. A block that replaces a whole layer is pre-normed and residual, as in a recipe.

    ``train``: ``memory`` freezes all parameters but those of swaps. ``dry_run``: make the plan, change nothing.
    ``adapter``: how the modules are called, if that cannot be inferred: a name or an ``Adapter``. ``dim``: their
    width, likewise.

    Raises ``SwapError`` naming the modules, and leaves the model unchanged.
    """
    _check_settings(model, how, every, start, train, gate, seed)
    chosen = match(model, where, every, start)
    given = as_adapter(adapter)
    for path in dim if isinstance(dim, Mapping) else ():
        if path not in chosen:
            raise SwapError(f"swap: dim: {show(path)} is no module of this swap{nearest(path, chosen)}")
    rows, blocks, problems, spec = [], [], [], None
    for index, (path, module) in enumerate(chosen.items()):
        try:
            row = _row(model, path, module, how, given, dim)
            layer = row.adapter.layer and how == "replace"
            if layer and isinstance(block, dict) and block.get("type") == LAYER and set(block) == {"type", "of"}:
                block = block["of"]
            if layer and isinstance(block, list):
                spec = {**validate(block, dim=row.dim), "type": LAYER}
            elif isinstance(block, str | dict | list):
                spec = validate(block, dim=row.dim)
            elif not callable(block):
                raise SwapError(
                    "block: expected a description ({'type': 'memory', ...}), a module, or a function from the width "
                    f"to one, got {show(block)}"
                )
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
        head = f"swap: {len(problems)} problem{'' if len(problems) == 1 else 's'}; the model is unchanged"
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise SwapError("\n  ".join([head, *problems[:10], *more]))
    frozen = _trainable(model, [row.path for row in rows] if how == "replace" else []) if train == "memory" else {}
    plan = Plan(type(model).__name__, how, spec, _label(block, spec), tuple(rows), train, gate, sum(frozen.values()))
    if not dry_run:
        _apply(model, plan, blocks, list(frozen))
    return plan


def unswap(model: nn.Module, plan: Plan | None = None) -> None:
    """Undo swaps: that of one ``plan``, or all, the last first.

    Modules that were replaced return, the same objects with the weights they had; hooks are removed, and parameters
    that the swap froze train again. Raises ``SwapError``, and changes nothing, for a model without swaps, a plan of
    another model, a swap at whose modules there is a later one, and modules that were replaced since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unswap: model: expected a module, got {type(model).__name__}")
    model = uncompiled(model)
    applied = [(module, one) for module in model.modules() for one in vars(module).get(_SWAPS, ())]
    if not applied:
        raise SwapError(f"unswap: {type(model).__name__} has no swaps in it")
    if plan is not None:
        equal = [(module, one) for module, one in applied if one.plan == plan]
        applied = sorted(equal, key=lambda found: found[1].plan is not plan)[:1]
        if not applied:
            raise SwapError(f"unswap: the plan is not one of the swaps in this {type(model).__name__}")
        module, one = applied[0]
        all_swaps = vars(module)[_SWAPS]
        for later in all_swaps[all_swaps.index(one) + 1 :]:
            _check_apart(one.plan, later.plan)
    for module, one in applied:
        _check_in_place(module, one)
    for module, one in reversed(applied):
        _undo(module, one)


def swaps(model: nn.Module) -> list[Plan]:
    """The plans of the swaps that were made in ``model`` itself, first to last."""
    return [applied.plan for applied in vars(uncompiled(model)).get(_SWAPS, ())]


def frozen_names(model: nn.Module) -> list[str]:
    """Names of the parameters of ``model`` that swaps with ``train="memory"`` froze."""
    return list(vars(model).get(_FROZEN, ()))


def sites_of_swaps(model: nn.Module) -> list[tuple[Plan, dict[str, Any]]]:
    """The plans of the swaps in ``model``, first to last, each with the sites by the paths of the plan."""
    found = vars(uncompiled(model)).get(_SWAPS, ())
    return [(one.plan, {path: model.get_submodule(name) for path, (name, _) in one.sites.items()}) for one in found]


def has_adapters(module: nn.Module) -> bool:
    """Whether there are adapters of PEFT in ``module``."""
    peft: Any = sys.modules.get("peft")
    adapters = () if peft is None else (peft.PeftModel, peft.tuners.tuners_utils.BaseTunerLayer)
    return any(isinstance(child, adapters) for child in module.modules())


# -- making the plan -------------------------------------------------------------------------------------------------


def _check_settings(model: Any, how: Any, every: Any, start: Any, train: Any, gate: Any, seed: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model: expected a module, got {type(model).__name__}")
    if any(uncompiled(child) is not child for child in model.modules()):
        raise SwapError("swap: the model is compiled: swap first, then compile")
    if has_adapters(model):
        raise SwapError(
            "swap: the model has adapters of PEFT, which are saved without the blocks of swaps: swap first, then "
            "get_peft_model(model, LoraConfig(..., modules_to_save=['titans']))"
        )
    if isinstance(model, LanguageModel):
        raise SwapError("swap: a model of titans-build is changed in its recipe, where blocks nest and share one state")
    number = type(gate) in (int, float) and math.isfinite(gate)
    for name, value, valid, expected, known in (
        ("how", how, how in HOWS, "replace, beside, before or after", HOWS),
        ("train", train, train in ("all", "memory"), "all or memory", ("all", "memory")),
        ("every", every, type(every) is int and every >= 1, "an integer >= 1", ()),
        ("start", start, type(start) is int and start >= 0, "an integer >= 0", ()),
        ("gate", gate, number, "a number", ()),
        ("seed", seed, seed is None or type(seed) is int, "an integer, or None for torch's own generator", ()),
    ):
        if not valid:
            raise SwapError(f"swap: {name}: expected {expected}, got {show(value)}{nearest(value, known)}")


def _row(
    model: nn.Module, path: str, module: nn.Module, how: str, given: Adapter | None, dim: int | Mapping[str, int] | None
) -> Row:
    kind = type(module).__name__
    if isinstance(module, Block):
        raise SwapError(f"{kind} is a block of titans-build: blocks nest in a recipe")
    if isinstance(module, torch.jit.ScriptModule):
        raise SwapError(f"{kind} is scripted: no block can be put into it")
    if given is not None:
        adapter = given
    elif isinstance(module, Replacement):
        adapter = module.adapter
    else:
        adapter = infer_adapter(module, [model.get_submodule(above) for above in _ancestors(path)])
    check_adapter(module, adapter, how == "replace")
    reads, returns = input_width(module), output_width(module)
    width = dim.get(path) if isinstance(dim, Mapping) else dim
    if width is None:
        width = returns if how == "after" else reads
    if width is None:
        side = "output" if how == "after" else "input"
        raise SwapError(f"the width of the {side} of {kind} is unknown: give it, dim=...")
    if type(width) is not int or width < 1:
        raise SwapError(f"dim: expected an integer >= 1, got {show(width)}")
    if isinstance(module, nn.Embedding) and how != "after":
        raise SwapError(f"{kind} reads the ids of tokens, which a block does not: how='after' adds to what it returns")
    possible = output_widths(module)
    if how in ("beside", "after") and given is dim is None and adapter.returns and possible == set():
        raise SwapError(
            f"{kind} has no parameters and returns {adapter.returns} values, of unknown width: name another module, or "
            "give adapter=... and dim=..."
        )
    if how in ("replace", "beside") and possible and width not in possible:
        raise SwapError(f"{kind} does not return the width {width}, which a block that reads it returns")
    return Row(path, kind, width, 0, *device_and_dtype(module, model), adapter)


def _label(block: BlockSpec, spec: Any) -> str:
    """A block's name in the table."""
    if isinstance(spec, dict):
        return str(spec["type"])
    return type(block).__name__ if isinstance(block, nn.Module) else show(block if spec is None else spec, 40)


def _ancestors(path: str) -> list[str]:
    """Paths of the modules around a module, the model's own (empty) first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _trainable(model: nn.Module, replaced: Sequence[str]) -> dict[str, int]:
    """Names and sizes of the parameters that train and belong neither to swaps nor to ``replaced`` modules."""
    ours = {parameter for module in model.modules() if isinstance(module, Site) for parameter in module.parameters()}
    gone = tuple(f"{path}." for path in replaced)
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and parameter not in ours and not name.startswith(gone):
            found.setdefault(parameter, name)
    return {name: parameter.numel() for parameter, name in found.items()}


# -- making and undoing a swap ---------------------------------------------------------------------------------------


@torch.inference_mode(False)  # parameters created in inference mode could not be trained
def _apply(model: nn.Module, plan: Plan, blocks: Sequence[Block], frozen: list[str]) -> None:
    applied = Applied(plan, {})
    vars(model).setdefault(_SWAPS, []).append(applied)
    vars(model).setdefault(_FROZEN, []).extend(frozen)
    order = 1 + max((site.order for _, site in sites_in(model)), default=0)
    try:
        for row, block in zip(plan.rows, blocks):
            _install(model, row, block, applied, order)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        torch.compiler.reset()  # code that was compiled before the swap is not run
    except BaseException:
        _undo(model, applied)
        raise


def _install(model: nn.Module, row: Row, block: Block, applied: Applied, order: int) -> None:
    plan, module = applied.plan, model.get_submodule(row.path)
    training, name, spec = module.training, row.path, plan.block
    if isinstance(spec, dict) and spec["type"] == LAYER:
        spec = {**spec, "type": CHAIN}  # as in the fingerprints of states that were saved before LAYER was recorded
    site: Site
    if plan.how == "replace":
        site = Replacement(block, row.path, row.adapter, spec, module, call_replacement)
        model.set_submodule(name, site)
        module = site
    else:
        site = Gated(block, row.path, plan.how, row.adapter, spec, plan.gate)
        last = next(name for name in ("titans", *(f"titans_{n}" for n in range(2, 1000))) if not hasattr(module, name))
        module.add_module(last, site)
        name = f"{row.path}.{last}"
    applied.sites[row.path] = (name, site.key)
    site.plan, site.order = plan, order
    site.training = training  # not by train(), which would reach the replaced module
    for child in site.children():
        child.train(training)
    for followed in (*map(model.get_submodule, _ancestors(row.path)), module):
        _add_hooks(followed)


def _undo(model: nn.Module, applied: Applied) -> None:
    for name, _ in reversed(list(applied.sites.values())):
        site = model.get_submodule(name)
        above, _, last = name.rpartition(".")
        if isinstance(site, Replacement):
            model.set_submodule(name, site.restored())
        else:
            delattr(model.get_submodule(above), last)
    for module in model.modules():
        if not any(isinstance(child, Site) for child in module.modules()):
            for handle in vars(module).pop(_HOOKS, ()):
                handle.remove()
            if vars(module).pop(_NESTED, False):
                module.use_nested_tensor = True  # type: ignore[assignment]
    remaining: list[Applied] = vars(model)[_SWAPS]
    remaining.remove(applied)
    if not any(other.plan.train == "memory" for other in remaining):
        for name in vars(model).pop(_FROZEN, ()):
            with contextlib.suppress(AttributeError):  # not in the model any more
                model.get_parameter(name).requires_grad_(True)
    torch.compiler.reset()
    if not remaining:
        delattr(model, _SWAPS)


def _add_hooks(module: nn.Module) -> None:
    """Follow a module's calls. The handles are copied and pickled with the module, and still remove its hooks."""
    if _HOOKS not in vars(module):
        before, after, always = HOOKS
        vars(module)[_HOOKS] = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # before hooks that were there already: they see what the module returns now
            module.register_forward_hook(after, with_kwargs=True, prepend=True),
            module.register_forward_hook(always, always_call=True),
        ]
    # nested tensors, in which an encoder packs padded batches, are understood by torch's own layers only
    if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
        module.use_nested_tensor = False
        vars(module)[_NESTED] = True


def _check_in_place(model: nn.Module, applied: Applied) -> None:
    """Raise ``SwapError`` unless every site is where the swap installed it."""
    for path, (name, key) in applied.sites.items():
        try:
            found: Any = model.get_submodule(name)
        except AttributeError:
            found = None
        if not isinstance(found, Site) or found.key != key:
            now = "nothing" if found is None else f"a {type(found).__name__}"
            raise SwapError(f"unswap: {path}: at {name} there is {now} now, not the block of the swap: unwrap it first")
        on_meta = any(parameter.is_meta for parameter in found.parameters())
        if isinstance(found, Replacement) and not found.original_has_values and not on_meta:
            raise SwapError(f"unswap: {path}: the replaced module was not saved with this model: it has no weights")


def _check_apart(plan: Plan, later: Plan) -> None:
    """Raise ``SwapError`` if a later swap is at, in or around a module of ``plan``."""
    for path in plan.paths:
        for other in later.paths:
            if f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}."):
                raise SwapError(f"unswap: there is a later swap at {other}: undo it before the one at {path}")

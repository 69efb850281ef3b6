"""``compare``: several recipes on the same data, with equal parameters and tokens."""

from __future__ import annotations

import bisect
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...recipes import Recipe, build, load_recipe
from ...recipes.loading import Source as RecipeSource
from ...recipes.parse import recipe_error
from ...registry import Problem, RecipeError, lookup, nearest, show
from ..data import open_source
from .run_folder import expect_no_run, write_file
from .settings import Settings, as_settings
from .trials import Listener, Result, Trial, check_trial, run_trials

COMPARISON = "comparison.json"
METRICS = ("mse", "accuracy", "bits_per_byte", "loss")
"""The metric of a comparison is the first of these that the results have. Only for accuracy is larger better."""

DIAL = "ffn.hidden"
TOLERANCE = 0.01
"""Relative difference in parameters up to which models count as equal in size."""
LARGEST = 2**20


def compare(
    recipes: Mapping[str, RecipeSource],
    data: str | Mapping[str, Any],
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    parameters: int | Literal["first"] | None = "first",
    dial: str = DIAL,
    lrs: Sequence[float] = (),
    seeds: int = 1,
    jobs: int = 1,
    allow_imports: bool = False,
    told: Listener | None = None,
    on_fit: Callable[[str, int, dict[str, int]], None] | None = None,
) -> Result:
    """Train every recipe in its own folder under ``out``, and test it on a held-out split.

    Args:
        recipes: recipes by the name of each variant.
        settings: those of every run.
        parameters: how many each variant is fitted to, by changing the field ``dial`` of its blocks: a number,
            ``first`` (as many as the first recipe has), or ``None`` (recipes stay as they are).
        lrs: learning rates to try; each variant keeps the one with the lowest validation loss.
        seeds: runs of each variant, with seeds from ``settings.seed`` on.
        jobs: runs in parallel.
        told, on_fit: called with the events of the runs, and with the size of each variant.

    An interrupted comparison resumes, and finished runs are not repeated. The result is also written to
    ``out/comparison.json``: ``metric``, ``data``, ``settings``, and ``variants``, each with ``name``, ``parameters``,
    ``changes``, ``steps``, ``tokens``, ``lr``, ``seconds``, the means over the seeds ``test`` and ``frozen``, their
    ``spread`` (maximum minus minimum of ``test``), ``curve`` and all its ``runs``.
    """
    folder, settings = Path(out), as_settings(settings)
    expect_no_run(folder)
    _check(recipes, settings, lrs, seeds, jobs)
    loaded = {name: load_recipe(source, allow_imports=allow_imports) for name, source in recipes.items()}
    target = parameters_of(next(iter(loaded.values()))) if parameters == "first" else parameters
    fitted = {
        name: Fitted(recipe, parameters_of(recipe), {}) if target is None else fit(recipe, target, dial, name)
        for name, recipe in loaded.items()
    }
    description = open_source(data, rows=settings.batch, length=settings.length, seed=settings.seed).describe()
    if on_fit is not None:
        for name, variant in fitted.items():
            on_fit(name, variant.parameters, variant.changes)
    trials: dict[str, list[Trial]] = {name: [] for name in fitted}
    for name, variant in fitted.items():
        for lr in lrs or (settings.lr,):
            for seed in range(seeds):
                label = "/".join([name, *[f"lr-{lr!r}"] * bool(lrs), *[f"seed-{seed}"] * (seeds > 1)])
                changed = as_settings({**settings.to_dict(), "lr": lr, "seed": settings.seed + seed})
                trials[name].append(Trial(label, variant.recipe, data, changed, folder / label))
    in_order = [trial for group in trials.values() for trial in group]
    for trial in in_order:
        check_trial(trial)
    results = run_trials(in_order, jobs=jobs, told=told)
    variants = []
    for name, variant in fitted.items():
        runs = [{"lr": trial.settings.lr, "seed": trial.settings.seed, **next(results)} for trial in trials[name]]
        variants.append({"name": name, "parameters": variant.parameters, "changes": variant.changes, **_summary(runs)})
    # the accuracy of text is that of its most likely bytes, and says little
    metrics = METRICS if "task" in description else ("bits_per_byte", "loss")
    metric = next((m for m in metrics if any(m in (v["test"] or {}) for v in variants)), METRICS[-1])
    result = {"metric": metric, "data": description, "settings": settings.to_dict(), "variants": variants}
    write_file(folder / COMPARISON, json.dumps(result, indent=1) + "\n")
    return result


def _check(recipes: Mapping[str, Any], settings: Settings, lrs: Sequence[float], seeds: int, jobs: int) -> None:
    problems = [
        Problem(show(name), "expected a name that a folder can have")
        for name in recipes
        if not isinstance(name, str) or name in ("", ".", "..", COMPARISON) or "/" in name or os.sep in name
    ]
    if not recipes:
        problems.append(Problem("", "expected at least one recipe"))
    if seeds < 1 or jobs < 1:
        problems.append(Problem("", f"expected seeds and jobs >= 1, got {show(seeds)} and {show(jobs)}"))
    if len(lrs) > 1 and settings.valid_every is None:
        message = "expected a number: learning rates are compared by their validation loss"
        problems.append(Problem("valid_every", message))
    if problems:
        raise RecipeError(problems, "compare")


def _summary(runs: list[Result]) -> Result:
    """A variant's numbers: the means over the seeds, for the learning rate with the lowest validation loss."""
    complete: dict[float, list[Result]] = {}
    for lr in dict.fromkeys(run["lr"] for run in runs):
        group = [run for run in runs if run["lr"] == lr]
        if all("failed" not in run for run in group):
            complete[lr] = group
    if not complete:
        failed = next(run["failed"] for run in runs if "failed" in run)
        empty = dict.fromkeys(("lr", "steps", "tokens", "seconds", "test", "frozen", "spread", "curve"))
        return {**empty, "failed": failed, "runs": runs}
    # a single rate needs no validation
    best = min(complete, key=lambda lr: _mean(complete[lr], "valid")["loss"] if len(complete) > 1 else 0.0)
    kept = complete[best]
    tests = [run["test"] for run in kept]
    return {
        "lr": best,
        "steps": kept[0]["steps"],
        "tokens": kept[0]["tokens"],
        "seconds": statistics.mean(run["seconds"] for run in kept) if kept[0]["seconds"] else None,
        "test": _mean(kept, "test"),
        "frozen": _mean(kept, "frozen") if all(run["frozen"] for run in kept) else None,
        "spread": {key: max(t[key] for t in tests) - min(t[key] for t in tests) for key in tests[0]},
        "curve": [
            {key: statistics.mean(point[key] for point in points) for key in points[0] if all(key in p for p in points)}
            for points in zip(*(run["curve"] for run in kept))
        ],
        "runs": runs,
    }


def _mean(runs: list[Result], part: str) -> dict[str, float]:
    return {key: statistics.mean(run[part][key] for run in runs) for key in runs[0][part]}


# -- models of equal size ----------------------------------------------------------------------------------------------


class Fitted(NamedTuple):
    """A recipe, its number of parameters, and the values that were changed, by path."""

    recipe: Recipe
    parameters: int
    changes: dict[str, int]


def parameters_of(recipe: Recipe) -> int:
    """The number of parameters of a recipe's model, built on the meta device."""
    return sum(parameter.numel() for parameter in build(recipe, device="meta").parameters())


def fit(recipe: Recipe, target: int, dial: str = DIAL, name: str = "recipe") -> Fitted:
    """``recipe`` with about ``target`` parameters: ``dial``, BLOCK.FIELD, is set to one value in all such blocks.

    A recipe within ``TOLERANCE`` of the target is not changed. ``name``: the recipe's name in errors. Raises
    ``RecipeError`` if the recipe has no such block, or no value of the field gives that size.
    """
    kind, _, field = dial.partition(".")
    try:
        fields = list(lookup(kind).fields)
    except RecipeError as error:
        raise RecipeError(error.problems, "--fit") from None
    if field not in fields:
        message = f"expected BLOCK.FIELD with a field of {kind}, got {show(dial)}{nearest(field, fields)}"
        raise recipe_error("--fit", message)
    size = parameters_of(recipe)
    if _close(size, target):
        return Fitted(recipe, size, {})
    paths = [f"layers.{path}.{field}" for path in _blocks(recipe.layers, kind)]
    if not paths:
        message = f"has {size:,} parameters, not {target:,}, and no {kind} to fit: another --fit, or --parameters none"
        raise recipe_error(name, message)

    def with_value(value: int) -> Recipe:
        return load_recipe(recipe, dict.fromkeys(paths, value), allow_imports=True)

    def size_at(value: int) -> int:
        return parameters_of(with_value(value))

    # the size grows with the value: bisect to the last value below the target and the first above it
    high = 2
    while high < LARGEST and size_at(high) <= target:
        high *= 2
    values = range(high // 2, high + 1)
    above = bisect.bisect(values, target, key=size_at)
    sizes = {value: size_at(value) for value in values[max(above - 1, 0) : above + 1]}
    best = min(sizes, key=lambda value: abs(sizes[value] - target))
    if not _close(sizes[best], target):
        reach = f"at least {size_at(1):,}" if size_at(1) > target else f"{sizes[best]:,} at {dial} = {best}"
        message = f"cannot be fitted to {target:,} parameters with {dial}: it has {reach}; give other --parameters"
        raise recipe_error(name, message)
    return Fitted(with_value(best), sizes[best], dict.fromkeys(paths, best))


def _close(parameters: int, target: int) -> bool:
    return abs(parameters - target) <= TOLERANCE * target


def _blocks(given: Any, kind: str) -> Iterator[str]:
    """The paths of all blocks of a type, nested ones included."""
    if isinstance(given, dict) and given.get("type") == kind:
        yield ""
    inside = given.items() if isinstance(given, dict) else enumerate(given) if isinstance(given, list) else ()
    for key, value in inside:
        for path in _blocks(value, kind):
            yield f"{key}.{path}" if path else str(key)

"""``compare``: several recipes on the same data, with equal parameters and tokens."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...recipes import Recipe, load_recipe
from ...recipes.loading import Source as RecipeSource
from ...recipes.replacing import replacing
from ...registry import Problem, RecipeError, show
from ..data import open_source
from .fitting import DIAL, fit, parameters_of
from .folder import writing
from .settings import Settings, as_settings
from .side_by_side import Told, Trial
from .trials import check_trial, run_trials

COMPARISON = "comparison.json"
METRICS = ("accuracy", "bits_per_byte", "loss")
"""What a comparison is about: the first that there is. A larger accuracy is better, and a smaller one of the others."""

Result = dict[str, Any]


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
    told: Told | None = None,
    on_fit: Callable[[str, int, dict[str, int]], None] | None = None,
) -> Result:
    """Train every recipe in a folder of its own under ``out``, and measure it on rows nothing was chosen by.

    ``recipes``: by the names they are to have. ``settings``: those of every run. ``parameters``: how many each is
    fitted to, by the field ``dial`` of its blocks (``first``: as many as the first recipe has; ``None``: as they are).
    ``lrs``: learning rates, of which each recipe keeps the one with the least validation loss. ``seeds``: runs of
    each, from ``settings.seed`` on. ``jobs``: runs side by side. ``told`` and ``on_fit`` hear what happens.

    What was interrupted goes on where it was, and what is finished is not run again. The result is plain data, and is
    written to ``out/comparison.json``: ``metric``, ``data``, ``settings``, and ``variants``, each with its ``name``,
    ``parameters``, ``changes``, ``steps``, ``tokens``, ``lr``, ``seconds``, the ``test`` and ``frozen`` means over the
    seeds, their ``spread`` (largest less smallest, of ``test``), ``curve`` and all its ``runs``.
    """
    place, settings = Path(out), as_settings(settings)
    _check(recipes, settings, lrs, seeds, jobs)
    loaded = {name: load_recipe(source, allow_imports=allow_imports) for name, source in recipes.items()}
    fitted, changes = _same_size(loaded, parameters, dial)
    described = open_source(data, rows=settings.batch, length=settings.length, seed=settings.seed).describe()
    for name, recipe in fitted.items():
        if on_fit is not None:
            on_fit(name, parameters_of(recipe), changes[name])
    trials = {
        (name, lr, seed): Trial(
            "/".join((name, *parts)),
            recipe,
            data,
            _changed(settings, lr, settings.seed + seed),
            place.joinpath(name, *parts),
            allow_imports,
        )
        for name, recipe in fitted.items()
        for lr in lrs or (settings.lr,)
        for seed in range(seeds)
        for parts in [_parts(lr if lrs else None, seed if seeds > 1 else None)]
    }
    for trial in trials.values():
        check_trial(trial)
    runs = dict(zip(trials, run_trials(list(trials.values()), jobs=jobs, told=told)))
    variants = []
    for name, recipe in fitted.items():
        mine = [{"lr": lr, "seed": settings.seed + seed, **run} for (of, lr, seed), run in runs.items() if of == name]
        variants.append({"name": name, "parameters": parameters_of(recipe), "changes": changes[name], **_summary(mine)})
    metric = next((m for m in METRICS if any(m in (v["test"] or {}) for v in variants)), METRICS[-1])
    if metric == "accuracy" and "task" not in described:
        metric = next(m for m in METRICS[1:] if any(m in (v["test"] or {}) for v in variants))
    found = {"metric": metric, "data": described, "settings": settings.to_dict(), "variants": variants}
    place.mkdir(parents=True, exist_ok=True)
    with writing(place / COMPARISON), replacing(place / COMPARISON) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


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
        problems.append(
            Problem("valid_every", "the best of several rates is that of the least validation loss: expected a number")
        )
    if problems:
        raise RecipeError(problems, "compare")


def _same_size(
    recipes: dict[str, Recipe], parameters: int | Literal["first"] | None, dial: str
) -> tuple[dict[str, Recipe], dict[str, dict[str, int]]]:
    """The recipes, each with as many parameters as the others, and what was changed in each."""
    if parameters is None:
        return recipes, {name: {} for name in recipes}
    target = parameters_of(next(iter(recipes.values()))) if parameters == "first" else parameters
    fits = {name: fit(recipe, target, dial, name) for name, recipe in recipes.items()}
    return {name: each.recipe for name, each in fits.items()}, {name: each.changes for name, each in fits.items()}


def _changed(settings: Settings, lr: float, seed: int) -> Settings:
    return as_settings({**settings.to_dict(), "lr": lr, "seed": seed})


def _parts(lr: float | None, seed: int | None) -> list[str]:
    """The folder of one of a recipe's runs, below that of the recipe."""
    return [*([] if lr is None else [f"lr-{lr!r}"]), *([] if seed is None else [f"seed-{seed}"])]


def _summary(runs: list[Result]) -> Result:
    """A recipe's runs in a few numbers: those of the learning rate with the least validation loss."""
    good: dict[float, list[Result]] = {}
    for run in runs:
        good.setdefault(run["lr"], []).append(run)
    whole = {lr: group for lr, group in good.items() if all("failed" not in run for run in group)}
    if not whole:
        failed = next(run["failed"] for run in runs if "failed" in run)
        empty = dict.fromkeys(("lr", "steps", "tokens", "seconds", "test", "frozen", "spread", "curve"))
        return {**empty, "failed": failed, "runs": runs}
    best = min(whole, key=lambda lr: _mean(whole[lr], "valid")["loss"]) if len(whole) > 1 else next(iter(whole))
    kept = whole[best]
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

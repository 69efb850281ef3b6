"""``search``: which values of a recipe and of settings train best?"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.loading import Source as RecipeSource
from ...recipes.reading import write_yaml
from ...recipes.replacing import replacing
from ...registry import Problem, RecipeError, nearest, show
from ..extras import from_extra
from .settings import Settings, as_settings
from .side_by_side import Told, Trial
from .space import Choice, Range, Space, as_space
from .trials import check_trial, run_trials

Sampler = Literal["grid", "random", "optuna"]
SAMPLERS: tuple[Sampler, ...] = ("grid", "random", "optuna")
TRIALS, BEST_RECIPE, BEST_TRAIN = "trials.jsonl", "best-recipe.yaml", "best-train.yaml"
Result = dict[str, Any]


def search(
    recipe: RecipeSource,
    data: str | Mapping[str, Any],
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None,
    space: Space | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sampler: Sampler = "grid",
    trials: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    allow_imports: bool = False,
    told: Told | None = None,
) -> list[Result]:
    """Train with one choice of ``space`` after the other, each in a folder under ``out``; the best first.

    ``sampler``: ``grid`` (all combinations, or the first ``trials`` of them), ``random``, or ``optuna``'s, which learns
    from what came of the earlier ones. The best is that of the least validation loss. A result has ``trial``, its
    number, ``choice``, ``loss`` (``None`` where it came to nothing) and what ``run_trials`` says. All are in
    ``out/trials.jsonl``; ``best-recipe.yaml`` and ``best-train.yaml`` are what ``titans-train`` takes.

    Interrupted, it goes on where it was. With Optuna and several ``jobs``, as many choices are made at a time.
    """
    if sampler not in SAMPLERS:
        message = f"expected one of {', '.join(SAMPLERS)}, got {show(sampler)}{nearest(sampler, SAMPLERS)}"
        raise RecipeError([Problem("sampler", message)], "search")
    loaded = load_recipe(recipe, allow_imports=allow_imports)
    settings, place = as_settings(settings), Path(out)
    if settings.valid_every is None:
        raise RecipeError(
            [Problem("valid_every", "a search compares validation losses: expected a number")], "settings"
        )
    if jobs < 1 or (trials is not None and trials < 1):
        message = f"expected jobs and trials >= 1, got {show(jobs)} and {show(trials)}"
        raise RecipeError([Problem("", message)], "search")
    space = space if isinstance(space, Space) else as_space(space)
    chooser = _Chooser(space, sampler, trials, seed, jobs)
    results: list[Result] = []
    refused: list[RecipeError] = []
    while choices := chooser.next(results):
        wanted: list[Trial | str] = []
        for number, choice in enumerate(choices, len(results)):
            try:
                trial = _trial(loaded, data, settings, choice, place, number, allow_imports)
                check_trial(trial)
                wanted.append(trial)
            except RecipeError as error:
                if sampler != "optuna":
                    raise
                # it chooses while others have been run, and may put together what cannot be
                refused.append(error)
                wanted.append("; ".join(map(str, error.problems)))
        runs = run_trials([trial for trial in wanted if isinstance(trial, Trial)], jobs=jobs, told=told)
        for choice, made in zip(choices, wanted):
            found: Result = next(runs) if isinstance(made, Trial) else {"failed": made}
            loss = None if "failed" in found else found["valid"]["loss"]
            results.append({"trial": len(results), "choice": choice, "loss": loss, **found})
            _write(place / TRIALS, "".join(json.dumps(result) + "\n" for result in results))
    if refused and len(refused) == len(results):
        raise refused[0]
    ranked = sorted(results, key=lambda result: (result["loss"] is None, result["loss"] or 0.0))
    if ranked and ranked[0]["loss"] is not None:
        best = _trial(loaded, data, settings, ranked[0]["choice"], place, 0, allow_imports)
        _write(place / BEST_RECIPE, best.recipe.to_yaml())
        _write(place / BEST_TRAIN, write_yaml({"data": data, **best.settings.to_dict()}))
    return ranked


def _trial(
    recipe: Recipe, data: Any, settings: Settings, choice: Choice, place: Path, number: int, allow_imports: bool
) -> Trial:
    """The run of a choice. Raises ``RecipeError`` where a name of the space leads nowhere, or a value cannot be."""
    parts: dict[str, dict[str, Any]] = {"recipe": {}, "train": {}}
    for name, value in choice.items():
        part, _, path = name.partition(".")
        parts[part][path] = value
    changed = load_recipe(recipe, parts["recipe"], allow_imports=allow_imports) if parts["recipe"] else recipe
    label = f"trial-{number:04d}"
    return Trial(
        label, changed, data, as_settings({**settings.to_dict(), **parts["train"]}), place / label, allow_imports
    )


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as path:
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{file}: cannot be written: {error.strerror or error}") from error


class _Chooser:
    """Says what to try next, from the results so far alone: what is asked again says the same."""

    def __init__(self, space: Space, sampler: Sampler, trials: int | None, seed: int, jobs: int) -> None:
        self._space, self._sampler, self._seed, self._jobs = space, sampler, seed, jobs
        grid = list(space.grid()) if sampler == "grid" else []
        self._grid = grid[:trials]
        if trials is None and sampler != "grid":
            raise RecipeError([Problem("trials", f"expected how many, for {sampler}")], "search")
        self._count = len(self._grid) if sampler == "grid" else trials or 0
        self._optuna = from_extra("optuna", "train", "--sampler optuna") if sampler == "optuna" else None

    def next(self, results: list[Result]) -> list[Choice]:
        """Choices that can be tried side by side; none at the end."""
        first = len(results)
        if self._sampler == "grid":
            return self._grid[first:]
        if self._sampler == "random":
            return [self._space.draw(self._seed, number) for number in range(first, self._count)]
        return self._ask(results, min(self._jobs, self._count - first))

    def _ask(self, results: list[Result], count: int) -> list[Choice]:
        """A study that knows the results, asked for ``count`` more."""
        optuna: Any = self._optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # no state but the results: a search that goes on makes the choices that it would have made
        seed = random.Random(f"{self._seed} {len(results)}").getrandbits(32)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=count > 1)
        study = optuna.create_study(sampler=sampler)
        kinds = {name: self._kind(of) for name, of in self._space.of.items()}
        for result in results:
            failed = result["loss"] is None
            state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
            values = {name: self._inside(name, value) for name, value in result["choice"].items()}
            study.add_trial(
                optuna.trial.create_trial(state=state, params=values, distributions=kinds, value=result["loss"])
            )
        asked = [study.ask(kinds).params for _ in range(count)]
        return [{name: self._outside(name, value) for name, value in params.items()} for params in asked]

    def _kind(self, of: list[Any] | Range) -> Any:
        distributions = self._optuna.distributions  # type: ignore[union-attr]
        if not isinstance(of, Range):
            # Optuna's categories are plain values: those of ours may be lists
            return distributions.CategoricalDistribution(range(len(of)))
        if of.whole:
            return distributions.IntDistribution(of.low, of.high, log=of.log, step=of.step or 1)
        return distributions.FloatDistribution(of.low, of.high, log=of.log, step=of.step)

    def _inside(self, name: str, value: Any) -> Any:
        of = self._space.of[name]
        return value if isinstance(of, Range) else of.index(value)

    def _outside(self, name: str, value: Any) -> Any:
        of = self._space.of[name]
        return value if isinstance(of, Range) else of[value]

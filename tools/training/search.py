"""``search``: find the values of a recipe and of settings that train best."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.loading import Source as RecipeSource
from ...recipes.parse import plain, read_file, recipe_error, write_yaml
from ...registry import Problem, RecipeError, check_settings, fields_of, nearest, show
from ..extras import from_extra
from .run_folder import expect_no_run, write_file
from .settings import Settings, as_settings
from .trials import Listener, Result, Trial, check_trial, run_trials

Sampler = Literal["grid", "random", "optuna"]
SAMPLERS: tuple[Sampler, ...] = ("grid", "random", "optuna")
TRIALS, BEST_RECIPE, BEST_TRAIN = "trials.jsonl", "best-recipe.yaml", "best-train.yaml"

PARTS = ("recipe", "train")
Choice = dict[str, Any]
"""Values by name: ``train.lr``, ``recipe.layers.lmm.0.max_step``."""


Space = dict[str, "list[Any] | Range"]
"""A list of values or a range for each name."""


@dataclass(kw_only=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; uniform in their logarithm, or only ``low + n * step``."""

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float | None, Field(gt=0)] = None

    @property
    def integer(self) -> bool:
        """Whether the numbers are integers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    def steps(self) -> list[float]:
        """All numbers of a range with a step."""
        assert self.step is not None
        return [self.low + n * self.step for n in range(math.floor((self.high - self.low) / self.step + 1e-9) + 1)]

    def sample(self, share: float) -> float:
        """The number at ``share``, from 0 to under 1, of the range."""
        if self.step is not None:
            steps = self.steps()
            return steps[math.floor(share * len(steps))]
        if self.integer and not self.log:
            return int(self.low + math.floor(share * (self.high - self.low + 1)))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return round(value) if self.integer else float(f"{value:.4g}")


def read_space(given: Mapping[str, Any] | str | os.PathLike[str]) -> Space:
    """A space from a mapping or a YAML file::

        recipe:
          layers.lmm.0.max_step: {low: 0.1, high: 10.0, log: true}
          layers.lmm.0.chunk: [16, 32, 64]
        train:
          lr: [1e-3, 3e-3]

    Raises ``RecipeError`` with every problem.
    """
    source = "space"
    if isinstance(given, (str, os.PathLike)):
        source, given = str(given), read_file(given)
    data = plain(given, source)
    if not isinstance(data, dict):
        raise recipe_error(source, f"expected a mapping with recipe or train, got {show(data)}")
    problems = [
        Problem(str(key), f"unknown; expected recipe or train{nearest(key, PARTS)}") for key in data if key not in PARTS
    ]
    found: Space = {}
    for part in PARTS:
        values = data.get(part) or {}
        if not isinstance(values, dict):
            problems.append(Problem(part, f"expected a mapping of names to values, got {show(values)}"))
            continue
        for name, of in values.items():
            path = f"{part}.{name}"
            if isinstance(of, list) and of:
                found[path] = of
            elif isinstance(of, dict):
                try:
                    chosen = Range(**check_settings("range", fields_of(Range, None), of, path))
                except RecipeError as error:
                    problems += error.problems
                    continue
                if chosen.low >= chosen.high:
                    message = f"expected low under high, got {show(chosen.low)} and {show(chosen.high)}"
                    problems.append(Problem(path, message))
                if chosen.log and (chosen.low <= 0 or chosen.step is not None):
                    problems.append(Problem(path, "log: expected low > 0, and no step"))
                found[path] = chosen
            else:
                problems.append(Problem(path, f"expected a list of values, or low and high, got {show(of)}"))
    if not found and not problems:
        problems.append(Problem("", "expected at least one value to search"))
    if problems:
        raise RecipeError(problems, source)
    return found


# -- the search --------------------------------------------------------------------------------------------------------


def search(
    recipe: RecipeSource,
    data: str | Mapping[str, Any],
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None,
    space: Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sampler: Sampler = "grid",
    trials: int | None = None,
    seed: int = 0,
    jobs: int = 1,
    allow_imports: bool = False,
    told: Listener | None = None,
) -> list[Result]:
    """Train with choices of ``space``, each in a folder under ``out``. Returns the results, the best first.

    ``sampler``: ``grid`` (all combinations, or the first ``trials`` of them), ``random``, or ``optuna``, which learns
    from earlier results. The best has the lowest validation loss. A result has ``trial``, its number, ``choice``,
    ``loss`` (``None`` if it failed) and what ``run_trials`` yields. All are in ``out/trials.jsonl``;
    ``best-recipe.yaml`` and ``best-train.yaml`` are inputs for ``titans-train``.

    An interrupted search resumes. With Optuna and several ``jobs``, that many choices are made at a time.
    """
    if sampler not in SAMPLERS:
        message = f"expected one of {', '.join(SAMPLERS)}, got {show(sampler)}{nearest(sampler, SAMPLERS)}"
        raise RecipeError([Problem("sampler", message)], "search")
    loaded = load_recipe(recipe, allow_imports=allow_imports)
    settings, folder = as_settings(settings), Path(out)
    expect_no_run(folder)
    if settings.valid_every is None:
        message = "expected a number: trials are compared by their validation loss"
        raise RecipeError([Problem("valid_every", message)], "settings")
    if jobs < 1 or (trials is not None and trials < 1):
        raise recipe_error("search", f"expected jobs and trials >= 1, got {show(jobs)} and {show(trials)}")
    space = read_space(space)
    trial_of = functools.partial(make_trial, loaded, data, settings, folder, allow_imports)
    results: list[Result] = []
    refused: list[RecipeError] = []
    while choices := choose(space, sampler, trials, seed, jobs, results):
        planned: list[Trial | str] = []
        for number, choice in enumerate(choices, len(results)):
            try:
                trial = trial_of(choice, number)
                check_trial(trial)
                planned.append(trial)
            except RecipeError as error:
                if sampler != "optuna":
                    raise
                # its choices come up during the search, and may combine values that do not go together
                refused.append(error)
                planned.append("; ".join(map(str, error.problems)))
        runs = run_trials([trial for trial in planned if isinstance(trial, Trial)], jobs=jobs, told=told)
        for choice, plan in zip(choices, planned):
            result: Result = next(runs) if isinstance(plan, Trial) else {"failed": plan}
            loss = None if "failed" in result else result["valid"]["loss"]
            results.append({"trial": len(results), "choice": choice, "loss": loss, **result})
            lines = "".join(json.dumps(each) + "\n" for each in results)
            write_file(folder / TRIALS, lines, StorageError)
    if refused and len(refused) == len(results):
        raise refused[0]
    ranked = sorted(results, key=lambda result: (result["loss"] is None, result["loss"] or 0.0))
    if ranked and ranked[0]["loss"] is not None:
        best = trial_of(ranked[0]["choice"], 0)
        write_file(folder / BEST_RECIPE, best.recipe.to_yaml(), StorageError)
        write_file(folder / BEST_TRAIN, write_yaml({"data": data, **best.settings.to_dict()}), StorageError)
    return ranked


def make_trial(
    recipe: Recipe, data: Any, settings: Settings, folder: Path, allow_imports: bool, choice: Choice, number: int
) -> Trial:
    """The trial of a choice. Raises ``RecipeError`` for a name that does not exist or an invalid value."""
    parts: dict[str, dict[str, Any]] = {"recipe": {}, "train": {}}
    for name, value in choice.items():
        part, _, path = name.partition(".")
        parts[part][path] = value
    changed = load_recipe(recipe, parts["recipe"], allow_imports=allow_imports) if parts["recipe"] else recipe
    label = f"trial-{number:04d}"
    settings = as_settings({**settings.to_dict(), **parts["train"]})
    return Trial(label, changed, data, settings, folder / label)


def choose(
    space: Space, sampler: Sampler, trials: int | None, seed: int, jobs: int, results: Sequence[Result]
) -> list[Choice]:
    """The next choices, which can run in parallel; none at the end.

    They depend on the results so far and on nothing else: a resumed search repeats its choices.
    """
    done = len(results)
    if sampler == "grid":
        return grid(space)[done:trials]
    if trials is None:
        raise RecipeError([Problem("trials", f"expected a number of trials for {sampler}")], "search")
    if sampler == "random":
        return [draw(space, seed, number) for number in range(done, trials)]
    return _ask_optuna(space, seed, results, min(jobs, trials - done))


def grid(space: Space) -> list[Choice]:
    """All combinations; the last name changes fastest. Raises ``RecipeError`` for a range without a step."""
    values = []
    for name, of in space.items():
        if isinstance(of, Range):
            if of.step is None:
                message = "a grid needs a list of values, or a step: a range is for --sampler random or optuna"
                raise RecipeError([Problem(name, message)], "space")
            of = of.steps()
        values.append(of)
    return [dict(zip(space, chosen)) for chosen in itertools.product(*values)]


def draw(space: Space, seed: int, number: int) -> Choice:
    """Choice ``number`` of a random search, a function of ``seed`` and ``number`` alone."""
    generator = random.Random(f"{seed} {number}")
    return {
        name: of.sample(generator.random()) if isinstance(of, Range) else generator.choice(of)
        for name, of in space.items()
    }


def _ask_optuna(space: Space, seed: int, results: Sequence[Result], count: int) -> list[Choice]:
    """Tell a new study all results, and ask it for ``count`` choices."""
    optuna = from_extra("optuna", "train", "--sampler optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = random.Random(f"{seed} {len(results)}").getrandbits(32)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=count > 1))
    distributions: dict[str, Any] = {}
    for name, of in space.items():
        if not isinstance(of, Range):
            # indices, as Optuna's categories must be plain values and ours may be lists
            distributions[name] = optuna.distributions.CategoricalDistribution(range(len(of)))
        elif of.integer:
            step = of.step or 1
            distributions[name] = optuna.distributions.IntDistribution(of.low, of.high, log=of.log, step=step)
        else:
            distributions[name] = optuna.distributions.FloatDistribution(of.low, of.high, log=of.log, step=of.step)
    lists = {name: of for name, of in space.items() if not isinstance(of, Range)}
    for result in results:
        params = {name: lists[name].index(v) if name in lists else v for name, v in result["choice"].items()}
        state = optuna.trial.TrialState.FAIL if result["loss"] is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(state=state, params=params, distributions=distributions, value=result["loss"])
        )
    asked = [study.ask(distributions).params for _ in range(count)]
    return [{name: lists[name][v] if name in lists else v for name, v in params.items()} for params in asked]

"""The interface of a generated task, and the catalogue of tasks by name."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...registry import Catalogue, Problem, RecipeError, check_settings
from ..randomness import Draws, Integers

IGNORED = -100
"""The target of a position that does not count."""

Class = TypeVar("Class", bound=type)


class Rows(NamedTuple):
    """Rows as NumPy arrays, both [rows, time]. Targets are the following tokens where those can be known, or -100."""

    tokens: Integers
    targets: Integers


class Task(abc.ABC):
    """Rows made by a rule. A subclass has a constructor of typed keyword fields, ``rows`` and ``references``.

    The built-in tasks are dataclasses, whose fields are the constructor's.
    """

    vocab: int
    """Tokens are from 0 to ``vocab - 1``."""
    length: int
    """Tokens of a row."""
    token_values: NDArray[np.float64] | None = None
    """[vocab] the number that each token stands for, for a task that predicts numbers."""

    @abc.abstractmethod
    def rows(self, draws: Draws) -> Rows:
        """One row for each of ``draws.rows``, decided by nothing but ``draws``."""

    @abc.abstractmethod
    def references(self) -> dict[str, float]:
        """Accuracy of predictors that do not solve the task, by what they do instead."""

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        """Positions ``start`` to ``stop`` of the rows. A task with very long rows makes only these."""
        return Rows(*(part[:, start:stop] for part in self.rows(draws)))

    def accepted(self, draws: Draws) -> NDArray[np.bool_] | None:
        """[rows, time, vocab] whether a token counts as right, for a task with several right answers."""
        return None

    def of_split(self, split: str) -> Task:
        """The task that makes the rows of a split, where more than the draws tells the splits apart."""
        return self

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """``(field, message)`` for each problem between fields that are valid by themselves."""
        return ()


ENTRY_POINT_GROUP = "titans_build.tasks"
TASKS = Catalogue("task", ENTRY_POINT_GROUP, methods=("rows", "piece", "references", "problems"), lead=None)


def register_task(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Register a subclass of ``Task`` as data of this name. Its constructor's signature is its schema.

    Raises ``ValueError`` if the name is taken, unless ``replace=True``, and ``TypeError`` if the class is no task or
    its signature is no schema.
    """
    return TASKS.register(name, replace=replace)


def list_tasks(pattern: str = "*") -> list[str]:
    """Names of tasks that match a wildcard pattern. Installed packages are not imported."""
    return TASKS.names(pattern)


def make_task(name: str, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The task of a name, and the values of all its fields. Raises ``RecipeError`` with every problem."""
    entry = TASKS.lookup(name)
    values = check_settings(name, entry.fields, fields)
    problems = [Problem(field, message) for field, message in entry.cls.problems(values)]  # type: ignore[attr-defined]
    if problems:
        raise RecipeError(problems, name)
    try:
        return entry.cls(**values), values
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError([Problem("", str(error))], name) from error


def scratch() -> contextlib.AbstractContextManager[None]:
    """Forget the tasks registered in the ``with`` block when it ends. For tests and notebooks."""
    return TASKS.scratch()

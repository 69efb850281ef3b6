"""What a generated task is, and the catalogue of tasks by name."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from ...registry import Catalogue, FieldDescription, Problem, RecipeError, check_settings, describe
from ..randomness import Draws, Integers

IGNORED = -100
"""The target of a position at which nothing counts."""

Class = TypeVar("Class", bound=type)


class Rows(NamedTuple):
    """Rows as a task makes them, before they are tensors."""

    tokens: Integers
    """[rows, time]"""
    targets: Integers
    """[rows, time]: what follows each token where it can be known, ``IGNORED`` elsewhere."""


class Task(abc.ABC):
    """Rows made by a rule. A subclass has a constructor of typed keyword fields, ``rows`` and ``references``.

    A class method ``problems(fields)`` may yield ``(field, message)`` for what one field's type cannot say.
    """

    vocab: int
    """Tokens are from 0 to ``vocab - 1``."""
    length: int
    """Tokens of a row."""

    @abc.abstractmethod
    def rows(self, draws: Draws) -> Rows:
        """One row for each of ``draws.rows``; nothing but ``draws`` may decide what is in it."""

    @abc.abstractmethod
    def references(self) -> dict[str, float]:
        """What predictors that do not do the task get right, per counted token, by what they do instead."""

    def piece(self, draws: Draws, start: int, stop: int) -> Rows:
        """Positions ``start`` to ``stop`` of the rows. Tasks whose rows may be very long make no more than that."""
        return Rows(*(part[:, start:stop] for part in self.rows(draws)))

    @classmethod
    def problems(cls, fields: dict[str, Any]) -> Iterable[tuple[str, str]]:
        """What is wrong between fields that are each right by themselves."""
        return ()


ENTRY_POINT_GROUP = "titans_build.tasks"
TASKS = Catalogue("task", ENTRY_POINT_GROUP, methods=("rows", "piece", "references", "problems"), lead=None)


def register_task(name: str, *, replace: bool = False) -> Callable[[Class], Class]:
    """Make a subclass of ``Task`` available as data by this name. Its constructor's signature is its schema.

    Raises ``ValueError`` when the name is taken (both places are named) unless ``replace=True``, and ``TypeError``
    when the class is no task or its signature is no schema.
    """
    return TASKS.register(name, replace=replace)


def list_tasks(pattern: str = "*") -> list[str]:
    """Names of tasks that match a wildcard pattern. Installed packages are not imported."""
    return TASKS.names(pattern)


def make_task(name: str, fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The task of a name and the values of all its fields. Raises ``RecipeError`` with all that is wrong."""
    entry = TASKS.lookup(name)
    values = check_settings(name, entry.fields, fields)
    wrong = [Problem(field, message) for field, message in entry.cls.problems(values)]  # type: ignore[attr-defined]
    if wrong:
        raise RecipeError(wrong, name)
    try:
        return entry.cls(**values), values
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError([Problem("", str(error))], name) from error


class TaskRow(NamedTuple):
    """One line of a listing of tasks."""

    name: str
    summary: str
    fields: list[FieldDescription]
    source: str
    """The package it comes from."""
    problem: str | None
    """What stops an installed task from being used; its fields are not known then."""


def task_rows(pattern: str = "*") -> list[TaskRow]:
    """The listing for a person, with each task's fields, their types, defaults and meaning."""
    rows = []
    for row in TASKS.rows(pattern):
        fields = describe(row.name, TASKS).fields if row.problem is None else []
        rows.append(TaskRow(row.name, row.summary, fields, row.source, row.problem))
    return rows


def scratch() -> contextlib.AbstractContextManager[None]:
    """Forget, at the end of the ``with`` block, every task registered inside it. For tests and notebooks."""
    return TASKS.scratch()

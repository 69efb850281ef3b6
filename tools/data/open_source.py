"""``open_source``: from a specification of data, as on a command line or in a file, to a source of batches."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field as Described

from ...recipes.parse import read_value, recipe_error
from ...registry import Field, Problem, RecipeError, check_settings, fields_of, nearest, show
from ..randomness import Draws, key_of, shuffled
from ..tasks import TASKS, Rows, Task, list_tasks, make_task
from .source import SPLITS, Batch, Share, Source, Split, share_of
from .text import NAMED, Text

MAX_LENGTH = 2**31
"""Tokens of a row."""


def open_source(
    spec: str | Sequence[str] | Mapping[str, Any],
    *,
    rows: int,
    length: int | None = None,
    split: Split = "train",
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    vocab: int | None = None,
) -> Source:
    """A source of batches.

    Args:
        spec: a task (``mqar``, ``mqar:pairs=8,length=64``, ``{task: mqar, pairs: 8}``) or text: a file, a folder, a
            wildcard, several of these, ``stdlib``, or a mapping ``{text: 'src/**/*.py', documents: ordered, ...}``
            with the fields of ``Text``, which may also be given as YAML text. Tasks also have a field ``examples``, the
            number of different training rows.
        rows: rows of a batch, over all processes.
        length: tokens of a row; by default what ``spec`` says.
        split: train, valid and test share no example.
        part: (rank, world) of this process.
        vocab: the model's, which the source's must not exceed.

    Raises ``RecipeError`` for data that cannot be opened.
    """
    if split not in SPLITS:
        problem = Problem("split", f"expected one of {', '.join(SPLITS)}, got {show(split)}{nearest(split, SPLITS)}")
        raise RecipeError([problem], "data")
    share = share_of(rows, part)
    settings = as_mapping(spec)
    if length is not None:
        settings["length"] = length
    source: Source
    if "task" in settings:
        source = _open_task(settings, share, split, seed)
    else:
        source = Text(**check_settings("text", fields_of(Text, None), settings)).open(share, split, seed)
    if vocab is not None and source.vocab > vocab:
        message = f"the data has {source.vocab} tokens, the model only {vocab}: give the recipe `vocab: {source.vocab}`"
        raise RecipeError([Problem("vocab", message)], "data")
    return source


def as_mapping(spec: Any) -> dict[str, Any]:
    """The specification as a mapping with either ``task`` or ``text``."""
    if isinstance(spec, Mapping):
        settings = dict(spec)
        kinds = ["task", "text"]
        given = settings.keys() & set(kinds)
        if len(given) != 1:
            near = "" if given else next((near for key in settings if (near := nearest(key, kinds))), "")
            raise recipe_error("data", f"expected either a task or a text, got {show(settings)}{near}")
        if "task" in settings and not isinstance(settings["task"], str):
            raise RecipeError([Problem("task", f"expected a name, got {show(settings['task'])}")], "data")
        return settings
    if isinstance(spec, (list, tuple)):
        return {"text": list(spec)}
    if not isinstance(spec, (str, os.PathLike)):
        raise recipe_error("data", f"expected a task, a path or a mapping, got {show(spec)}")
    text = os.fspath(spec)
    if text.lstrip().startswith("{"):
        return as_mapping(read_value(text))
    name, _, fields = text.partition(":")
    for kind, names in (("task", TASKS.known_names()), ("text", NAMED)):
        if name in names and isinstance(spec, str):
            return {kind: name, **_parse_fields(fields)}
    if os.path.lexists(os.path.expanduser(text)) or glob.has_magic(text) or "/" in text or os.sep in text:
        return {"text": text}
    here = [*list_tasks(), *NAMED, *sorted(os.listdir())]
    raise recipe_error("data", f"{show(text)} is no task and no file{nearest(name, here)}")


def with_tokenizer(spec: Any, tokenizer: str) -> dict[str, Any]:
    """A specification of text with this tokenizer, or ``"bytes"``. Raises ``RecipeError`` for that of a task."""
    settings = as_mapping(spec)
    if "task" in settings:
        message = f"the tokens of {settings['task']} are numbers, and need no tokenizer"
        raise RecipeError([Problem("tokenizer", message)], "data")
    return {**settings, "tokenizer": tokenizer}


def _parse_fields(text: str) -> dict[str, Any]:
    """``"pairs=8,depth=0.5"`` -> ``{"pairs": 8, "depth": 0.5}``; a comma without NAME= after it belongs to a value."""
    found: dict[str, Any] = {}
    for setting in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text) if text else []:
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise recipe_error("data", f"expected NAME=VALUE, as in mqar:pairs=8, got {show(setting)}")
        if name in found:
            raise RecipeError([Problem(name, "given twice")], "data")
        found[name] = read_value(value)
    return found


# -- tasks -------------------------------------------------------------------------------------------------------------


EXAMPLES = Annotated[int | None, Described(ge=1, description="different training rows; null for no end")]
"""A field of every task besides its own."""


def _open_task(spec: dict[str, Any], share: Share, split: Split, seed: int) -> TaskSource:
    name, examples = spec.pop("task"), spec.pop("examples", None)
    check_settings(name, {"examples": Field("examples", EXAMPLES, None)}, {"examples": examples})
    task, fields = make_task(name, spec)
    return TaskSource(name, task, fields, share=share, split=split, seed=seed, examples=examples)


class TaskSource(Source):
    """Rows of a task. Row ``r`` of batch ``i`` is row ``i * rows + r`` of an endless series, whatever the batch size.

    Each split and each seed is a series of its own. With ``examples``, training has that many different rows, in
    another order in each epoch; the other splits stay endless.
    """

    carries = False

    def __init__(
        self,
        name: str,
        task: Task,
        fields: dict[str, Any],
        *,
        share: Share,
        split: Split,
        seed: int,
        examples: int | None,
    ) -> None:
        self.task = task = task.of_split(split)
        self.token_values = None if task.token_values is None else torch.from_numpy(task.token_values)
        self.vocab, self.length = task.vocab, task.length
        self.examples = examples if split == "train" else None
        self.batches = None if self.examples is None else -(-self.examples // share.of)
        self._name, self._fields, self._share, self._split, self._seed = name, fields, share, split, seed
        self._key = key_of("task", name, split, seed)
        for attribute, value in (("vocab", self.vocab), ("length", self.length)):
            if not isinstance(value, int) or not 1 <= value <= MAX_LENGTH:
                message = f"expected the task to have an integer from 1 to 2**31, got {show(value)}"
                raise RecipeError([Problem(attribute, message)], name)

    def batch(self, index: int) -> Batch:
        """Whole rows, all of them fresh."""
        draws = self._draws(index)
        batch = self._batch(self.task.rows(draws), 0, self.length)
        accepted = self.task.accepted(draws) if self._split != "train" else None
        return batch if accepted is None else batch._replace(accepted=torch.from_numpy(accepted))

    def stream(self, index: int, piece: int) -> Iterator[Batch]:
        """``batch(index)`` in pieces of ``piece`` tokens, between which the state is carried; the first is ``fresh``.

        The needle tasks make one piece at a time, so rows of millions of tokens take no more memory than a piece.
        """
        if isinstance(piece, bool) or not isinstance(piece, int) or piece < 1:
            raise ValueError(f"piece: expected integer >= 1, got {show(piece)}")
        draws = self._draws(index)
        for start in range(0, self.length, piece):
            stop = min(start + piece, self.length)
            yield self._batch(self.task.piece(draws, start, stop), start, stop)

    def describe(self) -> dict[str, Any]:
        """The task, its fields, and the accuracy of predictors that do not solve it."""
        return {
            "task": self._name,
            "fields": self._fields,
            "vocab": self.vocab,
            "length": self.length,
            "rows": self._share.of,
            "split": self._split,
            "seed": self._seed,
            "examples": self.examples,
            "references": self.task.references(),
        }

    def _draws(self, index: int) -> Draws:
        numbers = self._share.numbers(index)
        return Draws(self._key, numbers if self.examples is None else shuffled(self._key, numbers, self.examples))

    def _batch(self, rows: Rows, start: int, stop: int) -> Batch:
        tokens, targets = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in rows)
        expected = (self._share.rows, stop - start)
        if tokens.shape != expected or targets.shape != expected:
            got = f"{tuple(tokens.shape)} and {tuple(targets.shape)}"
            raise ValueError(f"the task {self._name!r} made tokens and targets of {got}, expected {expected}")
        return Batch(tokens, targets, None, torch.full((expected[0],), start == 0))

"""From what a user says about data, on the command line or in a file, to a source of it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from ...recipes.parse import read_value
from ...registry import Problem, RecipeError, check_settings, fields_of, nearest, show
from ..tasks import TASKS, list_tasks, make_task
from .generated import Generated
from .source import SPLITS, Share, Source, Split, share_of
from .text import NAMED, Text


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

    ``spec``: a task (``mqar``, ``mqar:pairs=8,length=64``, ``{task: mqar, pairs: 8}``) or text: a file, a folder, a
    wildcard, several of these, ``stdlib``, or a mapping ``{text: 'src/**/*.py', documents: ordered, ...}`` whose fields
    are those of ``Text``. A task's rows have besides its own field ``examples``: how many different ones to train on.
    ``rows``: of a batch, all processes together. ``length``: tokens of a row; by default what ``spec`` says.
    ``split``: train, valid and test share no example. ``part``: this process and how many there are.
    ``vocab``: that of the model, which the source's must not exceed.

    Raises ``RecipeError`` with what cannot be had and why.
    """
    if split not in SPLITS:
        problem = Problem("split", f"expected one of {', '.join(SPLITS)}, got {show(split)}{nearest(split, SPLITS)}")
        raise RecipeError([problem], "data")
    share = share_of(rows, part)
    settings = _as_mapping(spec)
    if length is not None:
        settings["length"] = length
    source: Source
    if "task" in settings:
        source = _generated(settings, share, split, seed)
    else:
        source = _text(settings).open(share, split, seed)
    if vocab is not None and source.vocab > vocab:
        message = f"the data has {source.vocab} tokens, the model only {vocab}: give the recipe `vocab: {source.vocab}`"
        raise RecipeError([Problem("vocab", message)], "data")
    return source


def _as_mapping(spec: Any) -> dict[str, Any]:
    """Settings with a ``task`` or a ``text`` among them."""
    if isinstance(spec, Mapping):
        settings = dict(spec)
        kinds = ["task", "text"]
        said = settings.keys() & set(kinds)
        if len(said) != 1:
            near = "" if said else next((near for key in settings if (near := nearest(key, kinds))), "")
            raise RecipeError([Problem("", f"expected either a task or a text, got {show(settings)}{near}")], "data")
        if "task" in settings and not isinstance(settings["task"], str):
            raise RecipeError([Problem("task", f"expected a name, got {show(settings['task'])}")], "data")
        return settings
    if isinstance(spec, (list, tuple)):
        return {"text": list(spec)}
    if not isinstance(spec, (str, os.PathLike)):
        raise RecipeError([Problem("", f"expected a task, a path or a mapping, got {show(spec)}")], "data")
    text = os.fspath(spec)
    name, _, settings_text = text.partition(":")
    for kind, names in (("task", TASKS.known_names()), ("text", NAMED)):
        if name in names and isinstance(spec, str):
            return {kind: name, **_settings(settings_text)}
    if os.path.lexists(os.path.expanduser(text)) or glob.has_magic(text) or "/" in text or os.sep in text:
        return {"text": text}
    here = [*list_tasks(), *NAMED, *sorted(os.listdir())]
    raise RecipeError([Problem("", f"{show(text)} is no task and no file{nearest(name, here)}")], "data")


def _settings(text: str) -> dict[str, Any]:
    """``"pairs=8,depth=0.5"`` -> ``{"pairs": 8, "depth": 0.5}``; a comma that no name follows belongs to a value."""
    found: dict[str, Any] = {}
    for setting in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text) if text else []:
        name, equals, value = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise RecipeError([Problem("", f"expected NAME=VALUE, as in mqar:pairs=8, got {show(setting)}")], "data")
        if name in found:
            raise RecipeError([Problem(name, "given twice")], "data")
        found[name] = read_value(value)
    return found


class _Common:
    """What every task takes beside its own fields."""

    def __init__(
        self,
        *,
        examples: Annotated[int | None, Field(ge=1, description="different training rows; null for no end")] = None,
    ) -> None:
        self.examples = examples


def _text(settings: dict[str, Any]) -> Text:
    values = check_settings("text", fields_of(Text, None), settings)
    wrong = [Problem(field, message) for field, message in Text.problems(values)]
    if wrong:
        raise RecipeError(wrong, "text")
    return Text(**values)


def _generated(spec: dict[str, Any], share: Share, split: Split, seed: int) -> Generated:
    name = spec.pop("task")
    common = {key: spec.pop(key) for key in list(spec) if key in fields_of(_Common, None)}
    examples = check_settings(name, fields_of(_Common, None), common)["examples"]
    task, fields = make_task(name, spec)
    return Generated(name, task, fields, share=share, split=split, seed=seed, examples=examples)

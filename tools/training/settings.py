"""How a model is trained: every setting with its type, default and meaning, checked as strictly as a recipe is."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic import Field as Described

from ...recipes.reading import plain, read_file, write_yaml
from ...registry import Field, Problem, RecipeError, check_settings, join, show


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Stage(_Checked):
    """A part of the run in which some of the parameters train. Each has a learning-rate schedule of its own."""

    steps: Annotated[int, Described(ge=1, description="how long it is")]
    train: Annotated[
        list[str],
        Described(min_length=1, description="which parameters: patterns of their names, @type of block, ! for not"),
    ]
    lr: Annotated[float | None, Described(gt=0, description="largest learning rate; null for the run's")] = None
    optimizer: Annotated[
        Literal["keep", "fresh"], Described(description="go on with the optimizer's state, or start it anew")
    ] = "keep"


class Settings(_Checked):
    """Everything about a run but the recipe and the data. Made by ``as_settings``."""

    steps: Annotated[
        int, Described(ge=1, description="updates of the parameters; of all stages, where there are some")
    ] = 1000
    batch: Annotated[int, Described(ge=1, description="rows of a step, in all processes together")] = 16
    length: Annotated[int | None, Described(ge=1, description="tokens of a row; null for what the data says")] = None
    accumulate: Annotated[
        int, Described(ge=1, description="parts in which a process takes its rows; the same gradients, less memory")
    ] = 1
    carry: Annotated[
        Literal["off", "detach"] | Annotated[int, Described(ge=1)],
        Described(
            description="where rows go on from batch to batch: start each anew (off), keep the state and cut its "
            "gradients (detach), or read N batches in a step with gradients through the state between them"
        ),
    ] = "detach"
    seed: Annotated[int, Described(ge=0, lt=2**63, description="of the weights, and of the data's order")] = 0
    device: Annotated[str, Described(description="cpu, cuda, ...")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], Described(description="of the parameters")] = "float32"
    autocast: Annotated[
        Literal["bfloat16"] | None, Described(description="compute in it where that is safe; null for dtype")
    ] = None
    recompute: Annotated[
        bool, Described(description="keep only the layers' inputs, and compute the rest again for backward")
    ] = False
    compile: Annotated[bool, Described(description="torch.compile the model")] = False

    lr: Annotated[float, Described(gt=0, description="largest learning rate")] = 1e-3
    warmup: Annotated[float, Described(ge=0, lt=1, description="share of the steps in which the rate rises to it")] = (
        0.05
    )
    final_lr: Annotated[
        float, Described(ge=0, le=1, description="share of it that is left at the end, along a cosine")
    ] = 0.1
    betas: Annotated[tuple[float, float], Described(description="AdamW's")] = (0.9, 0.95)
    eps: Annotated[float, Described(gt=0, description="AdamW's")] = 1e-8
    weight_decay: Annotated[float, Described(ge=0, description="AdamW's, of what decays")] = 0.1
    no_decay: Annotated[
        list[str],
        Described(description="what does not decay besides vectors: patterns as in a stage's train"),
    ] = ["*bias", "*gain", "*gain_?", "*initial_weights.*", "*initial_momentum.*", "*persistent", "*tokens"]
    clip: Annotated[float | None, Described(gt=0, description="largest norm of the gradient; null for any")] = 1.0
    memory_loss: Annotated[
        float, Described(ge=0, description="weight of what the memories miss of what they are to store; 0 for none")
    ] = 0.0
    write_cost: Annotated[
        float, Described(ge=0, description="weight of the shares that memories write and forget; 0 for none")
    ] = 0.0
    ema: Annotated[
        float | None,
        Described(gt=0, lt=1, description="decay of averaged weights, which are validated and saved; null for none"),
    ] = None
    stages: Annotated[
        list[Stage], Described(description="one after the other, each with the parameters that train in it")
    ] = []

    valid_every: Annotated[int | None, Described(ge=1, description="steps between validations; null for none")] = 250
    valid_batches: Annotated[int, Described(ge=1, description="batches of one validation")] = 8
    checkpoint_every: Annotated[
        int | None, Described(ge=1, description="steps between checkpoints; null for one at the end")
    ] = 250
    keep: Annotated[int, Described(ge=1, description="checkpoints that stay, beside the best")] = 2
    log_every: Annotated[int, Described(ge=1, description="steps between lines of the log")] = 10
    surprise_every: Annotated[
        int | None, Described(ge=1, description="steps between looks at how surprised memories are; null for none")
    ] = 100
    on_bad: Annotated[
        Literal["stop", "skip"], Described(description="what to do with a step whose loss or gradient is no number")
    ] = "stop"
    spike: Annotated[
        float | None, Described(gt=0, description="nats above the median of late losses that are as bad; null for any")
    ] = 3.0
    tensorboard: Annotated[
        bool | None, Described(description="write TensorBoard logs; null: where it is installed")
    ] = None

    @property
    def parts(self) -> list[Stage]:
        """The stages; a run without is one, in which everything trains."""
        return self.stages or [Stage(steps=self.steps, train=["*"])]

    @property
    def windows(self) -> int:
        """Batches that a step reads, one after the other."""
        return self.carry if isinstance(self.carry, int) else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``as_settings`` reads back as equal settings."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data

    def to_yaml(self) -> str:
        """``to_dict`` as YAML."""
        return write_yaml(self.to_dict())


FIXED = ("batch", "length", "carry", "seed", "dtype", "ema", "stages")
"""What a run that goes on cannot change: other rows would follow, or another state would be needed."""


def as_settings(given: Settings | Mapping[str, Any] | str | os.PathLike[str] | None = None, /) -> Settings:
    """Settings from a mapping, from a YAML or JSON file, or the defaults.

    Raises ``RecipeError`` with everything that is wrong: unknown keys with the nearest right one, wrong values.
    """
    if isinstance(given, Settings):
        return given
    source = "settings"
    if isinstance(given, (str, os.PathLike)):
        source, given = str(given), read_file(Path(given))
        if not isinstance(given, dict):
            raise RecipeError([Problem("", f"expected a mapping of settings, got {show(given)}")], source)
    data = plain(dict(given or {}), source)
    stages = data.get("stages")
    problems: list[Problem] = []
    checked: list[Any] = []
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        path = join("stages", index)
        if not isinstance(stage, dict):
            problems.append(Problem(path, f"expected a mapping with steps and train, got {show(stage)}"))
            continue
        try:
            checked.append(Stage(**check_settings("stage", fields(Stage), stage, path)))
        except RecipeError as error:
            problems += error.problems
    values: dict[str, Any] = {}
    try:
        # stages have been looked at, each key of them by its own name
        ahead: dict[str, Any] = {"stages": []} if isinstance(stages, list) else {}
        values = check_settings("settings", fields(Settings), {**data, **ahead})
    except RecipeError as error:
        problems += error.problems
    if not problems:
        problems += _together(data, values, checked)
    if problems:
        raise RecipeError(problems, source)
    steps = sum(stage.steps for stage in checked) or values["steps"]
    return Settings(**{**values, "stages": checked, "steps": steps})


def _together(data: dict[str, Any], values: dict[str, Any], stages: list[Stage]) -> list[Problem]:
    """What is wrong between settings that are each right by themselves."""
    problems = []
    if values["batch"] % values["accumulate"]:
        message = f"expected a divisor of batch = {values['batch']}, got {values['accumulate']}"
        problems.append(Problem("accumulate", message))
    seeing = [name for name in ("memory_loss", "write_cost") if values[name]]
    if values["compile"] and seeing:
        message = f"{seeing[0]} looks into the model as it is written, not compiled: leave one of them out"
        problems.append(Problem("compile", message))
    if not all(0 <= beta < 1 for beta in values["betas"]):
        problems.append(Problem("betas", f"expected two numbers from 0 to under 1, got {list(values['betas'])}"))
    total = sum(stage.steps for stage in stages)
    if stages and data.get("steps", total) != total:
        problems.append(Problem("steps", f"the stages have {total} steps together, so it is not {data['steps']}"))
    return problems


@cache
def fields(kind: type[BaseModel]) -> dict[str, Field]:
    """The fields of settings as the registry's, whose checks and words they share."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name: Field(name, hints[name], Field.REQUIRED if field.is_required() else field.get_default())
        for name, field in kind.model_fields.items()
    }

"""The settings of a training run: each with its type, default and description, validated as strictly as a recipe."""

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

from ...recipes.parse import plain, read_file
from ...registry import Field, Problem, RecipeError, check_settings, join, show


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Stage(_Checked):
    """A part of the run in which a subset of the parameters trains. Each stage has its own learning-rate schedule."""

    steps: Annotated[int, Described(ge=1, description="length of the stage")]
    train: Annotated[
        list[str], Described(min_length=1, description="parameters to train: name patterns, @block type, ! to exclude")
    ]
    lr: Annotated[float | None, Described(gt=0, description="peak learning rate; null for the run's")] = None
    optimizer: Annotated[Literal["keep", "fresh"], Described(description="keep the optimizer's state, or reset it")] = (
        "keep"
    )


class Settings(_Checked):
    """Everything about a run except the recipe and the data. Made by ``as_settings``."""

    steps: Annotated[int, Described(ge=1, description="optimizer steps, of all stages together")] = 1000
    batch: Annotated[int, Described(ge=1, description="rows of a step, over all processes")] = 16
    length: Annotated[int | None, Described(ge=1, description="tokens of a row; null for the data's own")] = None
    accumulate: Annotated[int, Described(ge=1, description="gradient accumulation: parts of each process's rows")] = 1
    carry: Annotated[
        Literal["off", "detach"] | Annotated[int, Described(ge=1)],
        Described(
            description="where rows continue from batch to batch: start each batch fresh (off), carry the state "
            "without gradients (detach), or read N batches in a step with gradients through the state between them"
        ),
    ] = "detach"
    seed: Annotated[int, Described(ge=0, lt=2**63, description="of the weights and of the data's order")] = 0
    device: Annotated[str, Described(description="cpu, cuda, ...")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16", "float64"], Described(description="of the parameters")] = "float32"
    autocast: Annotated[Literal["bfloat16"] | None, Described(description="dtype of torch.autocast; null for none")] = (
        None
    )
    recompute: Annotated[bool, Described(description="activation checkpointing of every layer")] = False
    compile: Annotated[bool, Described(description="torch.compile the model")] = False

    lr: Annotated[float, Described(gt=0, description="peak learning rate")] = 1e-3
    warmup: Annotated[float, Described(ge=0, lt=1, description="share of the steps with a linear warm-up")] = 0.05
    final_lr: Annotated[float, Described(ge=0, le=1, description="share of the peak rate left after cosine decay")] = (
        0.1
    )
    betas: Annotated[tuple[float, float], Described(description="of AdamW")] = (0.9, 0.95)
    eps: Annotated[float, Described(gt=0, description="of AdamW")] = 1e-8
    weight_decay: Annotated[float, Described(ge=0, description="of AdamW, for parameters that decay")] = 0.1
    no_decay: Annotated[
        list[str],
        Described(description="parameters without weight decay besides vectors: patterns as in a stage's train"),
    ] = ["*bias", "*gain", "*gain_?", "*initial_weights.*", "*initial_momentum.*", "*persistent", "*tokens"]
    clip: Annotated[float | None, Described(gt=0, description="maximum gradient norm; null for no clipping")] = 1.0
    memory_loss: Annotated[
        float, Described(ge=0, description="weight of the memories' reconstruction loss; 0 for none")
    ] = 0.0
    write_cost: Annotated[
        float, Described(ge=0, description="weight of the cost of writing and forgetting; 0 for none")
    ] = 0.0
    ema: Annotated[
        float | None,
        Described(gt=0, lt=1, description="decay of averaged weights, which are validated and saved; null for none"),
    ] = None
    stages: Annotated[list[Stage], Described(description="stages in order, each with the parameters it trains")] = []

    valid_every: Annotated[int | None, Described(ge=1, description="steps between validations; null for none")] = 250
    valid_batches: Annotated[int, Described(ge=1, description="batches of a validation")] = 8
    checkpoint_every: Annotated[
        int | None, Described(ge=1, description="steps between checkpoints; null for only the last")
    ] = 250
    keep: Annotated[int, Described(ge=1, description="latest checkpoints to keep, besides the best")] = 2
    log_every: Annotated[int, Described(ge=1, description="steps between log lines")] = 10
    surprise_every: Annotated[
        int | None, Described(ge=1, description="steps between measurements of the memories' surprise; null for none")
    ] = 100
    on_bad: Annotated[
        Literal["stop", "skip"], Described(description="on a nonfinite loss or gradient, or a loss spike")
    ] = "stop"
    spike: Annotated[
        float | None, Described(gt=0, description="nats above the median of recent losses that are a spike; null: off")
    ] = 3.0
    tensorboard: Annotated[bool | None, Described(description="write TensorBoard logs; null: if installed")] = None

    @property
    def all_stages(self) -> list[Stage]:
        """The stages. A run without stages is one stage that trains every parameter."""
        return self.stages or [Stage(steps=self.steps, train=["*"])]

    @property
    def windows(self) -> int:
        """Consecutive batches read in one step."""
        return self.carry if isinstance(self.carry, int) else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``as_settings`` reads back as equal settings."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data


FIXED = ("batch", "length", "carry", "seed", "dtype", "ema", "stages")
"""Settings that a resumed run cannot change: the data or the training state depends on them."""


def as_settings(given: Settings | Mapping[str, Any] | str | os.PathLike[str] | None = None, /) -> Settings:
    """Settings from a mapping, from a YAML or JSON file, or the defaults.

    Raises ``RecipeError`` with every problem: unknown keys with the nearest valid one, invalid values.
    """
    if isinstance(given, Settings):
        return given
    source = "settings"
    if isinstance(given, (str, os.PathLike)):
        source, given = str(given), read_file(Path(given))
        if not isinstance(given, dict):
            raise RecipeError([Problem("", f"expected a mapping of settings, got {show(given)}")], source)
    data = plain(dict(given or {}), source)
    problems: list[Problem] = []
    stages: list[Stage] = []
    if isinstance(data.get("stages"), list):
        for index, stage in enumerate(data["stages"]):
            path = join("stages", index)
            if not isinstance(stage, dict):
                problems.append(Problem(path, f"expected a mapping with steps and train, got {show(stage)}"))
                continue
            try:
                stages.append(Stage(**check_settings("stage", fields(Stage), stage, path)))
            except RecipeError as error:
                problems += error.problems
        data["stages"] = []  # checked above, so that problems name the stage's own keys
    values: dict[str, Any] = {}
    try:
        values = check_settings("settings", fields(Settings), data)
    except RecipeError as error:
        problems += error.problems
    if not problems:
        problems += _conflicts(data, values, stages)
    if problems:
        raise RecipeError(problems, source)
    steps = sum(stage.steps for stage in stages) or values["steps"]
    return Settings(**{**values, "stages": stages, "steps": steps})


def _conflicts(data: dict[str, Any], values: dict[str, Any], stages: list[Stage]) -> list[Problem]:
    """Problems between settings that are each valid."""
    problems = []
    if values["batch"] % values["accumulate"]:
        message = f"expected a divisor of batch = {values['batch']}, got {values['accumulate']}"
        problems.append(Problem("accumulate", message))
    auxiliary = [name for name in ("memory_loss", "write_cost") if values[name]]
    if values["compile"] and auxiliary:
        message = f"{auxiliary[0]} observes the memories, which a compiled model does not allow: use only one of them"
        problems.append(Problem("compile", message))
    if not all(0 <= beta < 1 for beta in values["betas"]):
        problems.append(Problem("betas", f"expected two numbers from 0 to under 1, got {list(values['betas'])}"))
    total = sum(stage.steps for stage in stages)
    if stages and data.get("steps", total) != total:
        problems.append(Problem("steps", f"the stages have {total} steps in total, got {data['steps']}"))
    return problems


@cache
def fields(kind: type[BaseModel]) -> dict[str, Field]:
    """The fields of a settings class as fields of the registry, which does the checking."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name: Field(name, hints[name], Field.REQUIRED if field.is_required() else field.get_default())
        for name, field in kind.model_fields.items()
    }

"""The settings of a training run: each with its type, default and description, validated as strictly as a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...recipes import Recipe
from ...recipes.changes import change
from ...recipes.parse import plain, read_file, recipe_error
from ...registry import Field as SchemaField
from ...registry import Problem, RecipeError, check_settings, join, show


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Stage(_Checked):
    """A part of the run, with its own learning-rate schedule, trained parameters and changes of the recipe."""

    steps: int = Field(ge=1, description="length of the stage")
    train: list[str] = Field(
        default=["*"], min_length=1, description="parameters to train: name patterns, @block type, ! to exclude"
    )
    recipe: dict[str, Any] = Field(
        default={}, description="values of the recipe by path in this stage, which keep the weights"
    )
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; null for the run's")
    optimizer: Literal["keep", "fresh"] = Field(default="keep", description="keep the optimizer's state, or reset it")


class Mesh(_Checked):
    """How processes share the work: rows over ``data``, the tokens of rows over ``context``, heads over ``tensor``."""

    data: int | None = Field(default=None, ge=1, description="groups that have their own rows; null: as many as remain")
    context: int = Field(default=1, ge=1, description="processes that share the tokens of their rows")
    tensor: int = Field(default=1, ge=1, description="processes that share the heads of blocks")


class Settings(_Checked):
    """Everything about a run except the recipe and the data. Made by ``as_settings``."""

    steps: int = Field(1000, ge=1, description="optimizer steps, of all stages together")
    batch: int = Field(16, ge=1, description="rows of a step, over all processes")
    length: int | None = Field(None, ge=1, description="tokens of a row; null for the data's own")
    accumulate: int = Field(1, ge=1, description="gradient accumulation: parts of each process's rows")
    carry: Literal["off", "detach"] | Annotated[int, Field(ge=1)] = Field(
        "detach",
        description="where rows continue from batch to batch: start each batch fresh (off), carry the state "
        "without gradients (detach), or read N batches in a step with gradients through the state between them",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the data's order")
    device: str = Field("cpu", description="cpu, cuda, ...")
    dtype: Literal["float32", "bfloat16", "float64"] = Field("float32", description="of the parameters")
    autocast: Literal["bfloat16"] | None = Field(None, description="dtype of torch.autocast; null for none")
    recompute: bool = Field(False, description="activation checkpointing of every layer")
    compile: bool = Field(False, description="torch.compile the model")

    mesh: Mesh | None = Field(None, description="how the processes share the work; null: the rows")

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a linear warm-up")
    final_lr: float = Field(0.1, ge=0, le=1, description="share of the peak rate left after cosine decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(0.1, ge=0, description="of AdamW, for parameters that decay")
    no_decay: list[str] = Field(
        ["*bias", "*gain", "*gain_?", "*initial_weights.*", "*initial_momentum.*", "*persistent", "*tokens"],
        description="parameters without weight decay besides vectors: patterns as in a stage's train",
    )
    clip: float | None = Field(1.0, gt=0, description="maximum gradient norm; null for no clipping")
    memory_loss: float = Field(0.0, ge=0, description="weight of the memories' reconstruction loss; 0 for none")
    write_cost: float = Field(0.0, ge=0, description="weight of the cost of writing and forgetting; 0 for none")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, which are validated and saved; null for none"
    )
    stages: list[Stage] = Field([], description="stages in order; none: one that trains all parameters")

    valid_every: int | None = Field(250, ge=1, description="steps between validations; null for none")
    valid_batches: int = Field(8, ge=1, description="batches of a validation; of packed documents, tokens of as many")
    checkpoint_every: int | None = Field(250, ge=1, description="steps between checkpoints; null for only the last")
    keep: int = Field(2, ge=1, description="latest checkpoints to keep, besides the best")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    surprise_every: int | None = Field(
        100, ge=1, description="steps between measurements of the memories' surprise; null for none"
    )
    on_bad: Literal["stop", "skip"] = Field("stop", description="on a nonfinite loss or gradient, or a loss spike")
    spike: float | None = Field(
        3.0, gt=0, description="nats above the median of recent losses that are a spike; null: off"
    )
    tensorboard: bool | None = Field(None, description="write TensorBoard logs; null: if installed")

    @property
    def all_stages(self) -> list[Stage]:
        """The stages. A run without stages is one stage that trains every parameter."""
        return self.stages or [Stage(steps=self.steps)]

    @property
    def windows(self) -> int:
        """Consecutive batches read in one step."""
        return self.carry if isinstance(self.carry, int) else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``as_settings`` reads back as equal settings."""
        return self.model_dump(mode="json")


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
        source, given = str(given), read_settings(given)
    data = plain(dict(given or {}), source)
    problems: list[Problem] = []
    stages: list[Stage] = []
    if isinstance(data.get("stages"), list):
        for index, stage in enumerate(data["stages"]):
            path = join("stages", index)
            if not isinstance(stage, dict):
                problems.append(Problem(path, f"expected a mapping with steps, got {show(stage)}"))
                continue
            try:
                stages.append(Stage(**check_settings("stage", fields(Stage), stage, path)))
            except RecipeError as error:
                problems += error.problems
        data["stages"] = []  # checked above, so that problems name the stage's own keys
    mesh: Mesh | None = None
    if isinstance(data.get("mesh"), dict):
        try:
            mesh = Mesh(**check_settings("mesh", fields(Mesh), data["mesh"], "mesh"))
        except RecipeError as error:
            problems += error.problems
        data["mesh"] = None
    values: dict[str, Any] = {}
    try:
        values = check_settings("settings", fields(Settings), data)
    except RecipeError as error:
        problems += error.problems
    if not problems:
        problems += _conflicts(data, values, stages, mesh)
    if problems:
        raise RecipeError(problems, source)
    steps = sum(stage.steps for stage in stages) or values["steps"]
    return Settings(**{**values, "stages": stages, "steps": steps, "mesh": mesh})


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a file of settings, unchecked. Raises ``RecipeError`` if the file holds anything else."""
    found = read_file(path)
    if not isinstance(found, dict):
        raise recipe_error(str(path), f"expected a mapping of settings, got {show(found)}")
    if {"layers", "stack"} <= found.keys():
        raise recipe_error(str(path), f"this is a recipe, not settings: titans-train {path} --data ... trains it")
    return found


def recipes_of_stages(recipe: Recipe, settings: Settings) -> list[Recipe]:
    """The recipe of each stage. Raises ``RecipeError`` with all changes that are invalid or do not keep the weights."""
    found, problems = list[Recipe](), list[Problem]()
    for index, stage in enumerate(settings.all_stages):
        try:
            found.append(change(recipe, stage.recipe))
        except RecipeError as error:
            path = f"stages.{index}.recipe"
            problems += [Problem(f"{path}.{problem.path}", problem.message) for problem in error.problems]
    if problems:
        raise RecipeError(problems, "settings")
    return found


def _conflicts(data: dict[str, Any], values: dict[str, Any], stages: list[Stage], mesh: Mesh | None) -> list[Problem]:
    """Problems between settings that are each valid."""
    problems = []
    if values["batch"] % values["accumulate"]:
        message = f"expected a divisor of batch = {values['batch']}, got {values['accumulate']}"
        problems.append(Problem("accumulate", message))
    auxiliary = [name for name in ("memory_loss", "write_cost") if values[name]]
    if values["compile"] and auxiliary:
        message = f"{auxiliary[0]} observes the memories, which a compiled model does not allow: use only one of them"
        problems.append(Problem("compile", message))
    if mesh is not None and mesh.context * mesh.tensor > 1:
        problems += [
            Problem(name, "a mesh that divides rows (context, tensor) does not allow it: leave it out")
            for name in ("compile", *auxiliary)
            if values[name]
        ]
    if not all(0 <= beta < 1 for beta in values["betas"]):
        problems.append(Problem("betas", f"expected two numbers from 0 to under 1, got {list(values['betas'])}"))
    total = sum(stage.steps for stage in stages)
    if stages and data.get("steps", total) != total:
        problems.append(Problem("steps", f"the stages have {total} steps in total, got {data['steps']}"))
    return problems


@cache
def fields(kind: type[BaseModel]) -> dict[str, SchemaField]:
    """The fields of a settings class as fields of the registry, which does the checking."""
    return {
        name: SchemaField(
            name, Annotated[info.annotation, info], SchemaField.REQUIRED if info.is_required() else info.get_default()
        )
        for name, info in kind.model_fields.items()
    }

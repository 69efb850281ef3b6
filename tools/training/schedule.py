"""The learning rate: in each stage a warm-up, and then a cosine; a pure function of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

from .settings import Settings, Stage


class Place(NamedTuple):
    """Where in the run a step is."""

    number: int
    """Of the stage, from 0."""
    stage: Stage
    step: int
    """In the stage, from 0."""


def place_of(step: int, settings: Settings) -> Place:
    """The stage of a step, both counted from 0; the run's last step, of any later one."""
    for number, stage in enumerate(settings.parts):
        if step < stage.steps:
            return Place(number, stage, step)
        step -= stage.steps
    return Place(number, stage, stage.steps - 1)


def learning_rate(step: int, settings: Settings) -> float:
    """Of the update ``step``, counted from 0: never zero, so that no update is for nothing."""
    _, stage, at = place_of(step, settings)
    top = settings.lr if stage.lr is None else stage.lr
    rising = math.ceil(settings.warmup * stage.steps)
    if at < rising:
        return top * (at + 1) / (rising + 1)
    along = (at - rising) / max(stage.steps - rising, 1)
    low = settings.final_lr
    return top * (low + (1 - low) * (1 + math.cos(math.pi * along)) / 2)

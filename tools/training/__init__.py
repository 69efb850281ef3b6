"""Training: from a recipe, data and settings to a trained model in a run folder, which can be gone on with."""

from .comparing import compare
from .running import TrainedRun, train
from .searching import search
from .settings import Settings, Stage, as_settings

__all__ = ["Settings", "Stage", "TrainedRun", "as_settings", "compare", "search", "train"]

"""Training: from a recipe, data and settings to a trained model, in a run folder that can be resumed."""

from .compare import compare
from .reproduce import reproduce
from .search import search
from .settings import Settings, Stage, as_settings
from .train import TrainedRun, train

__all__ = ["Settings", "Stage", "TrainedRun", "as_settings", "compare", "reproduce", "search", "train"]

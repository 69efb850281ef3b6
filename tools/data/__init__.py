"""Data to train on and to test with: generated tasks and text, in batches that are a pure function of their index."""

from .metrics import Score, score
from .open_source import open_source
from .source import SPLITS, Batch, Source, Split

__all__ = ["SPLITS", "Batch", "Score", "Source", "Split", "open_source", "score"]

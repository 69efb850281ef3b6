"""Data to train on and to be measured on: generated tasks and text, in batches that are a pure function of a number."""

from .accuracy import Score, accuracy, exact_match, score
from .opening import open_source
from .source import SPLITS, Batch, Source, Split

__all__ = ["SPLITS", "Batch", "Score", "Source", "Split", "accuracy", "exact_match", "open_source", "score"]

"""Reading texts of any length with a model, from Python; the command on top of it is ``titans-infer``."""

from .reading import Bucket, Perplexity, perplexity, position

__all__ = ["Bucket", "Perplexity", "perplexity", "position"]

"""Reading texts of any length with a model, from Python; the command on top of it is ``titans-infer``."""

from .reading import Bucket, Perplexity, Reading, perplexity, position, read_text, readings

__all__ = ["Bucket", "Perplexity", "Reading", "perplexity", "position", "read_text", "readings"]

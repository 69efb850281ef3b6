"""Reading texts of any length with a model, from Python; the command on top of it is ``titans-infer``."""

from .perplexity import Bucket, Perplexity, perplexity
from .reading import Reading, position, read_text, readings

__all__ = ["Bucket", "Perplexity", "Reading", "perplexity", "position", "read_text", "readings"]

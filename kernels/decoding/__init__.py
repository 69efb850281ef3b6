"""A few tokens without gradients: a stretch of a block in one C kernel.

There an operator costs more to start than to run. Each operation has a function for one call, and one that prepares
many calls of the same shape: their results lie in ever the same tensors, and what does not change from token to token
is looked up once.
"""

from . import cached_attention, gated_projection, memory_inputs

__all__ = ["cached_attention", "gated_projection", "memory_inputs"]

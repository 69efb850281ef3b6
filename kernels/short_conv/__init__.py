"""The short causal convolution, and the queries, keys and values of a memory that are made with it."""

from .convolution import causal_convolution
from .memory_inputs import Layers, memory_inputs, memory_query, prepare_inputs
from .query import query
from .query_key_value import query_key_value

__all__ = [
    "Layers",
    "causal_convolution",
    "memory_inputs",
    "memory_query",
    "prepare_inputs",
    "query",
    "query_key_value",
]

"""The operations that models spend their time in: each with a plain reference and one or more fast backends."""

from . import (
    attention,
    cached_attention,
    convolution,
    gate,
    gated_projection,
    memory,
    memory_inputs,
    normalisation,
    projection,
    query_key_value,
    rotary,
    scan,
)

__all__ = [
    "attention",
    "cached_attention",
    "convolution",
    "gate",
    "gated_projection",
    "memory",
    "memory_inputs",
    "normalisation",
    "projection",
    "query_key_value",
    "rotary",
    "scan",
]

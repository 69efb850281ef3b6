"""The operations that models spend their time in: each with a plain reference and one or more fast backends."""

from . import (
    attention,
    convolution,
    decoding,
    gate,
    memory,
    normalisation,
    projection,
    query,
    query_key_value,
    rotary,
    scan,
)

__all__ = [
    "attention",
    "convolution",
    "decoding",
    "gate",
    "memory",
    "normalisation",
    "projection",
    "query",
    "query_key_value",
    "rotary",
    "scan",
]

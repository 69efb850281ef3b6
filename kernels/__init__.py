"""The operations that models spend their time in: each with a plain reference and one or more fast backends."""

from . import attention, convolution, gate, memory, normalisation, projection, rotary

__all__ = ["attention", "convolution", "gate", "memory", "normalisation", "projection", "rotary"]

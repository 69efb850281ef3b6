"""The operations that models spend their time in: one folder each, with a plain reference and faster backends."""

from . import attention, linear, memory, norm_gate, rotary, scan, short_conv

__all__ = ["attention", "linear", "memory", "norm_gate", "rotary", "scan", "short_conv"]

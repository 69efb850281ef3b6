"""Norms, and the gates made of them: RMS and L2 normalization, gated norms, SwiGLU, and gated projections."""

from .gate import gate, gated_norm, prepare_gate, silu_gate, swiglu
from .gated_projection import feed_forward, few, gated_output, prepare_feed_forward, prepare_gated_output
from .norm import l2_norm, prepare_rms_norm, rms_norm

__all__ = [
    "feed_forward",
    "few",
    "gate",
    "gated_norm",
    "gated_output",
    "l2_norm",
    "prepare_feed_forward",
    "prepare_gate",
    "prepare_gated_output",
    "prepare_rms_norm",
    "rms_norm",
    "silu_gate",
    "swiglu",
]

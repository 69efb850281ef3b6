"""Blocks from elsewhere: any module by :func:`adapt`, and by name those of a few libraries."""

from . import fla_layers, hf, mamba_ssm
from .adapter import Adapted, AdaptedState, adapt

__all__ = ["Adapted", "AdaptedState", "adapt", "fla_layers", "hf", "mamba_ssm"]

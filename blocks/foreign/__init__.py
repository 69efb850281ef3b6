"""Modules from other libraries as blocks: :func:`adapt` for any module, and registered blocks for some libraries."""

from . import fla, hf, mamba_ssm
from .adapter import Adapted, AdaptedState, adapt

__all__ = ["Adapted", "AdaptedState", "adapt", "fla", "hf", "mamba_ssm"]

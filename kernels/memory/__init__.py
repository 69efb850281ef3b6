"""The neural memory: its state, the operation, and the oracles it is held against."""

from .measuring import Measured, measure_memory
from .operation import MEMORY, titans_memory
from .prepared import prepare_read, prepare_step
from .reading import read_memory
from .state import MemoryState
from .tokens import Options, Tokens

__all__ = [
    "MEMORY", "Measured", "MemoryState", "Options", "Tokens", "measure_memory", "prepare_read", "prepare_step",
    "read_memory", "titans_memory",
]  # fmt: skip

"""The neural memory: its state, the operation, and the oracles it is held against."""

from .decode import prepare_read, prepare_step
from .measure import Measured, measure_memory
from .operation import MEMORY, titans_memory
from .read import read_memory
from .state import MemoryState
from .tokens import Options, Tokens

__all__ = [
    "MEMORY", "Measured", "MemoryState", "Options", "Tokens", "measure_memory", "prepare_read", "prepare_step",
    "read_memory", "titans_memory",
]  # fmt: skip

"""The neural memory: its state, the operation, and the oracles it is held against."""

from .operation import MEMORY, titans_memory
from .prepared import prepare_read, prepare_step
from .reading import read_memory
from .state import MemoryState
from .tokens import Options, Tokens

__all__ = [
    "MEMORY", "MemoryState", "Options", "Tokens", "prepare_read", "prepare_step", "read_memory", "titans_memory",
]  # fmt: skip

"""Blocks: everything between one state and the next. Importing this package registers the built-in ones."""

from . import attention, chain, context, feedforward, foreign, gate, memory, normalisation, persistent, residual
from .auxiliary_losses import memory_loss, write_cost
from .block import Block, materialise
from .build import build_block
from .foreign import adapt
from .language_model import LanguageModel, ModelOutput, ModelState
from .laws import LawError, check_block
from .memory_ablation import MemoryCheck, memory_check
from .observing import observe

__all__ = [
    "Block",
    "LanguageModel",
    "LawError",
    "MemoryCheck",
    "ModelOutput",
    "ModelState",
    "adapt",
    "attention",
    "build_block",
    "chain",
    "check_block",
    "context",
    "feedforward",
    "foreign",
    "gate",
    "materialise",
    "memory",
    "memory_check",
    "memory_loss",
    "normalisation",
    "observe",
    "persistent",
    "residual",
    "write_cost",
]

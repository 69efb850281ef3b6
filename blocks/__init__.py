"""Blocks: everything between one state and the next. Importing this package registers the built-in ones."""

from . import (
    attention,
    combinators,
    context,
    feedforward,
    flops,
    foreign,
    layers,
    memory,
    published_learners,
    self_modifying,
)
from .auxiliary_losses import memory_loss, write_cost
from .block import Block
from .build import build_block, materialize
from .foreign import adapt
from .language_model import LanguageModel, ModelOutput, ModelState
from .laws import LawError, check_block
from .memory import NeuralMemory
from .memory_ablation import MemoryCheck, memory_check
from .observe import observe
from .parallel import parallelize
from .prefix_cache import PrefixCache

__all__ = [
    "Block",
    "LanguageModel",
    "LawError",
    "MemoryCheck",
    "ModelOutput",
    "ModelState",
    "NeuralMemory",
    "PrefixCache",
    "adapt",
    "attention",
    "build_block",
    "check_block",
    "combinators",
    "context",
    "feedforward",
    "flops",
    "foreign",
    "layers",
    "materialize",
    "memory",
    "memory_check",
    "memory_loss",
    "observe",
    "parallelize",
    "published_learners",
    "self_modifying",
    "write_cost",
]

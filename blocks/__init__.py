"""Blocks: everything between one state and the next. Importing this package registers the built-in ones."""

from . import attention, chain, context, feedforward, gate, memory, normalisation, persistent
from .block import Block, materialise
from .build import build_block
from .language_model import LanguageModel, ModelOutput, ModelState
from .laws import LawError, check_block

__all__ = [
    "Block",
    "LanguageModel",
    "LawError",
    "ModelOutput",
    "ModelState",
    "attention",
    "build_block",
    "chain",
    "check_block",
    "context",
    "feedforward",
    "gate",
    "materialise",
    "memory",
    "normalisation",
    "persistent",
]

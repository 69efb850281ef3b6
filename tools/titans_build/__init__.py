"""A modular block library for neural memory models: blocks, recipes that nest them, and one state for all.

Example::

    import titans_build as tb

    model = tb.build(tb.load_recipe("mac"), seed=0)
    out = model(tokens)                          # out.logits, out.loss, out.state
    out = model(more_tokens, out.state)          # goes on exactly where the first call stopped
"""

from importlib.metadata import version as _version

from .blocks import Block, build_block, check_block, state
from .recipes import build, load, load_recipe, load_state, save, save_state
from .registry import RecipeError, Spec, create, describe, list_blocks, register

__version__ = _version("titans-build")

__all__ = [
    "Block",
    "RecipeError",
    "Spec",
    "__version__",
    "build",
    "build_block",
    "check_block",
    "create",
    "describe",
    "list_blocks",
    "load",
    "load_recipe",
    "load_state",
    "register",
    "save",
    "save_state",
    "state",
]

"""A modular block library for neural memory models: blocks, recipes that nest them, and one state for all.

Example::

    import titans_build as tb

    model = tb.build(tb.load_recipe("mac"), seed=0)
    out = model(tokens)                          # out.logits, out.loss, out.state
    out = model(more_tokens, out.state)          # goes on exactly where the first call stopped
"""

from .tools import starting as _starting  # noqa: F401 - before what takes long to import

# isort: split
from importlib.metadata import version as _version

from .blocks import Block, adapt, build_block, check_block, memory_check, memory_loss, observe, state, write_cost
from .recipes import build, load, load_recipe, load_state, save, save_state
from .registry import RecipeError, Spec, create, describe, list_blocks, register
from .tools.data import open_source
from .tools.inference import perplexity
from .tools.swapping import memory, swap, unswap
from .tools.tasks import Task, list_tasks, register_task
from .tools.training import compare, search, train

__version__ = _version("titans-build")

__all__ = [
    "Block",
    "RecipeError",
    "Spec",
    "Task",
    "__version__",
    "adapt",
    "build",
    "build_block",
    "check_block",
    "compare",
    "create",
    "describe",
    "list_blocks",
    "list_tasks",
    "load",
    "load_recipe",
    "load_state",
    "memory",
    "memory_check",
    "memory_loss",
    "observe",
    "open_source",
    "perplexity",
    "register",
    "register_task",
    "save",
    "save_state",
    "search",
    "state",
    "swap",
    "train",
    "unswap",
    "write_cost",
]

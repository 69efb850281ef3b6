"""A modular block library for neural memory models: blocks, recipes that nest them, and one state for all.

Example::

    import titans_build as tb

    model = tb.build(tb.load_recipe("mac"), seed=0)
    out = model(tokens)                          # out.logits, out.loss, out.state
    out = model(more_tokens, out.state)          # continues exactly where the first call stopped

Names are imported when they are first used, so that ``import titans_build`` takes no time. After torch, it defines the
operators of the kernels, which exported programs (``torch.export.load``) and compiled ones contain.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import (
        Block,
        LawError,
        NeuralMemory,
        PrefixCache,
        adapt,
        build_block,
        check_block,
        memory_check,
        memory_loss,
        observe,
        parallelize,
        state,
        write_cost,
    )
    from .kernels.dispatch import BackendError
    from .kernels.memory.learner import (
        register_features,
        register_network,
        register_objective,
        register_optimizer,
        register_retention,
    )
    from .recipes import StorageError, build, load, load_recipe, load_state, save, save_state
    from .registry import RecipeError, Spec, Unavailable, create, describe, list_blocks, register
    from .tools.data import open_source
    from .tools.inference import perplexity
    from .tools.swapping import SwapError, load_swaps, memory, save_swaps, swap, unswap
    from .tools.tasks import Task, list_tasks, register_task
    from .tools.training import compare, search, train

    __version__: str

__all__ = [
    "BackendError",
    "Block",
    "LawError",
    "NeuralMemory",
    "PrefixCache",
    "RecipeError",
    "Spec",
    "StorageError",
    "SwapError",
    "Task",
    "Unavailable",
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
    "load_swaps",
    "memory",
    "memory_check",
    "memory_loss",
    "observe",
    "open_source",
    "parallelize",
    "perplexity",
    "register",
    "register_features",
    "register_network",
    "register_objective",
    "register_optimizer",
    "register_retention",
    "register_task",
    "save",
    "save_state",
    "save_swaps",
    "search",
    "state",
    "swap",
    "train",
    "unswap",
    "write_cost",
]

_PACKAGES = ("blocks", "kernels", "recipes", "registry", "tools")

# the packages that the names above come from, where it is not `blocks`
_HOMES = {
    "BackendError": "kernels.dispatch",
    **dict.fromkeys(
        ("register_features", "register_network", "register_objective", "register_optimizer", "register_retention"),
        "kernels.memory.learner",
    ),
    **dict.fromkeys(("StorageError", "build", "load", "load_recipe", "load_state", "save", "save_state"), "recipes"),
    **dict.fromkeys(
        ("RecipeError", "Spec", "Unavailable", "create", "describe", "list_blocks", "register"), "registry"
    ),
    "open_source": "tools.data",
    "perplexity": "tools.inference",
    **dict.fromkeys(("SwapError", "load_swaps", "memory", "save_swaps", "swap", "unswap"), "tools.swapping"),
    **dict.fromkeys(("Task", "list_tasks", "register_task"), "tools.tasks"),
    **dict.fromkeys(("compare", "search", "train"), "tools.training"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("titans-build")
    elif name in __all__ or name in _PACKAGES:
        # `blocks` first: importing it registers the built-in ones
        value = importlib.import_module(".blocks", __name__)
        if name in _PACKAGES:
            value = importlib.import_module(f".{name}", __name__)
        else:
            value = getattr(importlib.import_module(f".{_HOMES.get(name, 'blocks')}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "titans_build" and "torch" in sys.modules:  # pytest imports this file as a parent of the tests
    importlib.import_module(".kernels", __name__)

"""Blocks in existing models: ``swap`` installs them, ``unswap`` removes them, ``memory`` carries their states.

To make a swap, ``install`` finds modules with ``plan``, infers with ``infer`` how they are called (an ``adapter``),
and installs modules of ``site``. When the model runs, hooks of ``call`` run the blocks, with the masks of ``padding``
and the states of ``state_context`` (``tb.memory``) or ``cache`` (transformers). ``config_record`` saves swaps.
"""

from .adapter import ADAPTERS, Adapter, SwapError
from .install import swap, swaps, unswap
from .plan import Plan
from .state_context import StateContext, SwappedState, memory

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Plan",
    "StateContext",
    "SwapError",
    "SwappedState",
    "memory",
    "swap",
    "swaps",
    "unswap",
]

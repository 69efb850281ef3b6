"""Blocks in existing models: ``swap`` installs them, ``unswap`` removes them, ``memory`` carries their states.

To make a swap, ``install`` finds modules with ``plan``, infers with ``infer`` how they are called (an ``adapter``),
and installs modules of ``site``. When the model runs, hooks of ``call`` run the blocks, with the masks of ``padding``
and the states of ``state_context`` (``tb.memory``) or ``cache`` (transformers). ``saved`` writes blocks without their
model, and ``pretrained`` whole models of transformers.
"""

from .adapter import ADAPTERS, Adapter, SwapError
from .install import swap, swaps, unswap
from .plan import Plan
from .saved import load_swaps, save_swaps
from .state_context import StateContext, SwappedState, memory

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Plan",
    "StateContext",
    "SwapError",
    "SwappedState",
    "load_swaps",
    "memory",
    "save_swaps",
    "swap",
    "swaps",
    "unswap",
]

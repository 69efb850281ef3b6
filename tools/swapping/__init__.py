"""Blocks in models from elsewhere: ``swap`` puts them in, ``unswap`` takes them out, ``memory`` carries their state."""

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

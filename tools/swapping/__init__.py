"""Blocks swapped into models from elsewhere: ``swap`` and ``unswap`` them, and carry their ``memory`` between calls."""

from .adapter import ADAPTERS, Adapter
from .carrying import Carried, SwappedState, memory
from .error import SwapError
from .plan import Plan
from .putting_in import swaps
from .swapping import swap, unswap

__all__ = ["ADAPTERS", "Adapter", "Carried", "Plan", "SwapError", "SwappedState", "memory", "swap", "swaps", "unswap"]

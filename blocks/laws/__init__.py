"""The laws that every block obeys, and ``check_block``, which tests them."""

from .check import LAWS, check_block
from .subject import LawError

__all__ = ["LAWS", "LawError", "check_block"]

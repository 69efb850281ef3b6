"""The laws that every block obeys, checked by running it."""

from .check import LAWS, check_block
from .subject import LawError

__all__ = ["LAWS", "LawError", "check_block"]

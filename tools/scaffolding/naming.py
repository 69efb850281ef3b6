"""The names of a plugin: of its block, and what package, module and class are called after it."""

from __future__ import annotations

import builtins
import keyword
import re
from typing import NamedTuple

from ...recipes.reading import read_value
from ...registry import NAME_RULE, is_name, list_blocks, list_rows, show
from ..terminal import UsageError

TAKEN_BY_TEMPLATE = {"Annotated", "Field", "Tensor"}
"""Names that the block's module imports, which its class must leave alone."""


class Names(NamedTuple):
    """What the parts of a plugin are called."""

    block: str
    """In a recipe: ``moving_average``. The folder is called so, too."""
    package: str
    """For pip: ``moving-average-block``."""
    module: str
    """To import: ``moving_average_block``."""
    cls: str
    """``MovingAverage``."""


def names_of(block: str) -> Names:
    """The names of a plugin for a block of this name.

    Raises ``UsageError`` for what cannot be a block's name, and for one that is taken by a block which is built in or
    installed.
    """
    if not is_name(block):
        raise UsageError(f"NAME {show(block)}: {NAME_RULE}")
    read = read_value(block)
    if read != block:
        raise UsageError(f"NAME {block}: a recipe would read that as {show(read)}, not as a name; choose another")
    if block in list_blocks():
        source = ", ".join(row.source for row in list_rows(block))
        raise UsageError(
            f"NAME {block}: there is a block of that name (from {source}; `titans-build describe {block}`): "
            "choose another"
        )
    words = [word for word in re.split("[-_]+", block) if word]
    package = "-".join([*words, "block"]).lower()
    cls = "".join(word[0].upper() + word[1:] for word in words)
    if keyword.iskeyword(cls) or hasattr(builtins, cls) or cls in TAKEN_BY_TEMPLATE:
        cls += "Block"
    return Names(block, package, package.replace("-", "_"), cls)

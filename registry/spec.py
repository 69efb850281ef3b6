"""``Spec`` and ``Needs``: how a block's constructor says that a field holds another block."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias


class Needs:
    """Methods that the class of the block in a field must have: ``Annotated[Spec, Needs("read", "write")]``."""

    def __init__(self, *methods: str) -> None:
        self.methods = methods

    def missing(self, cls: Any) -> list[str]:
        """The needed methods that ``cls`` (a class or an instance) lacks."""
        return [method for method in self.methods if not callable(getattr(cls, method, None))]

    def __repr__(self) -> str:
        return f"Needs({', '.join(map(repr, self.methods))})"


class HoldsBlock:
    """Marks an annotation whose value is a block; ``Spec`` carries it, nothing else should."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {BLOCK_PLACEHOLDER: True}


BLOCK_PLACEHOLDER = "x-titans-build-block"
"""Key that stands in a field's JSON schema where the schema of a block is put in afterwards."""

Spec: TypeAlias = Annotated[Any, HoldsBlock()]
"""A block, as a field of another block holds it.

One of: a registered name (``memory``), a mapping ``{type: memory, depth: 2}``, a list of these (short for
``{type: chain, of: [...]}``) or, in Python only, a block that is already built. The constructor that receives
it makes the block with ``create(field, dim=dim)``. ``list[Spec]`` and ``Spec | None`` work as they read.
"""

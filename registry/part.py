"""Fields that hold a part, such as an objective: a class of another catalogue, by its name or with its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic_core import core_schema

from .catalogue import Catalogue
from .errors import RecipeError, show
from .validation import check_settings


class PartOf:
    """Marks a field that holds a part: ``Annotated[Any, PartOf(OBJECTIVES)]``.

    The value is a registered name (``l2``) or a mapping ``{type: huber, delta: 1.0}``. Its normal form is the name
    alone where all fields have their defaults.
    """

    def __init__(self, catalogue: Catalogue, *, optional: bool = False) -> None:
        self.catalogue, self.optional = catalogue, optional

    def describe(self) -> str:
        """The type in words."""
        names = " | ".join(self.catalogue.known_names())
        return f"{names}, or a mapping with one as its type" + (", or null" if self.optional else "")

    def check(self, value: Any) -> Any:
        """Return the normal form. Raises ``ValueError`` with all problems."""
        if value is None and self.optional:
            return None
        if not isinstance(value, (str, dict)):
            raise ValueError(f"expected {self.describe()}")
        given = {"type": value} if isinstance(value, str) else dict(value)
        name = given.pop("type", None)
        if not isinstance(name, str):
            raise ValueError(f"expected a mapping with a type, one of {', '.join(self.catalogue.known_names())}")
        try:
            fields = self.catalogue.lookup(name).fields
            values = check_settings(f"{self.catalogue.kind} {name}", fields, given)
        except RecipeError as error:
            raise ValueError("; ".join(str(problem) for problem in error.problems)) from None
        if all(not field.required and values[key] == field.default for key, field in fields.items()):
            return name
        return {"type": name, **values}

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_plain_validator_function(self.check)

    def __repr__(self) -> str:
        return f"PartOf({show(self.catalogue.kind)})"

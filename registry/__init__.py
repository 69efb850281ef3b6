"""The registry: block types by name, their schemas, and the creation of blocks from recipes."""

from .catalogue import (
    ENTRY_POINT_GROUP,
    NAME_RULE,
    Catalogue,
    Description,
    Entry,
    FieldDescription,
    Row,
    describe,
    is_name,
    list_blocks,
    list_rows,
    lookup,
    register,
    scratch,
)
from .errors import MAX_PROBLEMS, Problem, RecipeError, Unavailable, join, nearest, show
from .json_schema import DIALECT, block_definitions, block_schema
from .part import PartOf
from .schema import MAX_INTEGER, Added, Field, Needs, SameFunction, SameWeights, Spec, fields_of
from .validation import Checker, check_settings, create, is_block, validate

__all__ = [
    "DIALECT",
    "ENTRY_POINT_GROUP",
    "MAX_INTEGER",
    "MAX_PROBLEMS",
    "NAME_RULE",
    "Added",
    "Catalogue",
    "Checker",
    "Description",
    "Entry",
    "Field",
    "FieldDescription",
    "Needs",
    "PartOf",
    "Problem",
    "RecipeError",
    "Row",
    "SameFunction",
    "SameWeights",
    "Spec",
    "Unavailable",
    "block_definitions",
    "block_schema",
    "check_settings",
    "create",
    "describe",
    "fields_of",
    "is_block",
    "is_name",
    "join",
    "list_blocks",
    "list_rows",
    "lookup",
    "nearest",
    "register",
    "scratch",
    "show",
    "validate",
]

"""The registry: block types by name, their schemas, and blocks made from what a recipe says."""

from .catalogue import ENTRY_POINT_GROUP, Catalogue, Entry, Row, list_blocks, list_rows, lookup, register, scratch
from .description import Description, FieldDescription, describe
from .json_schema import DIALECT, block_definitions, block_schema
from .problem import MAX_PROBLEMS, Problem, RecipeError, join, nearest, show
from .schema import MAX_INTEGER, Field, fields_of
from .spec import Needs, Spec
from .validation import Checker, check_settings, create, is_block, validate

__all__ = [
    "DIALECT",
    "ENTRY_POINT_GROUP",
    "MAX_INTEGER",
    "MAX_PROBLEMS",
    "Catalogue",
    "Checker",
    "Description",
    "Entry",
    "Field",
    "FieldDescription",
    "Needs",
    "Problem",
    "RecipeError",
    "Row",
    "Spec",
    "block_definitions",
    "block_schema",
    "check_settings",
    "create",
    "describe",
    "fields_of",
    "is_block",
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

"""Recipes: reading and checking them, building the models they describe, and keeping both on disk."""

from .build import as_device, as_dtype, build
from .json_schema import recipe_schema
from .loading import load_recipe
from .packaged import packaged_names
from .parse import read_value
from .recipe import Recipe
from .storage import StorageError, load, load_state, save, save_state

__all__ = [
    "Recipe",
    "StorageError",
    "as_device",
    "as_dtype",
    "build",
    "load",
    "load_recipe",
    "load_state",
    "packaged_names",
    "read_value",
    "recipe_schema",
    "save",
    "save_state",
]

"""Recipes: loading and checking them, building their models, and saving and loading models and states."""

from .build import as_device, as_dtype, build
from .json_schema import recipe_schema
from .loading import load_recipe, packaged_names
from .parse import read_value
from .recipe import Recipe
from .saved_format import StorageError
from .saved_state import load_state, save_state
from .storage import load, save

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

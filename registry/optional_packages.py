"""Importing optional packages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any


def import_package(module: str, distribution: str, install: str) -> Any:
    """Import ``module`` of ``distribution``, which ``pip install`` ``install`` provides.

    Raises ``ImportError`` with that command if it is not installed or cannot be imported, or with the place of a file
    or folder of its name that Python finds instead, such as ``fla.py`` in the current folder.
    """
    top = module.partition(".")[0]
    cause: ImportError | None = None
    imported = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that there is no GPU; ``refuse`` reports it where it matters
            imported = importlib.import_module(module)
    except ImportError as error:
        cause = error
    instead = found_instead(top)
    if cause is None and instead is None:
        return imported
    command = f"pip install '{install}'"
    if instead is not None:
        problem = f"but Python finds {instead} in its place: rename that, and {command} if it is not installed"
    # ``None`` in ``sys.modules`` says that there is no such package
    elif isinstance(cause, ModuleNotFoundError) and (cause.name == top or sys.modules.get(top, cause) is None):
        problem = f"which is not installed: {command}"
    else:
        problem = f"which cannot be imported ({cause}): {command}"
    raise ImportError(f"needs {distribution}, {problem}") from cause


def found_instead(top: str) -> str | None:
    """The file, or folder without ``__init__.py``, that ``import top`` finds; ``None`` for a package or nothing."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a specification
        return None
    if spec is None or (spec.origin is not None and spec.submodule_search_locations is not None):
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)

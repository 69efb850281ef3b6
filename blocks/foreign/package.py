"""Packages that blocks from elsewhere need, which come with an extra."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def package(module: str, distribution: str, install: str) -> Any:
    """Import ``module`` of ``distribution``, which ``pip install`` ``install`` brings.

    Raises ``ImportError`` that says so where it is missing, or lacks something itself.
    """
    try:
        with warnings.catch_warnings():
            # that there is no GPU, and the like: it is said where it matters
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name in (top, module)
        said = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise ImportError(f"needs {distribution}, {said}: pip install '{install}'") from error

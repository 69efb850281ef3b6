"""Optional dependencies: packages of an extra."""

from __future__ import annotations

import importlib
from typing import Any

from .terminal import UsageError


def from_extra(module: str, extra: str, purpose: str) -> Any:
    """Import ``module`` of ``titans-build[extra]``, which ``purpose`` (such as ``--plot``) needs.

    Raises ``UsageError`` with the command that installs it if it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        missing = error.name is None or error.name.partition(".")[0] == top
        said = f"{purpose} needs {top}" if missing else f"{purpose} needs {top}, and that {error.name}"
        raise UsageError(f"{said}, which is not installed: pip install 'titans-build[{extra}]'") from None

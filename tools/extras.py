"""Optional dependencies: packages of an extra."""

from __future__ import annotations

from typing import Any

from ..registry.optional_packages import import_package
from .terminal import UsageError


def from_extra(module: str, extra: str, purpose: str) -> Any:
    """Import ``module`` of ``titans-build[extra]``, which ``purpose`` (such as ``--plot``) needs.

    Raises ``UsageError`` with the command that installs it if it is missing.
    """
    try:
        return import_package(module, module.partition(".")[0], f"titans-build[{extra}]")
    except ImportError as error:
        raise UsageError(f"{purpose} {error}") from None

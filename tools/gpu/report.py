"""The file with the results of measurements: where they were made, and writing it."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...recipes.atomic_write import atomic_write
from .runner import finite

WRITTEN = ("results", "plots", "README.md")
"""Parts of ``benchmarks/`` that measurements change."""


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Date, commit, and the versions of Python and of ``packages`` (``None``: not installed)."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(
            _git("status", "--porcelain", "--", ":/", *(f":(top,exclude)benchmarks/{x}" for x in WRITTEN))
        ),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
    }


def installed(name: str) -> str | None:
    """The installed version of a distribution, or ``None``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(file: Path, results: dict[str, Any]) -> None:
    """Write ``results`` to ``file`` atomically, with ``null`` for NaN and infinity, which JSON does not have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(results), indent=1, allow_nan=False)
    with atomic_write(file) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

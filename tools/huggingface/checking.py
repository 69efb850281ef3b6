"""Whether what was read from a folder is the whole model: transformers only warns, and draws what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...recipes import StorageError


def expect_whole(info: Mapping[str, Any], place: str, what: str) -> None:
    """Raise ``StorageError`` unless the loading info of transformers says that all was there, and nothing else."""
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} is not part of the model" for name in sorted(info["unexpected_keys"])]
    wrong += [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in sorted(info["mismatched_keys"])]
    if wrong:
        more = f" and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise StorageError(f"{place}: the weights do not fit {what}: {'; '.join(wrong[:3])}{more}")

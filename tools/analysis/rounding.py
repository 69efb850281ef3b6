"""Plain JSON of numbers as measured: four digits of each, and nothing where there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DIGITS = 5


def rounded(value: Any) -> Any:
    """Lists for arrays, ``None`` for NaN and infinity, numbers to ``DIGITS`` digits."""
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, dict):
        return {key: rounded(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(child) for child in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{DIGITS}g}")
    return value

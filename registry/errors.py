"""Errors of recipes: one ``Problem`` per mistake, all of them in one ``RecipeError``."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

SHOWN = 20
"""Problems that are printed."""
MAX_PROBLEMS = 100
"""Problems after which checking stops."""


class Problem(NamedTuple):
    """One mistake in a recipe."""

    path: str
    """Dotted path in the file, ``layers.mac.0.memory.depht``; empty for the file as a whole."""
    message: str
    """The value, the expected value, and the nearest valid name if there is one."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class RecipeError(ValueError):
    """A recipe, or one of its blocks, is invalid. ``str()`` of it is a message for the user."""

    def __init__(self, problems: Iterable[Problem], source: str = "recipe") -> None:
        self.problems = list(problems)
        self.source = source
        count = len(self.problems)
        lines = [f"{source}: {count} problem{'' if count == 1 else 's'}"]
        lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
        if count > SHOWN:
            lines.append(f"  ... and {count - SHOWN} more")
        super().__init__("\n".join(lines))


class Unavailable(RecipeError):
    """The recipe is valid, but this installation or device cannot build it: a package is missing, for example."""


def show(value: Any, width: int = 60) -> str:
    """Format a value for a message: one short line without control characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        # repr of a huge integer is slow, and refused by Python past 4300 digits
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict):
        inner = ", ".join(f"{show(k, 20)}: {show(v, 20)}" for k, v in list(value.items())[:3])
        text = "{" + inner + (", ..." if len(value) > 3 else "") + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(show(v, 20) for v in value[:3]) + (", ..." if len(value) > 3 else "") + "]"
    elif isinstance(value, str):
        text = repr(value[: width + 1])
    elif value is None or isinstance(value, bool):
        # as they are written in the file, not as Python writes them
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


SYNONYMS = {
    **{"fp16": ("float16", "bfloat16"), "half": ("float16", "bfloat16"), "bf16": ("bfloat16",)},
    **{"fp32": ("float32",), "float": ("float32",), "fp64": ("float64",), "double": ("float64",)},
    **{"learning_rate": ("lr",), "max_steps": ("steps",), "epochs": ("steps",), "num_train_epochs": ("steps",)},
    **{"sequence_length": ("length",), "seq_len": ("length",), "max_length": ("length",), "context": ("length",)},
    **{"grad_clip": ("clip",), "max_grad_norm": ("clip",), "gradient_accumulation_steps": ("accumulate",)},
    **{"gradient_checkpointing": ("recompute",), "per_device_train_batch_size": ("batch",), "temp": ("temperature",)},
}
"""Names that other libraries give, and ours."""


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'depth'?"``, or an empty string if no name is similar. ``name`` may be a wildcard."""
    # difflib is quadratic in the length of the words, and no right name is long, nor are there thousands of them
    if not isinstance(name, str) or len(name) > 100:
        return ""
    name = _compared(name)
    known = {_compared(candidate): candidate for candidate in itertools.islice(names, 500)}
    for synonym in SYNONYMS.get(name, ()):
        if synonym in known:
            return f"; did you mean {known[synonym]!r}?"
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    # among equals, the one of the same letters: mca is mac rather than mal
    matches.sort(key=lambda match: sorted(match) != sorted(name))
    return f"; did you mean {known[matches[0]]!r}?" if matches else ""


def _compared(name: str) -> str:
    """A name without the marks of options and wildcards."""
    return name.lower().strip("*?-").replace("-", "_")


def join(path: str, part: str | int) -> str:
    """Append a key or index to a path. A key that is not a plain word is quoted."""
    text = str(part) if isinstance(part, int) else part
    if not text or len(text) > 40 or not text.replace("_", "").replace("-", "").isalnum() or not text.isascii():
        text = show(text, 40)
    return f"{path}.{text}" if path else text

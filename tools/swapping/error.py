"""What stands in the way of a swap, or of a call of a swapped model."""

from __future__ import annotations

from collections.abc import Sequence


class SwapError(ValueError):
    """A swap that cannot be made or a call that does not fit it: which module, what came and what was expected."""


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise one ``SwapError`` that lists all of ``problems``, if there are any."""
    if problems:
        count = len(problems)
        head = f"{what}: {count} problem{'' if count == 1 else 's'}; the model is as it was"
        shown = [f"  {problem}" for problem in problems[:10]]
        if count > 10:
            shown.append(f"  ... and {count - 10} more")
        raise SwapError("\n".join([head, *shown]))

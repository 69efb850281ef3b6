"""How fast a device runs the kernels and whole models: what is timed, in which order, and what is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from .sizes import FULL, Sizes
from .speed_memories import blocks, decoding, memories, rules
from .speed_models import attentions, models, streams
from .timing import Case, wait


def cases(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """Everything, what matters most first: a run may be cut short."""
    kinds = (memories, blocks, rules, decoding, models, attentions, streams)
    return sorted((case for kind in kinds for case in kind(device, dtype, sizes)), key=lambda case: case.rank)


def timed(cases: Sequence[Case], red: Mapping[str, set[str]], device: torch.device) -> tuple[list[Case], list[str]]:
    """The cases without those in which something runs that failed, and those failures."""
    reasons: dict[str, None] = {}
    kept = []
    for case in cases:
        if case.backend.partition(",")[0] in red.get(case.operation, ()):
            reasons[f"{case.operation}, {case.backend}: failed its parity"] = None
        elif red and not case.operation and case.backend.startswith("auto"):
            named = ", ".join(f"{backend} of {operation}" for operation, found in red.items() for backend in found)
            reasons[f"{case.what}: may run what failed its parity: {named}"] = None
        else:
            kept.append(case)
    return kept, list(reasons)


def warming(device: torch.device, dtype: torch.dtype) -> list[Callable[[], str]]:
    """Each runs one of the kernels to be timed, briefly, so that it is compiled; it returns what went wrong."""
    sizes = FULL._replace(lengths=FULL.lengths[:1], texts=FULL.texts[:1])

    def briefly(case: Case) -> str:
        try:
            case.make()()
            wait(device)
        except Exception as error:  # it will be a row that says so
            return f"{type(error).__name__}: {error}"
        return ""

    return [
        functools.partial(briefly, case)
        for case in cases(device, dtype, sizes)
        if (case.direction == "both" or case.what == "memory step")
        and not (case.what == "attention" or case.backend in ("torch", "titans-pytorch") or "compiled" in case.backend)
    ]

"""What a trial takes of the machine's memory, said before it is started: the system ends a process without a word."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..blocks.memory import NeuralMemory
from ..kernels.dispatch import OPERATIONS, VARIABLE
from ..recipes import Recipe
from ..recipes.composing import machine_memory
from .survey import with_shapes
from .trial import ROWS, length_of

COPIES = 7
"""What the reference of the memory keeps for every token while it is trained, in copies of the memory's weights. It is
autograd that keeps them, so this is measured: 7 to 15, more where a row has many chunks."""


class Need(NamedTuple):
    """A trial's memory against the machine's."""

    text: str
    """How much, what for, and what would take less."""
    enough: bool
    """Whether the machine has it."""


def large_need(recipe: Recipe, bytes_read: int, dtype: torch.dtype) -> Need | None:
    """What a trial on the CPU needs, at the least, when that is more than half of this machine's memory.

    Raises ``BackendError`` when the environment asks for a backend that there is not.
    """
    have = machine_memory()
    if have is None:
        return None
    model = with_shapes(recipe)
    # training: weights, gradients and Adam's two moments; afterwards a float64 copy beside weights and gradients
    parameters = sum(tensor.numel() for tensor in model.parameters()) * max(4 * dtype.itemsize, 2 * dtype.itemsize + 8)
    kept = 0
    operation = OPERATIONS["memory"]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if operation.choose(device="cpu", dtype=real) is operation.backends["reference"].run:
        tokens = ROWS * length_of(bytes_read)
        weights = sum(
            tensor.numel()
            for block in model.modules()
            if isinstance(block, NeuralMemory)
            for tensor in block.init_state(1).memory.weights
        )
        kept = COPIES * tokens * weights * real.itemsize
    if parameters + kept <= have / 2:
        return None
    text = f"the trial takes at least {(parameters + kept) / 2**30:,.1f} GiB, this machine has {have / 2**30:,.1f} GiB"
    if kept > parameters:
        text += (
            f"\n  the memory's reference keeps its weights for every token; let something else run the memory "
            f"({VARIABLE}=reference,memory=torch), or try a smaller recipe or fewer bytes"
        )
    else:
        text += "\n  training takes four times the weights: try a smaller recipe, or --dtype bfloat16"
    return Need(text, parameters + kept <= have)

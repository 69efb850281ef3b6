"""Work buffers of the chunkwise form; their lists run over the layers of the memory network."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HELD_BYTES = 128 * 2**20
"""Work buffers up to this size wait for the next call."""


class Work(NamedTuple):
    """What writing a group leaves behind for its reads and its backward."""

    stacks: list[Tensor]
    """State at every chunk start and at the end: ``[chunks + 1, rows, s, out, in]``."""
    inputs: list[Tensor]
    """``a_l``: ``[chunks, rows, b, in]``; the first is the keys themselves and is set by the writer."""
    hidden: list[Tensor]
    """``z_l`` before the activation, and the last layer's output: ``[chunks, rows, b, out]``."""
    pulled: list[Tensor]
    """``d_{l+1} W_{l+1}``, before the slope at ``z_l``: layers below the last; kept for backward only."""
    raw: list[Tensor]
    """``d_l`` before clipping: ``[chunks, rows, b, out]``; the same tensors as ``errors`` where nothing is clipped."""
    errors: list[Tensor]
    """``d_l``."""

    @classmethod
    def allocate(
        cls, chunks: int, rows: int, b: int, stacks: Sequence[Tensor], scratch: Scratch, *, pulled: bool, clipped: bool
    ) -> Work:
        """For ``chunks`` chunks of ``b`` tokens and states like ``stacks`` ``[rows, s, out, in]``, from ``scratch``.

        ``pulled``: for backward too. ``clipped``: with errors apart from the raw ones.
        """
        shapes = [stack.shape[-3:] for stack in stacks]
        token = lambda name, l, width: scratch(f"{name} {l}", chunks, rows, b, width)  # noqa: E731
        outs = list(enumerate(out for _, out, _ in shapes))
        raw = [token("raw", l, out) for l, out in outs]
        return cls(
            [scratch(f"stack {l}", chunks + 1, rows, *shape) for l, shape in enumerate(shapes)],
            [token("input", l, width) for l, (_, _, width) in enumerate(shapes)],
            [token("hidden", l, out) for l, out in outs],
            [token("pulled", l, out) for l, out in outs[:-1]] if pulled else [],
            raw,
            [token("error", l, out) for l, out in outs] if clipped else raw,
        )

    def first(self, chunks: int) -> Work:
        """The same buffers for a group of ``chunks`` chunks."""
        raw = [x[:chunks] for x in self.raw]
        errors = raw if self.errors is self.raw else [x[:chunks] for x in self.errors]
        inputs, hidden, pulled = ([x[:chunks] for x in part] for part in (self.inputs, self.hidden, self.pulled))
        return Work([x[: chunks + 1] for x in self.stacks], inputs, hidden, pulled, raw, errors)

    def at(self, i: int | slice) -> Work:
        """Chunk ``i``, or several as one batch of ``chunks * rows``; stacks are those at chunk starts."""
        pick = (lambda x: x[i]) if isinstance(i, int) else (lambda x: x[i].flatten(0, 1))
        raw = [pick(x) for x in self.raw]
        errors = raw if self.errors is self.raw else [pick(x) for x in self.errors]
        inputs, hidden, pulled = ([pick(x) for x in part] for part in (self.inputs, self.hidden, self.pulled))
        chunks = len(self.raw[0])
        return Work([pick(x[:chunks]) for x in self.stacks], inputs, hidden, pulled, raw, errors)


class Adjoint(NamedTuple):
    """Gradients of a group's stacks, inputs and errors; reads fill them, writes add to them."""

    stacks: list[Tensor]
    inputs: list[Tensor]
    errors: list[Tensor]

    @classmethod
    def allocate(cls, work: Work, scratch: Scratch) -> Adjoint:
        """In the shapes of ``work``, from ``scratch``."""
        like = lambda name, part: [scratch(f"grad {name} {l}", *x.shape) for l, x in enumerate(part)]  # noqa: E731
        return cls(like("stack", work.stacks), like("input", work.inputs), like("error", work.errors))

    def first(self, chunks: int) -> Adjoint:
        """The same buffers for a group of ``chunks`` chunks."""
        short = [[x[:chunks] for x in part] for part in (self.inputs, self.errors)]
        return Adjoint([x[: chunks + 1] for x in self.stacks], *short)


class Scratch:
    """Named temporaries that outlive a call: a fresh page costs more than the arithmetic done on it."""

    _local = threading.local()

    def __init__(self, like: Tensor) -> None:
        self._dtype, self._device = like.dtype, like.device
        self._buffers: dict[str, Tensor] = {}

    @classmethod
    def of(cls, like: Tensor) -> Scratch:
        """This thread's temporaries in the dtype and on the device of ``like``."""
        known = cls._local.__dict__.setdefault("known", {})
        key = (like.dtype, like.device)
        if key not in known:
            known[key] = cls(like)
        return known[key]

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; the next call with this name reuses its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return buffer[:size].view(shape)

    def release(self) -> None:
        """The call is over: what is larger than ``HELD_BYTES`` is given back."""
        if sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values()) > HELD_BYTES:
            self._buffers.clear()

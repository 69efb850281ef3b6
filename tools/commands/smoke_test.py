"""The smoke test of ``--try``: whether a model learns from bytes and streams exactly, its speed, and some output."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...blocks.language_model import LanguageModel
from ...blocks.memory import NeuralMemory
from ...kernels.dispatch import OPERATIONS, VARIABLE
from ...recipes import Recipe
from ...recipes.build import machine_memory
from ..options import expect_text_file
from ..terminal import UsageError, complain
from .model_summary import on_meta

BYTES = 256
"""Token ids are byte values."""

ROWS, LENGTH = 2, 192
"""Rows and bytes per row of the training batch; a shorter text gives shorter rows."""
STEPS = 6
STREAM = 384
"""Bytes of the comparison between one pass and streaming."""
CUTS = (1, 7, 64, 3, 129, 1)
"""Lengths of the pieces, repeated: single bytes, and lengths that fit no usual chunk, segment or window."""
NEW = 64
"""Bytes generated."""

ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference between streaming and one pass, over the largest logit: the order of rounding differs."""
AMPLIFIED = 10
"""A memory may amplify rounding errors (repetitive text, small chunks). Streaming may therefore differ from one pass by
this factor times the difference between one pass and the same pass in float64. A float64 copy of the model shows errors
in a state: there, streaming and one pass agree to many digits unless they compute different functions."""
COPIES = 7
"""Copies of the memory's weights that autograd keeps for every token with the reference backend: measured 7 to 15, more
for rows of many chunks."""


@dataclass(frozen=True)
class SmokeTest:
    """The results. Speeds are tokens per second of one row; bits are per byte, on the training batch."""

    bytes_read: int
    rows: int
    length: int
    steps: int
    bits_before: float
    bits_after: float
    learns: bool
    cuts: list[int]
    difference: float
    """Largest difference between the logits of streaming and of one pass, in the model's dtype."""
    difference_float64: float | None
    """The same in a float64 copy; ``None`` on a device without float64."""
    allowed: float
    scale: float
    """Largest logit."""
    streams: bool
    prefill: float
    decode: float
    generated: str

    @property
    def failure(self) -> str:
        """The reason of the failure, or an empty string."""
        faults = []
        if not self.learns:
            faults.append(
                f"training did not lower the loss: {self.bits_before:.3f} -> {self.bits_after:.3f} bits per byte"
            )
        if not self.streams:
            double = "" if self.difference_float64 is None else f", in float64 by {self.difference_float64:.1e}"
            faults.append(
                f"streaming differs from one pass by {self.difference:.1e} (allowed {self.allowed:.0e}){double}"
            )
        return "; ".join(faults)

    def to_dict(self) -> dict[str, object]:
        """Plain data, with ``None`` for NaN and infinity, which JSON does not have."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
        }


def read_bytes(path: str) -> bytes:
    """The bytes at the start of a file that the test uses. Raises ``UsageError`` if there are too few."""
    try:
        expect_text_file(path, "--try")
        with open(path, "rb") as file:
            text = file.read(ROWS * (LENGTH + 1))
    except (OSError, ValueError) as error:
        raise UsageError(f"--try {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) < 2 * ROWS:
        raise UsageError(
            f"--try {path}: {len(text)} bytes are too few to try a model on; {2 * ROWS} or more are needed"
        )
    return text


def check_memory(recipe: Recipe, bytes_read: int, dtype: torch.dtype) -> None:
    """Compare the memory that the test needs at least on the CPU with that of this machine.

    The operating system ends a process that takes too much without a message. Prints a warning for more than half of
    the memory and raises ``UsageError`` for more than all of it. Raises ``BackendError`` when the environment names a
    backend that does not exist.
    """
    have = machine_memory()
    if have is None:
        return
    model = on_meta(recipe)
    # training: weights, gradients and Adam's two moments; afterwards a float64 copy beside weights and gradients
    parameters = sum(tensor.numel() for tensor in model.parameters()) * max(4 * dtype.itemsize, 2 * dtype.itemsize + 8)
    kept = 0
    operation = OPERATIONS["memory"]
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if operation.choose(device="cpu", dtype=compute_dtype) is operation.backends["reference"].run:
        memories = [block.init_state(1).memory for block in model.modules() if isinstance(block, NeuralMemory)]
        weights = sum(tensor.numel() for memory in memories for tensor in memory.weights)
        kept = COPIES * ROWS * _length(bytes_read) * weights * compute_dtype.itemsize
    if parameters + kept <= have / 2:
        return
    if kept > parameters:
        why = (
            "the memory's reference keeps its weights for every token; let another backend run the memory "
            f"({VARIABLE}=reference,memory=torch), or try a smaller recipe or fewer bytes"
        )
    else:
        why = "training takes four times the weights: try a smaller recipe, or --dtype bfloat16"
    text = f"--try takes at least {(parameters + kept) / 2**30:,.1f} GiB, this machine has {have / 2**30:,.1f} GiB"
    if parameters + kept > have:
        raise UsageError(f"{text}\n  {why}")
    complain(f"{text}\n  {why}", "warning")


def smoke_test(model: LanguageModel, text: bytes, announce: Callable[[str], None] = lambda text: None) -> SmokeTest:
    """Train ``model`` (in place) for a few steps on ``text``, and test it. Calls ``announce`` before each long part."""
    device = next(model.parameters()).device
    tokens = torch.tensor(list(text), dtype=torch.int64, device=device)
    length = _length(len(text))
    batch = tokens[: ROWS * (length + 1)].view(ROWS, length + 1)
    announce(f"training for {STEPS} steps on {ROWS} x {length} bytes ...")
    before, after = _train(model, batch)
    stream = tokens[None, :STREAM]
    announce(f"reading {stream.shape[1]} bytes at once and in pieces ...")
    if device.type != "cpu":
        _logits(model, stream)  # compiles kernels
    whole, seconds = _timed(device, lambda: _logits(model, stream))
    cuts = _cuts(stream.shape[1])
    difference = _difference(_stream(model, stream, cuts), whole)
    scale = float(whole.abs().max())
    allowed = ALLOWED[next(model.parameters()).dtype] * scale
    exact = None
    if device.type != "mps":
        announce("the same in float64 ...")
        double = copy.deepcopy(model).double()
        exactly = _logits(double, stream)
        exact = _difference(_stream(double, stream, cuts), exactly)
        allowed = max(allowed, AMPLIFIED * _difference(whole, exactly))
    announce(f"generating {NEW} bytes ...")
    generated, decode = _generate(model, stream[:, -64:])
    return SmokeTest(
        bytes_read=len(text),
        rows=ROWS,
        length=length,
        steps=STEPS,
        bits_before=before,
        bits_after=after,
        learns=math.isfinite(after) and after < before,
        cuts=cuts,
        difference=difference,
        difference_float64=exact,
        allowed=allowed,
        scale=scale,
        streams=difference <= allowed and (exact is None or exact <= ALLOWED[torch.float64] * scale),
        prefill=whole.shape[1] / seconds,
        decode=decode,
        generated=generated,
    )


def _length(bytes_read: int) -> int:
    """Bytes per row of the training batch."""
    return bytes_read // ROWS - 1


def _train(model: LanguageModel, batch: Tensor) -> tuple[float, float]:
    """Bits per byte before and after a few steps on ``batch`` [rows, length + 1]."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    # Adam changes every weight by about the rate, and weights of a wider model must change less
    rate = 0.75 / max(model.dim, BYTES)
    # 1e-8, Adam's usual epsilon, is zero in float16
    epsilon = max(1e-8, torch.finfo(next(model.parameters()).dtype).smallest_normal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=epsilon)
    before = math.nan
    for step in range(STEPS):
        loss = model(inputs, targets=targets).loss
        if step == 0:
            before = _bits(loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after = _bits(model(inputs, targets=targets).loss)
    return before, after


def _bits(loss: Tensor) -> float:
    return loss.item() / math.log(2)


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens).logits
    return logits


@torch.no_grad()
def _stream(model: LanguageModel, tokens: Tensor, cuts: list[int]) -> Tensor:
    state, logits = None, []
    for piece in tokens.split(cuts, dim=1):
        out = model(piece, state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _cuts(length: int) -> list[int]:
    cuts: list[int] = []
    while sum(cuts) < length:
        cuts.append(min(CUTS[len(cuts) % len(CUTS)], length - sum(cuts)))
    return cuts


def _generate(model: LanguageModel, prompt: Tensor) -> tuple[str, float]:
    """A few bytes generated after ``prompt``, and the speed in bytes per second."""
    start = model.generate(prompt, 1, temperature=0.8, top_k=40, seed=0)
    settings = {"state": start.state, "logits": start.logits, "temperature": 0.8, "top_k": 40, "seed": 0}
    generation, seconds = _timed(prompt.device, lambda: model.generate(prompt[:, :0], NEW, **settings))
    new = [start.tokens[0, -1].item(), *generation.tokens[0].tolist()]
    # a larger vocabulary has tokens that are not bytes
    return bytes(min(int(token), BYTES - 1) for token in new).decode("utf-8", errors="replace"), NEW / seconds


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``work`` and its seconds, including the work it started on the device."""
    started = time.perf_counter()
    result = work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return result, time.perf_counter() - started

"""Whether every backend on a device computes what the reference computes in float64, outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..kernels import dispatch
from ..kernels.attention import Prefix, attention
from ..kernels.convolution import causal_convolution
from ..kernels.gate import gate, gated_norm, swiglu
from ..kernels.memory import MemoryState, titans_memory
from ..kernels.memory.reading import read_memory
from ..kernels.normalisation import l2_norm, rms_norm
from ..kernels.rotary import rotate

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest ``rms(out - ref) / rms(ref)``, with the reference in float64 on the same rounded inputs."""

Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """An operation on inputs: what a backend is held to."""

    name: str
    operation: str
    make: Callable[[torch.Generator], Inputs]
    """float64 tensors on the CPU, and tensors of other kinds, by name."""
    run: Callable[..., Sequence[Tensor]]
    """``run(backend, **inputs)``: every output, in an order of its own."""
    learns: bool = True
    """Whether there is a backward, too; decoding has none."""


class Outcome(NamedTuple):
    """One backend on one case."""

    operation: str
    backend: str
    case: str
    precision: str
    error: float
    """The largest of all outputs' and gradients' ratios; NaN where there is a NaN that should not be."""
    tolerance: float
    refused: str = ""
    failed: str = ""
    """What it raised instead, if anything."""

    @property
    def passed(self) -> bool:
        return bool(self.refused) or self.error <= self.tolerance


def outcomes(device: torch.device, precisions: Sequence[str]) -> Iterator[Outcome]:
    """Every case with every backend but the reference, at every precision of ``TOLERANCE``."""
    for case in CASES:
        expected: dict[torch.dtype, list[Tensor]] = {}  # by the dtype that the inputs were rounded to
        for precision in precisions:
            for backend in dispatch.OPERATIONS[case.operation].backends:
                if backend != REFERENCE:
                    yield _outcome(case, backend, device, precision, expected)


def count(precisions: Sequence[str]) -> int:
    """How many outcomes there will be."""
    return len(precisions) * sum(len(dispatch.OPERATIONS[case.operation].backends) - 1 for case in CASES)


REFERENCE = "reference"


def _outcome(
    case: Case, backend: str, device: torch.device, precision: str, expected: dict[torch.dtype, list[Tensor]]
) -> Outcome:
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    said = Outcome(case.operation, backend, case.name, precision, math.nan, TOLERANCE[precision])
    given = {name: _rounded(name, x, dtype) for name, x in case.make(torch.Generator().manual_seed(0)).items()}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        found = _pass(case, backend, {name: x.to(device) for name, x in given.items()})
    except dispatch.BackendError as error:
        return said._replace(refused=str(error).rpartition("cannot run: ")[2])
    except Exception as error:  # a kernel that does not compile, an illegal address: the others are still to be tried
        return said._replace(failed=f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0])
    finally:
        torch.set_float32_matmul_precision(before)
    if dtype not in expected:
        exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        expected[dtype] = _pass(case, REFERENCE, exact)
    return said._replace(error=max(map(_ratio, found, expected[dtype]), key=lambda x: (math.isnan(x), x)))


def _rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return x
    # the state of a memory is float32 at least
    wide = name.startswith("state") and dtype.itemsize < 4
    return x.to(torch.float32 if wide else dtype)


def _pass(case: Case, backend: str, inputs: Inputs) -> list[Tensor]:
    """Outputs, and gradients of all that is real, from a cotangent that is the same every time."""
    if not case.learns:
        with torch.no_grad():
            return list(case.run(backend, **inputs))
    leaves = {name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    made = list(case.run(backend, **leaves))
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=random, dtype=torch.float64).to(y) for y in made]
    real = [x for x in leaves.values() if x.requires_grad]
    grads = torch.autograd.grad(made, real, cotangents, allow_unused=True)
    return [*made, *(torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, real))]


def _ratio(found: Tensor, expected: Tensor) -> float:
    found = found.detach().to("cpu", torch.float64)
    scale = expected.detach().square().mean().sqrt().item()
    error = (found - expected.detach()).square().mean().sqrt().item()
    return error / scale if scale else error


# -- the cases ---------------------------------------------------------------------------------------------------------


def _normal(random: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=random, dtype=torch.float64)


class Memory(NamedTuple):
    """A case of the memory: what differs from the first one is what it is about."""

    name: str
    time: int = 50
    chunk: int = 16
    batch: int = 2
    heads: int = 2
    d: int = 32
    expansion: int = 2
    depth: int = 2
    activation: str = "gelu"
    norm: bool = True
    momentum: bool = True
    forgetting: bool = True
    clip: float | None = None
    read: str = "after"
    masked: bool = False
    started: bool = False
    """Rows begin at different positions within a chunk."""
    extremes: bool = False
    """Some gates are exactly 0 and 1."""

    def make(self, random: torch.Generator) -> Inputs:
        tokens = (self.batch, self.time, self.heads)
        found = {
            "q": normalize(_normal(random, *tokens, self.d), dim=-1),
            "k": normalize(_normal(random, *tokens, self.d), dim=-1),
            "v": _normal(random, *tokens, self.d),
            "theta": 0.1 * torch.sigmoid(_normal(random, *tokens) - 1),
        }
        if self.momentum:
            found["eta"] = torch.sigmoid(_normal(random, *tokens) + 1)
        if self.forgetting:
            found["alpha"] = torch.sigmoid(_normal(random, *tokens) - 4)
        if self.extremes:
            for name, value in (("theta", 0.0), ("eta", 1.0), ("alpha", 0.0), ("eta", 0.0)):
                found[name][torch.rand(tokens, generator=random) < 0.2] = value
        if self.norm:
            found["gain"] = 1 + _normal(random, self.heads, self.d, scale=0.1)
        widths = [self.d, *[self.d * self.expansion] * (self.depth - 1), self.d]
        for part, scale in (("weights", 1.0), *([("momentum", 0.01)] if self.momentum else ()), ("anchor", 1.0)):
            for layer, (in_, out) in enumerate(pairwise(widths)):
                x = _normal(random, self.batch, self.heads, out, in_, scale=scale * in_**-0.5)
                found[f"state_{part}_{layer}"] = x
        if self.masked:
            found["mask"] = torch.rand(self.batch, self.time, generator=random) < 0.7
        steps = torch.arange(self.batch) * 5 + 3
        found["position"] = steps if self.started else torch.zeros_like(steps)
        return found

    def run(self, backend: str, **given: Tensor) -> list[Tensor]:
        parts = {
            part: tuple(x for name, x in given.items() if name.startswith(f"state_{part}_"))
            for part in ("weights", "momentum", "anchor")
        }
        state = MemoryState(parts["weights"], parts["momentum"], parts["anchor"], given["position"])
        q, k, v, theta = (given[name] for name in ("q", "k", "v", "theta"))
        y, after = titans_memory(
            q, k, v, theta, given.get("eta"), given.get("alpha"), state, self.chunk, self.activation, given.get("gain"),
            given.get("mask"), backend, clip=self.clip, read=self.read,
        )  # fmt: skip
        return [y, *after.weights, *after.momentum, *after.anchor]

    def case(self, learns: bool = True) -> Case:
        return Case(self.name if learns else f"{self.name}, decoding", "memory", self.make, self.run, learns)


MEMORIES = (
    Memory("two layers"),
    Memory("one layer", depth=1),
    Memory("linear, no norm", depth=1, norm=False, activation="identity"),
    Memory("SiLU", activation="silu"),
    Memory("ReLU", activation="relu"),
    Memory("identity", activation="identity"),
    Memory("no norm", norm=False),
    Memory("no momentum", momentum=False),
    Memory("no forgetting", forgetting=False),
    Memory("neither", momentum=False, forgetting=False),
    Memory("clipped", clip=0.5),
    Memory("read before write", read="before"),
    Memory("masked", masked=True),
    Memory("inside chunks", started=True),
    Memory("masked, inside chunks, clipped", masked=True, started=True, clip=0.5),
    Memory("gates of 0 and 1", extremes=True),
    Memory("15 tokens", time=15),
    Memory("63 tokens", time=63, chunk=64),
    Memory("chunk 64", time=100, chunk=64),
    Memory("chunk 128", time=150, chunk=128),
    Memory("width 64, expansion 4", d=64, expansion=4, chunk=64, time=80),
    Memory("width 128", d=128, expansion=1, chunk=32, time=70),
    Memory("width 16", d=16, expansion=1),
    Memory("one token", time=1),
    Memory("one token inside a chunk", time=1, started=True, clip=0.5),
    Memory("one token, read before write", time=1, read="before"),
    Memory("one token of one layer", time=1, depth=1, norm=False),
    Memory("three layers", depth=3, time=20),
)


def _reading(random: torch.Generator) -> Inputs:
    made = Memory("", time=77).make(random)
    return {name: made[name] for name in ("q", "gain", "state_weights_0", "state_weights_1")}


def _read(backend: str, q: Tensor, gain: Tensor, **weights: Tensor) -> list[Tensor]:
    return [read_memory(q, tuple(weights.values()), norm=gain, backend=backend)]


def _attending(
    name: str,
    time: int,
    window: int | None,
    persistent: int = 0,
    step: int = 1,
    kv_heads: int = 4,
    ragged: bool = False,
) -> Case:
    def make(random: torch.Generator) -> Inputs:
        found = {"q": _normal(random, 2, time, 4, 64)}
        for each in ("k", "v"):
            found[each] = _normal(random, 2, (time - 1) * step + 9, kv_heads, 64)
        if persistent:
            found["prefix_q"] = _normal(random, 2, time, 4, 64)
            for each in ("prefix_k", "prefix_v"):
                found[each] = _normal(random, 2, persistent, kv_heads, 64)
        if ragged:
            found["start"] = torch.tensor([0, 7])
        return found

    def run(
        backend: str, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, **prefix: Tensor
    ) -> list[Tensor]:
        first = Prefix(prefix["prefix_q"], prefix["prefix_k"], prefix["prefix_v"]) if prefix else None
        return [attention(q, k, v, window=window, start=start, prefix=first, step=step, backend=backend)]

    return Case(name, "attention", make, run)


def _gating(random: torch.Generator) -> Inputs:
    gains = {f"gain_{x}": 1 + _normal(random, 96, scale=0.1) for x in "ab"}
    return {"a": _normal(random, 2, 100, 96), "b": _normal(random, 2, 100, 96), **gains}


def _convolving(random: torch.Generator) -> Inputs:
    return {"x": _normal(random, 2, 100, 96), "weight": _normal(random, 96, 4), "history": _normal(random, 2, 3, 96)}


def _normed_heads(random: torch.Generator) -> Inputs:
    return {"y": _normal(random, 2, 100, 4, 24), "gain": _normal(random, 4, 24), "g": _normal(random, 2, 100, 96)}


def _placed(random: torch.Generator) -> Inputs:
    return {"x": _normal(random, 2, 100, 4, 32), "position": torch.arange(100).expand(2, -1).clone()}


def _gate(backend: str, a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor) -> list[Tensor]:
    return [gate(a, b, gain_a, gain_b, backend=backend)]


CASES: tuple[Case, ...] = (
    *(memory.case() for memory in MEMORIES),
    *(memory.case(learns=False) for memory in MEMORIES if memory.time == 1),
    Case("read", "memory_read", _reading, _read),
    _attending("causal", 100, None),
    _attending("window", 150, 32),
    _attending("prefix and window", 150, 32, persistent=8),
    _attending("prefix of any length", 150, 32, persistent=5),
    _attending("grouped heads", 100, 32, kv_heads=2),
    _attending("segment", 64, None, persistent=8, step=2),
    _attending("rows that begin later", 100, 32, ragged=True),
    Case("gate", "gate", _gating, _gate),
    Case("gated norm", "gated_norm", _normed_heads, lambda backend, **x: [gated_norm(**x, backend=backend)]),
    Case("SwiGLU", "swiglu", lambda r: {"x": _normal(r, 2, 100, 192)}, lambda b, x: [swiglu(x, backend=b)]),
    Case(
        "RMSNorm",
        "rms_norm",
        lambda random: {"x": _normal(random, 2, 100, 96), "gain": _normal(random, 96)},
        lambda backend, x, gain: [rms_norm(x, gain, backend=backend)],
    ),
    Case("L2 norm", "l2_norm", lambda r: {"x": _normal(r, 2, 100, 4, 24)}, lambda b, x: [l2_norm(x, backend=b)]),
    Case("convolution", "convolution", _convolving, lambda b, **x: [causal_convolution(**x, backend=b)]),
    Case("rotary", "rotary", _placed, lambda backend, x, position: [rotate(x, position, backend=backend)]),
)

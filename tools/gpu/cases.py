"""What every backend on a device is held to: each operation on inputs that leave none of its ways untried.

``kernels`` with an operation or a backend that no case reaches fail a test: ``tests/tools/gpu/test_cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...kernels.attention import Prefix, attention
from ...kernels.attention.decode import Cache, cached_attention
from ...kernels.dispatch import OPERATIONS
from ...kernels.linear import project
from ...kernels.memory import MemoryState, read_memory, titans_memory
from ...kernels.norm_gate import gate, gated_norm, l2_norm, rms_norm, swiglu
from ...kernels.norm_gate.decode import feed_forward, gated_output
from ...kernels.rotary import rotate
from ...kernels.scan import linear_scan
from ...kernels.short_conv import causal_convolution, query, query_key_value
from ...kernels.short_conv.decode import Layers, memory_inputs

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
    thorough: bool = True
    """At every precision; else at float32 and, on a GPU, bfloat16, which kernels that are compiled for each take less
    time for."""
    rounds: bool = False
    """Whether a LayerNorm enlarges what its inputs are rounded by: see ``parity.bounds``."""
    schedule: str = "auto"
    """Of the kernels that have two, ``kernels.memory.triton.schedule.SCHEDULES``."""


def cases(small: bool = False) -> tuple[Case, ...]:
    """All, in the order of what matters most. ``small``: for an interpreter of kernels."""
    memories = [memory.small() if small else memory for memory in MEMORIES]
    return (
        *(memory.case() for memory in memories),
        *(memory.case(learns=False) for memory in memories if memory.time == 1),
        *_READINGS,
        *_ATTENTIONS,
        *_OTHERS,
    )


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
    thorough: bool = False
    schedule: str = "auto"

    def small(self) -> Memory:
        """The same with fewer programs, each of which an interpreter takes its time for."""
        differ = self.masked or self.started
        time = min(self.time, self.chunk + self.chunk // 4 + 1)
        return self._replace(batch=2 if differ else 1, heads=1, d=16 if self.d == 32 else self.d, time=time)

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
        name = self.name if learns else f"{self.name}, decoding"
        return Case(name, "memory", self.make, self.run, learns, self.thorough, self.norm, self.schedule)


MEMORIES = (
    Memory("two layers", thorough=True),
    Memory("one layer", depth=1, thorough=True),
    Memory("two layers, streamed", schedule="streamed"),
    Memory("two layers, resident", schedule="resident"),
    Memory("one layer, streamed", depth=1, schedule="streamed"),
    Memory("clipped and masked, streamed", clip=0.5, masked=True, started=True, schedule="streamed"),
    Memory("width 64, streamed", d=64, chunk=64, time=80, schedule="streamed"),
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
    Memory("gates of 0 and 1, streamed", extremes=True, schedule="streamed"),
    Memory("gates of 0 and 1, resident", extremes=True, schedule="resident"),
    Memory("one row, one head, one chunk", batch=1, heads=1, time=16),
    Memory("one row, one head, streamed", batch=1, heads=1, time=20, depth=1, schedule="streamed"),
    Memory("chunk 8", chunk=8),
    Memory("chunk 5, inside chunks, resident", chunk=5, started=True, clip=0.5, schedule="resident"),
    Memory("chunk 5, inside chunks, streamed", chunk=5, started=True, clip=0.5, schedule="streamed"),
    Memory("chunk 1", time=9, chunk=1, batch=1, heads=1),
    Memory("15 tokens", time=15),
    Memory("63 tokens", time=63, chunk=64),
    Memory("chunk 64", time=100, chunk=64),
    Memory("chunk 128", time=150, chunk=128),
    Memory("width 64, expansion 2", d=64, chunk=64, time=80, thorough=True),
    Memory("width 64, expansion 4", d=64, expansion=4, chunk=64, time=80),
    Memory("width 64, one layer", d=64, depth=1, chunk=64, time=80),
    Memory("width 128", d=128, expansion=1, chunk=32, time=70),
    Memory("width 16", d=16, expansion=1),
    Memory("one token", time=1, thorough=True),
    Memory("one token inside a chunk", time=1, started=True, clip=0.5),
    Memory("one token, read before write", time=1, read="before"),
    Memory("one token of one layer", time=1, depth=1, norm=False),
    Memory("three layers", depth=3, time=20),
)


def _reading(
    name: str, time: int = 77, d: int = 32, depth: int = 2, norm: bool = True, activation: str = "gelu",
    learns: bool = True, batch: int = 2, heads: int = 2,
) -> Case:  # fmt: skip
    def make(random: torch.Generator) -> Inputs:
        made = Memory("", time=time, batch=batch, heads=heads, d=d, depth=depth, norm=norm).make(random)
        return {name: x for name, x in made.items() if name in ("q", "gain") or name.startswith("state_weights_")}

    def run(backend: str, q: Tensor, gain: Tensor | None = None, **weights: Tensor) -> list[Tensor]:
        return [read_memory(q, tuple(weights.values()), activation, gain, backend=backend)]

    return Case(name, "memory_read", make, run, learns, rounds=norm)


_READINGS = (
    _reading("read"),
    _reading("read, one layer", depth=1),
    _reading("read, no norm", norm=False, activation="silu"),
    _reading("read, width 128", time=20, d=128, activation="relu"),
    _reading("read, one token", time=1),
    _reading("read, one row, one head", batch=1, heads=1),
    _reading("read, one token, decoding", time=1, learns=False),
)


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


_ATTENTIONS = (
    _attending("causal", 100, None),
    _attending("window", 150, 32),
    _attending("prefix and window", 150, 32, persistent=8),
    _attending("prefix of any length", 150, 32, persistent=5),
    _attending("grouped heads", 100, 32, kv_heads=2),
    _attending("segment", 64, None, persistent=8, step=2),
    _attending("segment and window", 64, 21, persistent=8, step=2),
    _attending("rows that begin later", 100, 32, ragged=True),
)


def _token(random: torch.Generator) -> Inputs:
    """What a token is before any memory or attention: a projection, with a convolution's weights and history."""
    convolution = {"weight": _normal(random, 96, 4), "history": _normal(random, 2, 3, 96)}
    return {"projected": _normal(random, 2, 1, 96), **convolution}


def _tokens(random: torch.Generator) -> Inputs:
    return {**_token(random), "projected": _normal(random, 2, 50, 96), "length": torch.tensor([50, 31])}


def _query(backend: str, projected: Tensor, weight: Tensor, history: Tensor) -> list[Tensor]:
    return [query(projected[..., :32].contiguous(), weight, history, 4, backend=backend)]


def _query_key_value(backend: str, **given: Tensor) -> list[Tensor]:
    return [x for x in query_key_value(**given, heads=4, backend=backend) if x is not None]


def _linear(tokens: int) -> Callable[[torch.Generator], Inputs]:
    def make(random: torch.Generator) -> Inputs:
        return {"x": _normal(random, tokens, 96), "weight": _normal(random, 64, 96), "bias": _normal(random, 64)}

    return make


def _few(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Of the operation for few tokens itself: ``project`` asks it on a CPU alone."""
    facts = dict(device=x.device.type, dtype=x.dtype, tokens=x.shape[0])
    return [OPERATIONS["projection"].choose(backend, **facts)(x, weight, bias)]


def _hidden(random: torch.Generator) -> Inputs:
    weights = {"gate_up": _normal(random, 128, 96, scale=0.1), "down": _normal(random, 96, 64, scale=0.1)}
    return {"x": _normal(random, 2, 1, 96), **weights}


def _answered(random: torch.Generator) -> Inputs:
    weights = {"gate": _normal(random, 96, 96, scale=0.1), "down": _normal(random, 96, 96, scale=0.1)}
    answer = {"answer": _normal(random, 2, 1, 4, 24), "gain": 1 + _normal(random, 4, 24, scale=0.1)}
    return {**answer, "x": _normal(random, 2, 1, 96), **weights}


def _learning(random: torch.Generator) -> Inputs:
    weights = {"weight": _normal(random, 96, 48, scale=0.1), "convolution": _normal(random, 96, 4)}
    controls = {"controls": _normal(random, 12, 48, scale=0.1), "bias": _normal(random, 12)}
    return {"x": _normal(random, 2, 1, 48), "history": _normal(random, 2, 3, 96), **weights, **controls}


def _learn(
    backend: str, x: Tensor, history: Tensor, weight: Tensor, convolution: Tensor, controls: Tensor, bias: Tensor
) -> list[Tensor]:
    layers = Layers(weight, convolution, 4, controls, bias, 0.1)
    q, k, v, gates, after = memory_inputs(x, history, layers, backend=backend)
    return [q, k, v, *gates, *([] if after is None else [after])]


def _cached(random: torch.Generator) -> Inputs:
    found = {"projected": _normal(random, 2, 2, 8, 32), "gain": 1 + _normal(random, 6, 32, scale=0.1)}
    for name, slots in (("keys", 9), ("values", 9), ("prefix_keys", 3), ("prefix_values", 3)):
        found[name] = _normal(random, 2, slots, 2, 32)
    for name in ("keys", "values"):
        found[name][1, :5] = 0  # slots that hold no token
    return {**found, "cached": torch.tensor([9, 4]), "position": torch.tensor([30, 4])}


def _cache(backend: str, projected: Tensor, gain: Tensor, **cache: Tensor) -> list[Tensor]:
    return list(cached_attention(projected, gain, Cache(**cache), heads=4, window=10, base=1e4, backend=backend))


def _scanned(random: torch.Generator) -> Inputs:
    gates, inputs = torch.sigmoid(_normal(random, 2, 100, 3, 8) + 1), _normal(random, 2, 100, 3, 8)
    return {"gates": gates, "inputs": inputs, "start": _normal(random, 2, 3, 8)}


_OTHERS = (
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
    Case("query", "query", _token, _query),
    Case("query, key and value", "query_key_value", _tokens, _query_key_value),
    Case("projection of a few", "projection", _linear(2), _few, learns=False),
    Case("projection of many", "linear", _linear(150), lambda b, **given: [project(**given, backend=b)]),
    Case("feed-forward, decoding", "gated_projection", _hidden,
         lambda b, **given: [feed_forward(**given, backend=b)], learns=False),
    Case("gated output, decoding", "gated_projection", _answered,
         lambda b, **given: [gated_output(**given, backend=b)], learns=False),
    Case("memory inputs, decoding", "memory_inputs", _learning, _learn, learns=False),
    Case("cached attention, decoding", "cached_attention", _cached, _cache, learns=False),
    Case("scan", "linear_scan", _scanned, lambda b, **given: [linear_scan(**given, backend=b)]),
)  # fmt: skip

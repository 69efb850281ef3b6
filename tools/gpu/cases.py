"""The parity cases: each operation on inputs that cover its options.

``tests/tools/gpu/test_cases.py`` fails for an operation or a backend without a case.
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
from ...kernels.dispatch import OPERATIONS, half_dtype
from ...kernels.linear import project
from ...kernels.memory import MemoryState, Objective, Options, Tokens, read_memory, run_memory
from ...kernels.norm_gate import gate, gated_norm, l2_norm, rms_norm, swiglu
from ...kernels.norm_gate.decode import feed_forward, gated_output
from ...kernels.rotary import normed_rotation, rotate
from ...kernels.scan import linear_scan
from ...kernels.short_conv import causal_convolution, query, query_key_value
from ...kernels.short_conv.decode import Layers, memory_inputs

Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """One operation on one set of inputs, at one precision."""

    name: str
    operation: str
    make: Callable[[torch.Generator], Inputs]
    """Makes the inputs by name, on the CPU: floating-point ones in float64."""
    run: Callable[..., Sequence[Tensor]]
    """``run(backend, **inputs)`` returns all outputs, in a fixed order."""
    precision: str = "bfloat16"
    """A key of ``parity.TOLERANCE``."""
    backward: bool = True
    """Whether there is a backward pass. Decoding has none."""
    layer_norm: bool = False
    """Whether a LayerNorm amplifies rounding errors: see ``parity.bounds``."""
    schedule: str = "auto"
    """One of ``kernels.memory.triton.schedule.SCHEDULES``; backends without schedules are left out unless "auto"."""


def cases(small: bool = False) -> tuple[Case, ...]:
    """All cases, the most important first. ``small``: with few programs, for Triton's interpreter."""
    memories = [memory.small() if small else memory for memory in MEMORIES]
    return (*(memory.case() for memory in memories), *_READINGS, *_ATTENTIONS, *_OTHERS)


def named(name: str, small: bool = False) -> Case:
    return next(case for case in cases(small) if case.name == name)


def _randn(random: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=random, dtype=torch.float64)


class Memory(NamedTuple):
    """A case of the memory: its inputs and options."""

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
    """Rows start at different positions within a chunk."""
    window: int = 1
    gated: bool = False
    channels: bool = False
    """Forgetting is by channel."""
    deltas: bool = False
    """The objective is Huber's with a threshold for each token."""
    saturated: bool = False
    """Some gates are exactly 0 or 1."""
    precision: str = "bfloat16"
    backward: bool = True
    schedule: str = "auto"

    def small(self) -> Memory:
        """The same case with fewer rows, heads and tokens."""
        differ = self.masked or self.started
        chunk = min(self.chunk, 16)
        time = min(self.time, chunk + chunk // 4 + 1)
        return self._replace(batch=2 if differ else 1, heads=1, d=16, expansion=1, chunk=chunk, time=time)

    def make(self, random: torch.Generator) -> Inputs:
        tokens = (self.batch, self.time, self.heads)
        writes = (self.batch, self.time + self.window - 1, self.heads)
        widths = [self.d, *[self.d * self.expansion] * (self.depth - 1), self.d]
        shapes = [(out, in_) for in_, out in pairwise(widths)]
        shapes += shapes[:1] if self.gated else []
        found = {
            "q": normalize(_randn(random, *tokens, self.d), dim=-1),
            "k": normalize(_randn(random, *writes, self.d), dim=-1),
            "v": _randn(random, *writes, self.d),
            "theta": 0.1 * torch.sigmoid(_randn(random, *tokens) - 1),
        }
        if self.momentum:
            found["eta"] = torch.sigmoid(_randn(random, *tokens) + 1)
        if self.forgetting:
            by = (sum(in_ for _, in_ in shapes),) if self.channels else ()
            found["alpha"] = torch.sigmoid(_randn(random, *tokens, *by) - 4)
        if self.deltas:
            found["delta"] = torch.sigmoid(_randn(random, *writes)) * 2 * self.d**0.5
        if self.window > 1:
            found["gamma"] = torch.sigmoid(_randn(random, *writes) - 1)
        if self.saturated:
            for name, value in (("theta", 0.0), ("eta", 1.0), ("alpha", 0.0), ("eta", 0.0)):
                found[name][torch.rand(tokens, generator=random) < 0.2] = value
        if self.norm:
            found["gain"] = 1 + _randn(random, self.heads, self.d, scale=0.1)
        for part, scale in (("weights", 1.0), *([("momentum", 0.01)] if self.momentum else ()), ("anchor", 1.0)):
            for layer, (out, in_) in enumerate(shapes):
                x = _randn(random, self.batch, self.heads, out, in_, scale=scale * in_**-0.5)
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
        tokens = Tokens(
            *(given[name] for name in ("q", "k", "v", "theta")),
            *(given.get(name) for name in ("eta", "alpha", "delta", "gamma")),
        )
        options = Options(
            self.chunk, self.activation, self.clip, self.read, half=half_dtype(tokens.q),
            objective=Objective("huber" if self.deltas else "l2"), window=self.window, gated=self.gated,
        )  # fmt: skip
        y, after = run_memory(tokens, state, given.get("gain"), given.get("mask"), options, backend)
        return [y, *after.weights, *after.momentum, *after.anchor]

    def case(self) -> Case:
        return Case(
            self.name, "memory", self.make, self.run, self.precision, self.backward, self.norm, self.schedule
        )  # fmt: skip


_D64 = Memory("", d=64, chunk=64, time=150, batch=1)
MEMORIES = (
    _D64._replace(name="two layers, streamed", schedule="streamed"),
    _D64._replace(name="two layers, float32, streamed", precision="float32", schedule="streamed"),
    Memory("two layers, resident", chunk=64, time=150, schedule="resident"),
    _D64._replace(name="one layer, resident", depth=1, schedule="resident"),
    _D64._replace(name="one layer, streamed", depth=1, schedule="streamed"),
    _D64._replace(name="one layer, fused", depth=1, schedule="fused"),
    Memory("heads of 48, expansion 4, chunk 16, clipped", d=48, expansion=4, clip=0.5, batch=1),
    Memory("masked, inside chunks, clipped", masked=True, started=True, clip=0.5),
    Memory("masked, inside chunks, clipped, streamed", masked=True, started=True, clip=0.5, schedule="streamed"),
    Memory("heads of 256", d=256, expansion=1, chunk=64, time=70, batch=1, heads=1),
    Memory("three layers", depth=3, chunk=64, time=100),
    Memory("chunk 128", d=64, chunk=128, time=260, batch=1, heads=1),
    Memory("chunk 512", chunk=512, time=600, batch=1, heads=1),
    _D64._replace(name="TF32", precision="tf32", heads=1),
    _D64._replace(name="float16", precision="float16", heads=1),
    Memory("float64", precision="float64", d=16, expansion=1, time=40, clip=0.5),
    Memory("linear, no norm, float32", depth=1, norm=False, activation="identity", precision="float32"),
    Memory("SiLU, no norm", norm=False, activation="silu"),
    Memory("ReLU, no momentum, float32", momentum=False, activation="relu", precision="float32"),
    Memory("neither momentum nor forgetting", momentum=False, forgetting=False),
    Memory("read before write, gates of 0 and 1", read="before", saturated=True),
    Memory("read at the anchor, chunk 5, inside chunks", chunk=5, started=True, read="anchor"),
    Memory("heads of 128, one layer, float32", d=128, depth=1, chunk=32, time=70, heads=1, precision="float32"),
    Memory("gated network", gated=True, chunk=64, time=150, activation="silu", batch=1),
    Memory(
        "gated network, clipped, inside chunks, read at the anchor",
        gated=True,
        started=True,
        clip=0.5,
        read="anchor",
        masked=True,
    ),
    Memory("decays by channel", channels=True, chunk=64, time=150, batch=1),
    Memory(
        "decays by channel, read before write, gates of 0 and 1, masked",
        channels=True,
        read="before",
        saturated=True,
        masked=True,
    ),
    Memory("window of 16", window=16, chunk=64, time=150, batch=1),
    Memory("window of 5, masked, inside chunks, clipped", window=5, masked=True, started=True, clip=0.5),
    Memory("thresholds for each token", deltas=True, chunk=64, time=150, batch=1),
    Memory("one token, decoding", time=1, started=True, clip=0.5, backward=False),
    Memory("one token, decoding, float64", time=1, precision="float64", d=16, backward=False),
)


def _read_case(
    name: str, time: int = 77, d: int = 32, depth: int = 2, norm: bool = True, backward: bool = True,
    precision: str = "bfloat16",
) -> Case:  # fmt: skip
    def make(random: torch.Generator) -> Inputs:
        made = Memory("", time=time, d=d, depth=depth, norm=norm).make(random)
        return {name: x for name, x in made.items() if name in ("q", "gain") or name.startswith("state_weights_")}

    def run(backend: str, q: Tensor, gain: Tensor | None = None, **weights: Tensor) -> list[Tensor]:
        return [read_memory(q, tuple(weights.values()), "gelu", gain, backend=backend)]

    return Case(name, "memory_read", make, run, precision, backward, layer_norm=norm)


_READINGS = (
    _read_case("read"),
    _read_case("read, one layer, no norm, float32", depth=1, norm=False, precision="float32"),
    _read_case("read, one token, decoding", time=1, backward=False),
)


def _attention_case(
    name: str,
    time: int,
    window: int | None,
    persistent: int = 0,
    step: int = 1,
    kv_heads: int = 4,
    ragged: bool = False,
    precision: str = "bfloat16",
) -> Case:
    def make(random: torch.Generator) -> Inputs:
        found = {"q": _randn(random, 2, time, 4, 64)}
        for each in ("k", "v"):
            found[each] = _randn(random, 2, (time - 1) * step + 9, kv_heads, 64)
        if persistent:
            found["prefix_q"] = _randn(random, 2, time, 4, 64)
            for each in ("prefix_k", "prefix_v"):
                found[each] = _randn(random, 2, persistent, kv_heads, 64)
        if ragged:
            found["start"] = torch.tensor([0, 7])
        return found

    def run(
        backend: str, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None, **prefix: Tensor
    ) -> list[Tensor]:
        first = Prefix(prefix["prefix_q"], prefix["prefix_k"], prefix["prefix_v"]) if prefix else None
        return [attention(q, k, v, window=window, start=start, prefix=first, step=step, backend=backend)]

    return Case(name, "attention", make, run, precision)


_ATTENTIONS = (
    _attention_case("causal", 100, None),
    _attention_case("window", 150, 32),
    _attention_case("prefix and window", 150, 32, persistent=8),
    _attention_case("prefix and window, float32", 150, 32, persistent=5, precision="float32"),
    _attention_case("grouped heads", 100, 32, kv_heads=2),
    _attention_case("segment", 64, None, persistent=8, step=2),
    _attention_case("segment and window", 64, 21, persistent=8, step=2),
    _attention_case("rows that begin later", 100, 32, ragged=True),
)


_WEIGHTS = ("weight", "convolution", "controls", "gate", "gate_up", "down")


def _normal(**shapes: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
    """Makes normal inputs of these shapes. Weights are scaled by their width; gains have a mean of 1."""

    def make(random: torch.Generator) -> Inputs:
        found = {}
        for name, shape in shapes.items():
            x = _randn(random, *shape, scale=shape[-1] ** -0.5 if name in _WEIGHTS else 1)
            found[name] = 1 + 0.1 * x if name.startswith("gain") else x
        return found

    return make


def _rotary_inputs(random: torch.Generator) -> Inputs:
    return {"x": _randn(random, 2, 100, 4, 32), "position": torch.arange(100).expand(2, -1).clone()}


def _query_key_value_inputs(random: torch.Generator) -> Inputs:
    made = _normal(projected=(2, 50, 96), weight=(96, 4), history=(2, 3, 96))(random)
    return {**made, "length": torch.tensor([50, 31])}


def _cached_attention_inputs(random: torch.Generator) -> Inputs:
    slots, prefix = (2, 9, 2, 32), (2, 3, 2, 32)
    shapes = dict(keys=slots, values=slots, prefix_keys=prefix, prefix_values=prefix)
    found = _normal(projected=(2, 2, 8, 32), gain=(6, 32), **shapes)(random)
    for name in ("keys", "values"):
        found[name][1, :5] = 0  # slots without a token
    return {**found, "cached": torch.tensor([9, 4]), "position": torch.tensor([30, 4])}


def _scan_inputs(random: torch.Generator) -> Inputs:
    made = _normal(gates=(2, 100, 3, 8), inputs=(2, 100, 3, 8), start=(2, 3, 8))(random)
    return {**made, "gates": torch.sigmoid(made["gates"] + 1)}


def _run_gate(backend: str, a: Tensor, b: Tensor, gain_a: Tensor, gain_b: Tensor) -> list[Tensor]:
    return [gate(a, b, gain_a, gain_b, backend=backend)]


def _run_query(backend: str, projected: Tensor, weight: Tensor, history: Tensor) -> list[Tensor]:
    return [query(projected, weight, history, 4, backend=backend)]


def _run_query_key_value(backend: str, **given: Tensor) -> list[Tensor]:
    return [x for x in query_key_value(**given, heads=4, backend=backend) if x is not None]


def _run_projection(backend: str, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """``project`` calls this operation on a CPU only."""
    facts = dict(device=x.device.type, dtype=x.dtype, tokens=x.shape[0])
    return [OPERATIONS["projection"].choose(backend, **facts)(x, weight, bias)]


def _run_memory_inputs(
    backend: str, x: Tensor, history: Tensor, weight: Tensor, convolution: Tensor, controls: Tensor, bias: Tensor
) -> list[Tensor]:
    layers = Layers(weight, convolution, 4, controls, bias, 0.1)
    q, k, v, gates, after = memory_inputs(x, history, layers, backend=backend)
    return [q, k, v, *gates, *([] if after is None else [after])]


def _run_cached_attention(backend: str, projected: Tensor, gain: Tensor, **cache: Tensor) -> list[Tensor]:
    return list(cached_attention(projected, gain, Cache(**cache), heads=4, window=10, base=1e4, backend=backend))


_OTHERS = (
    Case("gate", "gate", _normal(a=(2, 100, 96), b=(2, 100, 96), gain_a=(96,), gain_b=(96,)), _run_gate),
    Case("gated norm", "gated_norm", _normal(y=(2, 100, 4, 24), gain=(4, 24), g=(2, 100, 96)),
         lambda backend, **x: [gated_norm(**x, backend=backend)], "float32"),
    Case("SwiGLU", "swiglu", _normal(x=(2, 100, 192)), lambda backend, x: [swiglu(x, backend=backend)]),
    Case("RMSNorm", "rms_norm", _normal(x=(2, 100, 96), gain=(96,)),
         lambda backend, x, gain: [rms_norm(x, gain, backend=backend)]),
    Case("L2 norm", "l2_norm", _normal(x=(2, 100, 4, 24)), lambda backend, x: [l2_norm(x, backend=backend)]),
    Case("convolution", "convolution", _normal(x=(2, 100, 96), weight=(96, 4), history=(2, 3, 96)),
         lambda backend, **x: [causal_convolution(**x, backend=backend)]),
    Case("rotary", "rotary", _rotary_inputs, lambda backend, x, position: [rotate(x, position, backend=backend)],
         "float32"),
    Case("norm and rotary", "normed_rotation", _normal(x=(2, 100, 4, 32), gain=(6, 32)),
         lambda backend, **x: list(normed_rotation(**x, position=range(100), base=1e4, first=1, plain=True,
                                                   backend=backend))),
    Case("query", "query", _normal(projected=(2, 1, 32), weight=(96, 4), history=(2, 3, 96)), _run_query),
    Case("query, key and value", "query_key_value", _query_key_value_inputs, _run_query_key_value),
    Case("projection of a few", "projection", _normal(x=(2, 96), weight=(64, 96), bias=(64,)), _run_projection,
         backward=False),
    Case("projection of many", "linear", _normal(x=(150, 96), weight=(64, 96), bias=(64,)),
         lambda backend, **x: [project(**x, backend=backend)]),
    Case("feed-forward, decoding", "gated_projection", _normal(x=(2, 1, 96), gate_up=(128, 96), down=(96, 64)),
         lambda backend, **x: [feed_forward(**x, backend=backend)], backward=False),
    Case("gated output, decoding", "gated_projection",
         _normal(answer=(2, 1, 4, 24), gain=(4, 24), x=(2, 1, 96), gate=(96, 96), down=(96, 96)),
         lambda backend, **x: [gated_output(**x, backend=backend)], backward=False),
    Case("memory inputs, decoding", "memory_inputs",
         _normal(x=(2, 1, 48), history=(2, 3, 96), weight=(96, 48), convolution=(96, 4), controls=(12, 48), bias=(12,)),
         _run_memory_inputs, backward=False),
    Case("cached attention, decoding", "cached_attention", _cached_attention_inputs, _run_cached_attention,
         backward=False),
    Case("scan", "linear_scan", _scan_inputs, lambda backend, **x: [linear_scan(**x, backend=backend)]),
)  # fmt: skip

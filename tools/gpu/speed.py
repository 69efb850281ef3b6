"""The cases to time on a GPU: memories, attention, bandwidth-bound operations, models, other libraries."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize, scaled_dot_product_attention

from ... import recipes
from ...kernels.attention import Prefix, attention
from ...kernels.memory import MemoryState, memory_flops, titans_memory
from ...kernels.norm_gate import gate, rms_norm, swiglu
from ...kernels.short_conv import causal_convolution
from ...registry import create
from .parity import scheduled
from .timing import FULL, Run, Sizes, Timing, backends, passes, wait

Start = Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]
"""Returns the forward pass, and the leaves that get gradients."""


def timings(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Timing]:
    """All cases, the most important first: the time may end before the last."""
    kinds = (memories, memory_blocks, linear_memories, decoding, models, attentions, bandwidth_bound)
    return sorted((each for kind in kinds for each in kind(device, dtype, sizes)), key=lambda each: each.rank)


def without_failed(every: Sequence[Timing], failed: Mapping[str, set[str]]) -> tuple[list[Timing], list[str]]:
    """The cases that run no backend that ``failed`` its parity, and the reasons for leaving out the others."""
    reasons: dict[str, None] = {}
    kept = []
    for each in every:
        if each.backend.partition(",")[0] in failed.get(each.operation, ()):
            reasons[f"{each.operation}, {each.backend}: failed its parity"] = None
        elif failed and not each.operation and each.backend.startswith("auto"):
            named = ", ".join(f"{backend} of {operation}" for operation, found in failed.items() for backend in found)
            reasons[f"{each.what}: may run what failed its parity: {named}"] = None
        else:
            kept.append(each)
    return kept, list(reasons)


def warmups(device: torch.device, dtype: torch.dtype) -> list[Callable[[], str]]:
    """Functions that run a kernel once, so that it is compiled. Each returns the error, or an empty string."""

    def once(each: Timing) -> str:
        try:
            each.make()()
            wait(device)
        except Exception as error:  # the measurement will report it
            return f"{type(error).__name__}: {error}"
        return ""

    sizes = FULL._replace(lengths=FULL.lengths[:1], texts=FULL.texts[:1])
    return [
        functools.partial(once, each)
        for each in timings(device, dtype, sizes)
        if (each.direction == "both" or each.what == "memory step")
        and not (each.what == "attention" or each.backend in ("torch", "titans-pytorch") or "compiled" in each.backend)
    ]


def _direction(both: bool) -> str:
    return "both" if both else "forward"


def _timed(start: Start, both: bool, schedule: str = "auto") -> Callable[[], Run]:
    def make() -> Run:
        torch.manual_seed(0)
        return scheduled(schedule)(passes(*start(), both))

    return make


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# -- the memory operation ----------------------------------------------------------------------------------------------


def layer_shapes(d: int, expansion: int, layers: int) -> list[tuple[int, int]]:
    """``(out, in)`` of each layer."""
    return [(out, in_) for in_, out in pairwise([d, *[d * expansion] * (layers - 1), d])]


def memory_operation(
    batch: int, length: int, heads: int, shapes: Sequence[tuple[int, int]], chunk: int, backend: str = "auto",
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32,
) -> tuple[Callable[[], Tensor], list[Tensor]]:  # fmt: skip
    """The operation on random tokens with the gates of a new block, and the leaves that get gradients.

    The inputs are the same for every dtype except for rounding.
    """
    d, tokens = shapes[0][1], (batch, length, heads)
    q, k, v = (torch.randn(*tokens, d, device=device) for _ in range(3))
    theta, eta, alpha = (torch.sigmoid(torch.randn(tokens, device=device) + bias) for bias in (-3, 1, -6))
    drawn = (normalize(q, dim=-1), normalize(k, dim=-1), v, 0.1 * theta, eta, alpha)
    q, k, v, theta, eta, alpha = (x.to(dtype) for x in drawn)
    del drawn
    weights = [torch.randn(batch, heads, out, in_, device=device).to(state_dtype) * in_**-0.5 for out, in_ in shapes]
    gain = torch.ones(heads, d, device=device, dtype=dtype)

    def forward() -> Tensor:
        state = MemoryState.fresh(tuple(weights))
        return titans_memory(q, k, v, theta, eta, alpha, state, chunk=chunk, norm=gain, backend=backend)[0]

    return forward, [q, k, v, theta, eta, alpha, gain, *weights]


def _memory_shape(rows: int, length: int, d: int, expansion: int, layers: int) -> str:
    return f"{rows} x {length}, d {d}, " + (f"expansion {expansion}" if layers > 1 else "one layer")


def memories(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """The memory operation on every backend; PyTorch's also compiled, and Triton's by each schedule."""

    def start_memory(length: int, shapes: list[tuple[int, int]], backend: str, compiled: bool) -> Any:
        forward, leaves = memory_operation(1, length, sizes.heads, shapes, sizes.chunk, backend, device, dtype)
        return torch.compile(forward) if compiled else forward, leaves

    for length, (d, expansion, layers) in product(sizes.lengths, sizes.widths):
        shape, shapes = _memory_shape(sizes.heads, length, d, expansion, layers), layer_shapes(d, expansion, layers)
        tokens = sizes.heads * length
        useful = tokens * memory_flops(shapes, sizes.chunk)
        facts = dict(time=length, chunk=sizes.chunk, layers=layers, width=d, grad=True)
        for backend in backends("memory", device, torch.float32, **facts):
            slow = backend != "triton" and device.type == "cuda"
            if slow and length > 8192:
                continue  # ten times slower: the shorter lengths are enough
            main = (d, expansion, layers) in sizes.widths[:2] or layers == 1
            rank = (6 if slow else 0 if main else 5) + (layers == 1)
            ways = [(backend, rank, both, False, "auto") for both in (True, False)]
            if length == sizes.lengths[0] and backend == "torch":
                ways += [(f"{backend}, compiled", rank, both, True, "auto") for both in (True, False)]
            if length == sizes.lengths[0] and backend == "triton":
                ways += [(f"{backend}, {schedule}", 5, True, False, schedule) for schedule in ("resident", "streamed")]
            for name, place, both, compiled, schedule in ways:
                start = functools.partial(start_memory, length, shapes, backend, compiled)
                yield Timing(
                    "memory", name, shape, _direction(both), _timed(start, both, schedule), useful * (3 if both else 1),
                    tokens=tokens, operation="memory", rank=place,
                )  # fmt: skip


def decoding(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """One token of many rows. Reading and writing the state takes most of the time."""
    rows = sizes.decoding
    for d, expansion, layers in sizes.widths:
        shapes = layer_shapes(d, expansion, layers)
        moved = rows * sum(out * in_ for out, in_ in shapes) * 6 * 4  # weights, momentum, anchor: in and out
        facts = dict(time=1, chunk=sizes.chunk, layers=layers, width=d, grad=False)
        for backend in backends("memory", device, torch.float32, **facts):
            start = functools.partial(memory_operation, 1, 1, rows, shapes, sizes.chunk, backend, device, dtype)
            shape = _memory_shape(rows, 1, d, expansion, layers)
            make = _timed(start, False)
            yield Timing("memory step", backend, shape, "forward", make, 0, moved, rows, "memory", rank=2)


# -- memories with their projections, and other libraries' -------------------------------------------------------------


def titans_pytorch_memory(dim: int, heads: int, expansion: int, chunk: int) -> nn.Module:
    """The memory of titans-pytorch, with two layers.

    Without ``batch_size`` it would compute all gradients at the initial weights, a different, cheaper function.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory

    return NeuralMemory(
        dim=dim, heads=heads, dim_head=dim // heads, chunk_size=chunk, batch_size=chunk, max_grad_norm=1.0,
        model=MemoryMLP(dim=dim // heads, depth=2, expansion_factor=expansion),
    )  # fmt: skip


def memory_blocks(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """The memory block, and the memory of titans-pytorch, which also has projections; both with two layers."""
    heads = min(4, sizes.heads)
    rows = sizes.heads // heads

    def ours(length: int, d: int, expansion: int) -> nn.Module:
        spec = {"type": "memory", "heads": heads, "depth": 2, "expansion": expansion, "chunk": sizes.chunk}
        return create(spec, dim=heads * d)

    def theirs(length: int, d: int, expansion: int) -> nn.Module:
        return titans_pytorch_memory(heads * d, heads, expansion, sizes.chunk)

    def start(module: Callable[..., nn.Module], length: int, d: int, expansion: int) -> Any:
        block = module(length, d, expansion).to(device)
        x = torch.randn(rows, length, heads * d, device=device)

        def forward() -> Tensor:
            with _autocast(device, dtype):
                return block(x)[0]

        return forward, [x, *block.parameters()]

    for length, (d, expansion, layers) in product(sizes.lengths, sizes.widths[:2]):
        if layers == 2 and length <= max(8192, sizes.lengths[0]):
            shape = _memory_shape(sizes.heads, length, d, expansion, layers)
            for backend, module in (("auto", ours), ("titans-pytorch", theirs)):
                for both in (True, False):
                    make = _timed(functools.partial(start, module, length, d, expansion), both)
                    tokens = sizes.heads * length
                    yield Timing("memory block", backend, shape, _direction(both), make, tokens=tokens, rank=3)


def linear_memories(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """The linear memories of flash-linear-attention, whose state of ``d x d`` is that of a memory of one layer."""
    rows = sizes.heads

    def random(length: int, *shape: int) -> Tensor:
        return torch.randn(1, length, rows, *shape, device=device)

    def operands(length: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (normalize(random(length, d), dim=-1).to(dtype) for _ in range(2))
        return q, k, random(length, d).to(dtype)

    def gated_delta_rule(length: int, d: int) -> Any:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        q, k, v = operands(length, d)
        g, beta = logsigmoid(random(length) + 4), torch.sigmoid(random(length)).to(dtype)
        return lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], [q, k, v, g, beta]

    def momentum_delta_rule(length: int, d: int) -> Any:
        from fla.ops.momentum_delta_rule import chunk_momentum_delta_rule

        (q, k, v), beta = operands(length, d), torch.sigmoid(random(length)).to(dtype)
        alpha, mu = logsigmoid(random(length) + 4), logsigmoid(random(length) + 1)
        call = lambda: chunk_momentum_delta_rule(q, k, v, alpha, mu, beta=beta)[0]  # noqa: E731
        return call, [q, k, v, alpha, mu, beta]

    def ttt_linear(length: int, d: int) -> Any:
        from fla.ops.ttt import chunk_ttt_linear

        (q, k, v), eta = operands(length, d), (0.1 * torch.sigmoid(random(length, 1))).to(dtype)
        w, b = torch.ones(rows, d, device=device, dtype=dtype), torch.zeros(rows, d, device=device, dtype=dtype)
        return lambda: chunk_ttt_linear(q, k, v, w, b, eta)[0], [q, k, v, w, b, eta]

    rules = {"gated delta rule": gated_delta_rule, "momentum delta rule": momentum_delta_rule, "TTT-Linear": ttt_linear}
    for length, (d, expansion, layers) in product(sizes.lengths, sizes.widths):
        if layers == 1:
            shape = _memory_shape(rows, length, d, expansion, layers)
            for (name, rule), both in product(rules.items(), (True, False)):
                make, rank = _timed(functools.partial(rule, length, d), both), 4 if "gated" in name else 7
                yield Timing("memory", f"fla {name}", shape, _direction(both), make, tokens=rows * length, rank=rank)


# -- attention and what memory bandwidth bounds ------------------------------------------------------------------------


def attentions(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """Attention with a window and a prefix, and full causal attention."""
    heads, d, persistent = 16 if sizes.seconds else 2, 64, 16

    def start(length: int, window: int | None, backend: str) -> Any:
        def random(time: int) -> Tensor:
            return torch.randn(1, time, heads, d, device=device).to(dtype)

        q, k, v = (random(length) for _ in range(3))
        prefix = None if window is None else Prefix(random(length), random(persistent), random(persistent))
        call = lambda: attention(q, k, v, window=window, prefix=prefix, backend=backend)  # noqa: E731
        return call, [q, k, v, *(prefix or ())]

    for length, window in product(sizes.lengths, (sizes.window, None)):
        if window is None and length > 32768:
            continue
        pairs = length * (length + 1) // 2 if window is None else length * (window + persistent)
        seen = "all tokens" if window is None else f"window {window} + {persistent}"
        for backend, both in product(backends("attention", device, dtype, grad=True), (False, True)):
            yield Timing(
                "attention", backend, f"{heads} x {length}, {seen}", _direction(both),
                _timed(functools.partial(start, length, window, backend), both),
                4 * heads * d * pairs * (3.5 if both else 1), tokens=length, operation="attention",
                rank=6 if backend in ("xformers", "sdpa") else 8,
            )  # fmt: skip


def bandwidth_bound(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """Norm, gate, SwiGLU and convolution."""
    rows, width = sizes.lengths[-1], 1024 if sizes.seconds else 32
    gain, taps = torch.ones(width, device=device, dtype=dtype), torch.randn(width, 4, device=device, dtype=dtype)
    # elements read and written for each element of x, in the forward pass and in both: the backward pass reads the
    # inputs and the gradient of the output, and writes a gradient for each input
    kinds: list[tuple[str, str, int, Callable[..., Tensor], float, float]] = [
        ("rms_norm", "RMSNorm", 1, lambda b, x: rms_norm(x, gain, backend=b), 2, 5),
        ("gate", "gate", 2, lambda b, x, y: gate(x, y, gain, gain, backend=b), 3, 8),
        ("swiglu", "SwiGLU", 1, lambda b, x: swiglu(x, backend=b), 1.5, 4),
        ("convolution", "convolution", 1, lambda b, x: causal_convolution(x, taps, backend=b), 2, 5),
    ]

    def start(inputs: int, run: Callable[..., Tensor], backend: str) -> Any:
        given = [torch.randn((1, rows, width), device=device).to(dtype) for _ in range(inputs)]
        return lambda: run(backend, *given), given

    for operation, what, inputs, run, *transfers in kinds:
        for backend, both in product(backends(operation, device, dtype), (False, True)):
            moved = rows * width * dtype.itemsize * transfers[both]
            make = _timed(functools.partial(start, inputs, run, backend), both)
            shape = f"{rows} x {width}"
            yield Timing(what, backend, shape, _direction(both), make, 0, moved, operation=operation, rank=8)


# -- whole models ------------------------------------------------------------------------------------------------------


def models(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Timing]:
    """Forward and backward of whole models of one size, under autocast. Two of them also compiled."""
    for length, name in product(sizes.texts, ("transformer", "mag", "mac", "mal", "lmm")):
        main = name in ("transformer", "mag")
        for compiled in (False, True) if main and length == sizes.texts[0] else (False,):
            backend = ("SDPA" if name == "transformer" else "auto") + ", compiled" * compiled
            rank = 9 if compiled else 1 if main else 5
            make = _timed(functools.partial(_model, device, dtype, sizes, name, length, compiled), True)
            yield Timing(f"model {name}", backend, f"1 x {length}", "both", make, tokens=length, rank=rank)


def _model(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, name: str, length: int, compiled: bool
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    text = torch.randint(sizes.transformer["vocab"], (1, length + 1), device=device)
    if name == "transformer":
        model: nn.Module = Transformer(**sizes.transformer).to(device)
    else:
        recipe = recipes.load_recipe(name + sizes.model, overrides={"vocab": sizes.transformer["vocab"]})
        model = recipes.build(recipe).to(device)

    def loss() -> Tensor:
        if name == "transformer":
            return cross_entropy(model(text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten())
        return model(text[:, :-1], targets=text[:, 1:]).loss

    run = torch.compile(loss) if compiled else loss

    def forward() -> Tensor:
        with _autocast(device, dtype):
            return run()

    return forward, list(model.parameters())


class Transformer(nn.Module):
    """The transformer to compare with: full causal SDPA attention and SwiGLU."""

    def __init__(self, dim: int, depth: int, vocab: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocab, dim)
        names = {"qkv": (dim, 3 * dim), "out": (dim, dim), "up": (dim, 2 * hidden), "down": (hidden, dim)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in names.items()}) for _ in range(depth)
        )
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](rms_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + layer["down"](swiglu(layer["up"](rms_norm(x))))
        return self.head(rms_norm(x))

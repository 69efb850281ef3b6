"""What the cases of speed run: ceilings, the memory, models, decoding, other libraries.

Every function yields rows: ``seconds`` (a median) with quartiles, and ``flops``, ``moved`` bytes or ``tokens`` of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize, scaled_dot_product_attention

from ... import recipes
from ...kernels import dispatch
from ...kernels.attention import Prefix, attention
from ...kernels.dispatch import half_dtype
from ...kernels.memory import LearnerState, Objective, Options, Tokens, memory_flops, run_memory
from ...kernels.norm_gate import gate, rms_norm, swiglu
from ...kernels.short_conv import causal_convolution
from .counting import Counting
from .parity import SCHEDULE
from .timing import measured, passes, samples, wait

Rows = Iterator[dict[str, Any]]
Forward = tuple[Callable[[], Tensor], list[Tensor]]
"""The forward pass, and the leaves that get gradients."""
BOTH = ((True, "both"), (False, "forward"))
VOCABULARY = 256


# -- ceilings ----------------------------------------------------------------------------------------------------------


def ceilings(device: str, side: int, copied: int, seconds: float) -> Rows:
    """What the device is, its matrix rates and bandwidth, and what a launch and a wait cost.

    With random numbers: products of zeros draw less power and run faster.
    """
    if device != "cpu":
        about = torch.cuda.get_device_properties(0)
        yield {
            "device": about.name, "memory": about.total_memory, "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"), ("float16", torch.float16, "highest"),
        ("tf32", torch.float32, "high"), ("float32", torch.float32, "highest"),
    ):  # fmt: skip
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        row = measured(partial(torch.matmul, a, b), device, seconds)
        yield {
            "what": "matrix product",
            "dtype": name,
            **row,
            "flops": 2 * side**3,
            "rate": 2 * side**3 / row["seconds"],
        }
    x = torch.empty(copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    row = measured(lambda: y.copy_(x), device, seconds)
    yield {"what": "copy", **row, "moved": 2 * copied, "rate": 2 * copied / row["seconds"]}
    one, many = torch.ones(1, device=device), range(1000)

    def launches() -> None:
        for _ in many:
            one.add_(1)

    def waits() -> None:
        for _ in many:
            one.item()

    for what, run in (("launch of an operator", launches), ("wait for a number", waits)):
        taken = samples(run, device, seconds / 4)
        yield {"what": what, "seconds": min(taken) / len(many)}


# -- the memory operation ----------------------------------------------------------------------------------------------


def layer_shapes(d: int, expansion: int, layers: int) -> list[tuple[int, int]]:
    """``(out, in)`` of each layer."""
    return [(out, in_) for in_, out in pairwise([d, *[d * expansion] * (layers - 1), d])]


def memory_operation(
    batch: int, length: int, heads: int, shapes: Sequence[tuple[int, int]], chunk: int, backend: str = "auto",
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, state_dtype: torch.dtype = torch.float32,
    kind: str = "plain",
) -> Forward:  # fmt: skip
    """The operation on random tokens with the gates of a new block, and the leaves that get gradients.

    The inputs are the same for every dtype except for rounding. ``kind``: ``"plain"``, ``"gated"``, ``"channels"``,
    ``"window"`` (of 16 tokens) or ``"thresholds"`` (of Huber's objective, for each token).
    """
    d, tokens = shapes[0][1], (batch, length, heads)
    q, k, v = (torch.randn(*tokens, d, device=device) for _ in range(3))
    theta, eta, alpha = (torch.sigmoid(torch.randn(tokens, device=device) + bias) for bias in (-3, 1, -6))
    drawn = (normalize(q, dim=-1), normalize(k, dim=-1), v, 0.1 * theta, eta, alpha)
    q, k, v, theta, eta, alpha = (x.to(dtype) for x in drawn)
    del drawn
    weights = [torch.randn(batch, heads, out, in_, device=device).to(state_dtype) * in_**-0.5 for out, in_ in shapes]
    gain, delta, gamma = torch.ones(heads, d, device=device, dtype=dtype), None, None
    if kind == "gated":
        weights.append(weights[0].clone())
    if kind == "channels":
        alpha = alpha.unsqueeze(-1).repeat(1, 1, 1, sum(in_ for _, in_ in shapes))
    if kind == "thresholds":
        delta = torch.full_like(theta, d**0.5)
    if kind == "window":
        before = [torch.cat([x[:, :15], x], 1) for x in (k, v, theta)]
        k, v, gamma = before[0], before[1], torch.full_like(before[2], 1 / 16)
    options = Options(
        chunk, "gelu", None, "after", half=half_dtype(q), window=16 if kind == "window" else 1, gated=kind == "gated",
        objective=Objective("huber" if kind == "thresholds" else "l2"),
    )  # fmt: skip
    given = Tokens(q, k, v, theta, eta, alpha, delta, gamma)

    def forward() -> Tensor:
        state = LearnerState.fresh(weights).plain()
        return run_memory(given, state, gain, None, options, backend)[0]

    return forward, [*(x for x in given if x is not None), gain, *weights]


def memory(
    device: str, rows: int, length: int, d: int, expansion: int, layers: int, chunk: int, seconds: float,
    backend: str = "auto", schedule: str = "auto", tiles: dict[str, int] | None = None, kind: str = "plain",
) -> Rows:  # fmt: skip
    """The memory in bfloat16, forward and backward, and forward alone."""
    os.environ[SCHEDULE] = schedule
    if tiles:
        _use_tiles(tiles)
    torch.manual_seed(0)
    shapes = layer_shapes(d, expansion, layers)
    useful = rows * length * memory_flops([*shapes, *(shapes[:1] if kind == "gated" else [])], chunk)
    for both, direction in BOTH:
        made = memory_operation(1, length, rows, shapes, chunk, backend, device, torch.bfloat16, kind=kind)
        row = measured(passes(*made, both), device, seconds)
        yield {
            "what": "memory", "kind": kind, "backend": backend, "schedule": schedule, "rows": rows, "length": length,
            "d": d, "expansion": expansion, "layers": layers, "chunk": chunk, "direction": direction, "tiles": tiles,
            **row, "flops": useful * (3 if both else 1), "tokens": rows * length, "used": used("memory"),
        }  # fmt: skip


def _use_tiles(tiles: dict[str, int]) -> None:
    """Use these tiles in place of those of the rule, where a kernel has them."""
    from ...kernels.memory.triton import network

    rule = network.schedule

    def chosen(*sizes: Any, **facts: Any) -> dict[str, Any]:
        return {name: tiles.get(name, value) for name, value in rule(*sizes, **facts).items()}

    network.schedule = chosen


def used(*operations: str) -> dict[str, list[str]]:
    """The backends that each operation has run on, of all operations by default."""
    found = {
        name: sorted({backend.name for backend in operation._chosen.values()})
        for name, operation in dispatch.OPERATIONS.items()
        if not operations or name in operations
    }
    return {name: backends for name, backends in found.items() if backends}


def memory_step(device: str, rows: int, d: int, expansion: int, layers: int, seconds: float) -> Rows:
    """One token of many rows. Reading and writing the state takes most of the time."""
    shapes = layer_shapes(d, expansion, layers)
    forward, leaves = memory_operation(1, 1, rows, shapes, 64, "auto", device, torch.bfloat16)
    row = measured(passes(forward, leaves, False), device, seconds)
    state = rows * sum(out * in_ for out, in_ in shapes) * 2 * 4
    yield {"what": "memory step", "rows": rows, "d": d, "expansion": expansion, "layers": layers, **row, "state": state,
           "moved": 3 * state, "used": used("memory")}  # fmt: skip


def titans_pytorch_memory(dim: int, heads: int, expansion: int, chunk: int) -> nn.Module:
    """The memory of titans-pytorch, with two layers.

    Without ``batch_size`` it would compute all gradients at the initial weights, a different, cheaper function.
    """
    from titans_pytorch import MemoryMLP, NeuralMemory

    return NeuralMemory(
        dim=dim, heads=heads, dim_head=dim // heads, chunk_size=chunk, batch_size=chunk, max_grad_norm=1.0,
        model=MemoryMLP(dim=dim // heads, depth=2, expansion_factor=expansion),
    )  # fmt: skip


# -- other libraries' memories -----------------------------------------------------------------------------------------


def linear_memory(device: str, rule: str, rows: int, length: int, d: int, seconds: float) -> Rows:
    """A memory of flash-linear-attention, whose state of ``d x d`` is that of a memory of one layer."""
    if device == "cpu":  # its import takes as long as all other cases of a dry run
        yield {"what": rule, "refused": "flash-linear-attention runs on a GPU"}
        return
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, length, rows, *shape, device=device)

    q, k = (normalize(random(d), dim=-1).bfloat16() for _ in range(2))
    v = random(d).bfloat16()
    if rule == "gated delta rule":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as run

        leaves = [q, k, v, logsigmoid(random() + 4), torch.sigmoid(random()).bfloat16()]
        call = lambda: run(*leaves)[0]  # noqa: E731
    else:
        from fla.ops.ttt import chunk_ttt_linear

        eta = (0.1 * torch.sigmoid(random(1))).bfloat16()
        w, b = torch.ones(rows, d, device=device).bfloat16(), torch.zeros(rows, d, device=device).bfloat16()
        leaves = [q, k, v, w, b, eta]
        call = lambda: chunk_ttt_linear(*leaves)[0]  # noqa: E731
    for both, direction in BOTH:
        row = measured(passes(call, leaves, both), device, seconds)
        yield {"what": rule, "rows": rows, "length": length, "d": d, "direction": direction, **row,
               "tokens": rows * length}  # fmt: skip


# -- attention and what memory bandwidth bounds ------------------------------------------------------------------------


def attentions(device: str, length: int, window: int | None, seconds: float, heads: int = 16) -> Rows:
    """Attention of 16 heads of 64, with a window and 16 persistent tokens, or over all tokens, on each backend."""
    random = lambda time: torch.randn(1, time, heads, 64, device=device).bfloat16()  # noqa: E731
    q, k, v = (random(length) for _ in range(3))
    prefix = None if window is None else Prefix(random(length), random(16), random(16))
    pairs = length * (length + 1) // 2 if window is None else length * (window + 16)
    for backend in dispatch.OPERATIONS["attention"].backends:
        if backend == "reference":
            continue
        call = partial(attention, q, k, v, window=window, prefix=prefix, backend=backend)
        for both, direction in BOTH:
            row: dict[str, Any] = {"what": "attention", "backend": backend, "length": length, "window": window}
            try:
                found = measured(passes(call, [q, k, v, *(prefix or ())], both), device, seconds)
            except dispatch.BackendError as error:
                yield row | {"refused": str(error)}
                break
            except torch.OutOfMemoryError as error:
                yield row | {"failed": str(error).splitlines()[0]}
                continue
            flops = 4 * heads * 64 * pairs * (3.5 if both else 1)
            yield row | {"direction": direction, **found, "flops": flops, "tokens": length}


def elementwise(device: str, rows: int, width: int, seconds: float) -> Rows:
    """Norm, gate, SwiGLU and convolution: what moves bytes. The backward pass reads the inputs and the gradient of the
    output, and writes a gradient for each input."""
    random = lambda *shape: torch.randn(1, *shape, device=device).bfloat16()  # noqa: E731
    gain, taps = torch.ones(width, device=device).bfloat16(), random(width, 4)[0]
    kinds: list[tuple[str, int, Callable[..., Tensor], float, float]] = [
        ("rms_norm", 1, lambda x: rms_norm(x, gain), 2, 5),
        ("gate", 2, lambda x, y: gate(x, y, gain, gain), 3, 8),
        ("swiglu", 1, swiglu, 1.5, 4),
        ("convolution", 1, lambda x: causal_convolution(x, taps), 2, 5),
    ]
    for what, inputs, run, *transfers in kinds:
        given = [random(rows, width) for _ in range(inputs)]
        for both, direction in BOTH:
            row = measured(passes(partial(run, *given), given, both), device, seconds)
            yield {"what": what, "rows": rows, "width": width, "direction": direction, **row,
                   "moved": rows * width * 2 * transfers[both], "used": used(what)}  # fmt: skip


# -- whole models ------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """The transformer to compare with: full causal SDPA attention and SwiGLU. Its size is that of the recipes."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(VOCABULARY, dim)
        names = {"qkv": (dim, 3 * dim), "out": (dim, dim), "up": (dim, 2 * hidden), "down": (hidden, dim)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in names.items()}) for _ in range(depth)
        )
        self.head = nn.Linear(dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](rms_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + layer["out"](scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + layer["down"](swiglu(layer["up"](rms_norm(x))))
        return self.head(rms_norm(x))


SIZES = {"-170m": dict(dim=768, depth=12, heads=12, hidden=4224), "": dict(dim=32, depth=1, heads=2, hidden=64)}
"""Of the transformer, by the suffix of a recipe."""


def _autocast(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, torch.bfloat16)


def build(
    name: str, device: str, changes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """``transformer``, ``transformer-170m``, or a packaged recipe with few symbols."""
    kind, dash, size = name.partition("-")
    torch.manual_seed(0)
    if kind == "transformer":
        return Transformer(**SIZES[dash + size]).to(device)
    small = {} if size else {"dim": 32, "stack.0.repeat": 1}
    overrides = {"vocab": VOCABULARY, **small, **(changes or {})}
    made = recipes.build(recipes.load_recipe(name, overrides=overrides), device="meta", dtype=dtype)
    if device != "meta":  # drawn on the device: a recipe draws on the CPU, which takes seconds
        made.to_empty(device=device)
        with torch.no_grad():
            for module in reversed([*made.modules()]):  # what a block sets in its parts is set last
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
    return made


def _loss(model: nn.Module, text: Tensor) -> Tensor:
    if isinstance(model, Transformer):
        return cross_entropy(model(text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten())
    return model(text[:, :-1], targets=text[:, 1:]).loss


def train_step(
    device: str, name: str, length: int, seconds: float, compiled: bool = False, graphs: bool = False
) -> Rows:
    """Forward and backward of a model under autocast. ``graphs``: layers of MAC as CUDA graphs."""
    _use_graphs(graphs)
    made, text = build(name, device), torch.randint(VOCABULARY, (1, length + 1), device=device)
    run = torch.compile(_loss) if compiled else _loss

    def forward() -> Tensor:
        with _autocast(device):
            return run(made, text)

    row = measured(passes(forward, list(made.parameters()), True), device, seconds)
    yield {"what": "training step", "model": name, "length": length, "compiled": compiled, "graphs": graphs, **row,
           "tokens": length, "used": used()}  # fmt: skip


def profile_step(device: str, name: str, length: int, changes: dict[str, Any], most: int = 25) -> Rows:
    """What takes the time of a training step: the host's total, and each kernel's."""
    from torch.profiler import ProfilerActivity, profile

    made, text = build(name, device, changes), torch.randint(VOCABULARY, (1, length + 1), device=device)

    def forward() -> Tensor:
        with _autocast(device):
            return _loss(made, text)

    step = passes(forward, list(made.parameters()), True)
    alone = measured(step, device, 0.5)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=activities) as found:
        step()
        wait(device)
    events = found.key_averages()
    on_device = [event for event in events if "CUDA" in str(event.device_type)] or [*events]
    spent = lambda event: event.self_device_time_total or event.self_cpu_time_total  # noqa: E731
    count = lambda *words: sum(event.count for event in events if any(word in event.key for word in words))  # noqa: E731
    yield {
        "what": "step", "model": name, "length": length, **alone, "kernels": sum(event.count for event in on_device),
        "device_seconds": sum(map(spent, on_device)) / 1e6, "launches": count("LaunchKernel", "cuLaunch"),
        "waits": count("StreamSynchronize", "EventSynchronize", "DeviceSynchronize"), "copies": count("Memcpy"),
        "used": used(),
    }  # fmt: skip
    for event in sorted(on_device, key=spent, reverse=True)[:most]:
        yield {"what": "kernel", "model": name, "name": event.key[:90], "count": event.count,
               "seconds": spent(event) / 1e6}  # fmt: skip


def _use_graphs(graphs: bool) -> None:
    os.environ["TITANS_BUILD_CUDA_GRAPHS"] = str(int(graphs))


def decode(device: str, name: str, prompt: int, tokens: int, seconds: float, graphs: bool = False) -> Rows:
    """One generated token of a model in bfloat16: the difference of a long and a short generation."""
    _use_graphs(graphs)
    made, text = build(name, device, dtype=torch.bfloat16).eval(), torch.randint(VOCABULARY, (1, prompt), device=device)

    def generate(count: int) -> None:
        with torch.no_grad():
            made.generate(text, max_new_tokens=count)  # type: ignore[operator] # of a recipe

    short, long = (measured(partial(generate, n), device, seconds) for n in (1, 1 + tokens))
    each = (long["seconds"] - short["seconds"]) / tokens
    yield {"what": "token", "model": name, "prompt": prompt, "graphs": graphs, "seconds": each,
           "reading": short["seconds"], "peak": long["peak"], "used": used()}  # fmt: skip


def replay(
    device: str, rows: int, length: int, d: int, expansion: int, layers: int, chunk: int, seconds: float
) -> Rows:
    """The memory's forward pass captured as a CUDA graph, and replayed."""
    forward, leaves = memory_operation(
        1, length, rows, layer_shapes(d, expansion, layers), chunk, "auto", device, torch.bfloat16
    )
    run = passes(forward, leaves, False)
    eager = measured(run, device, seconds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for how, row in (("eager", eager), ("graph", measured(graph.replay, device, seconds))):
        yield {"what": "memory", "how": how, "rows": rows, "length": length, "d": d, "layers": layers, **row}


# -- compiling ahead ---------------------------------------------------------------------------------------------------


def compile_ahead(function: str, **arguments: Any) -> Rows:
    """Compile the kernels of a case, which other processes then find in Triton's cache, without running any of it."""
    compiled: dict[str, float] = {}

    def warm(kernel: Any, grid: tuple[int, ...], given: Sequence[Any], constants: dict[str, Any]) -> None:
        began = time.perf_counter()
        kernel.warmup(*(x.dtype if isinstance(x, Tensor) else x for x in given), grid=grid, **constants)
        compiled[kernel.__name__] = compiled.get(kernel.__name__, 0.0) + time.perf_counter() - began

    with Counting(warm) as gpu:
        if function == "memory":
            os.environ[SCHEDULE] = arguments.get("schedule", "auto")
            if arguments.get("tiles"):
                _use_tiles(arguments["tiles"])
            shapes = layer_shapes(arguments["d"], arguments["expansion"], arguments["layers"])
            sizes = (1, arguments["length"], arguments["rows"], shapes, arguments["chunk"])
            for both, _ in BOTH:
                operation = memory_operation(
                    *sizes, "auto", gpu.device, torch.bfloat16, kind=arguments.get("kind", "plain")
                )
                passes(*operation, both)()
        else:
            made, text = gpu.moved(build(arguments["name"], "meta")), gpu.empty(1, 2049, dtype=torch.int64)
            with gpu.autocast(torch.bfloat16):
                _loss(made, text).backward()
    yield {"what": "compiled", "kernels": compiled, "seconds": sum(compiled.values())}

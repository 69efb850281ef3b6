"""How fast a device runs the kernels and whole models, held against what the device itself was measured to do."""

from __future__ import annotations

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import recipes
from ..kernels import dispatch
from ..kernels.attention import Prefix, attention
from ..kernels.convolution import causal_convolution
from ..kernels.gate import gate, swiglu
from ..kernels.memory import MemoryState, titans_memory
from ..kernels.memory.cost import memory_flops
from ..kernels.memory.tokens import Tokens
from ..kernels.normalisation import rms_norm
from ..registry import create
from .gpu_baselines import Transformer, autocast, linear_memories, titans_pytorch
from .gpu_parity import scheduled

Run = Callable[[], Any]


class Sizes(NamedTuple):
    """What is measured: on a GPU, or quickly anywhere to see that it runs."""

    matrix: int
    copied: int
    """Bytes of the copy that bandwidth is measured with."""
    heads: int
    """Rows x heads: enough of them to fill the device."""
    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int, int], ...]
    """Of the memories: ``d``, expansion, layers."""
    chunk: int
    window: int
    stepping: int
    """Rows x heads that decode at a time."""
    model: str
    """The size of packaged recipes, or nothing: the small ones."""
    transformer: dict[str, int]
    """The transformer of that size, for bytes as the models are then, too: what they do with many words is the same."""
    texts: tuple[int, ...]
    """Lengths for whole models."""
    seconds: float
    """For each case, once it is warm."""


FULL = Sizes(
    8192, 2**32, 128, (2048, 8192, 32768, 131072), ((64, 2, 2), (64, 4, 2), (64, 1, 2), (64, 1, 1), (128, 1, 1)),
    64, 1024, 2048, "-170m", dict(dim=768, depth=12, vocab=256, heads=12, hidden=4224), (8192, 32768, 131072), 0.4,
)  # fmt: skip
QUICK = Sizes(
    64, 2**16, 2, (32,), ((16, 2, 2), (16, 1, 1)), 16, 16, 4, "",
    dict(dim=32, depth=1, vocab=256, heads=2, hidden=64), (64,), 0.0,
)  # fmt: skip


class Row(NamedTuple):
    """One measurement."""

    what: str
    backend: str
    shape: str
    direction: str
    """``"forward"`` or ``"both"``: forward and backward."""
    seconds: float
    low: float
    high: float
    """Median and quartiles."""
    flops: float
    """Useful ones, 0 where bytes are what counts."""
    bytes: float
    """That have to be read and written at least, 0 where FLOPs are what counts."""
    share: float
    """Of the device's measured matrix rate, or of its bandwidth."""
    tokens: int
    peak: int
    """Bytes allocated at most, inputs and results included; 0 where the device does not say."""
    failed: str = ""


class Case(NamedTuple):
    """What is measured; its operation is one of ``dispatch.OPERATIONS``, or a model's name."""

    what: str
    backend: str
    shape: str
    direction: str
    make: Callable[[], Run]
    """Inputs and parameters; what is returned runs it once."""
    flops: float = 0
    moved: float = 0
    """Bytes."""
    tokens: int = 0
    operation: str = ""
    """In the dispatcher, where it is one of those alone."""
    rank: int = 0
    """The lower, the earlier: a run may be cut short."""


class Ceiling(NamedTuple):
    """What the device was measured to do: FLOP/s of a large matrix product in a dtype, bytes/s of a copy."""

    product: float
    copy: float


LONG = 2.0
"""Seconds of a run that is not waited for time and again."""


# -- measuring ---------------------------------------------------------------------------------------------------------


def ceiling(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Ceiling:
    """Measured on random numbers: products of zeros draw less power and run faster."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).to(dtype) for _ in range(2))
    product = statistics.median(samples(lambda: a @ b, device, max(sizes.seconds, 0.5)))
    x = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = statistics.median(samples(lambda: y.copy_(x), device, max(sizes.seconds, 0.5)))
    return Ceiling(2 * sizes.matrix**3 / product, 2 * sizes.copied / copy)


def samples(run: Run, device: torch.device, seconds: float, least: int = 3, most: int = 50) -> list[float]:
    """Seconds that ``run`` takes, again and again, by the device's own clock; of one that takes long, once."""
    warm = math.nan
    for _ in range(2):
        start_s = time.perf_counter()
        run()
        _wait(device)
        warm = time.perf_counter() - start_s
    if warm > LONG:
        return [warm]
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < most and (len(found) < least or time.perf_counter() - began < seconds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            run()
            found.append(time.perf_counter() - start_s)
    return found


def measure(case: Case, device: torch.device, sizes: Sizes, most: Ceiling) -> Row:
    """Run a case; one that fails, for want of memory say, is a row that says so."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    none = math.nan
    row = Row(*case[:4], none, none, none, case.flops, case.moved, none, case.tokens, 0)
    try:
        run = case.make()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = sorted(samples(run, device, sizes.seconds))
    except dispatch.BackendError as error:
        return row._replace(failed=str(error))
    except Exception as error:  # of the device, of a compiler, of another library
        return row._replace(failed=(str(error).strip() or type(error).__name__).splitlines()[0])
    low, middle, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
    share = case.flops / middle / most.product if case.flops else case.moved / middle / most.copy
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return row._replace(seconds=middle, low=low, high=high, share=share, peak=peak)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- what is measured --------------------------------------------------------------------------------------------------


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
            _wait(device)
        except Exception as error:  # it will be a row that says so
            return f"{type(error).__name__}: {error}"
        return ""

    return [
        functools.partial(briefly, case)
        for case in cases(device, dtype, sizes)
        if (case.direction == "both" or case.what == "memory step")
        and not (case.what == "attention" or case.backend in ("torch", "titans-pytorch") or "compiled" in case.backend)
    ]


def _backends(operation: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> list[str]:
    """Those that run there, without the references."""
    found = dispatch.OPERATIONS[operation].backends.values()
    named = dict(named=True, device=device.type, dtype=dtype, **facts)
    return [b.name for b in found if b.name not in ("reference", "closed_form") and b.refuse(**named) is None]


def _passes(forward: Callable[[], Tensor], leaves: Sequence[Tensor], both: bool) -> Run:
    def alone() -> Tensor:
        with torch.no_grad():
            return forward()

    def forth_and_back() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(torch.ones_like(y))
        return y

    return forth_and_back if both else alone


def memories(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The memory operation, chunk by chunk, every path, and PyTorch's also through its compiler."""
    for length in sizes.lengths:
        for d, expansion, layers in sizes.widths:
            shape = _shape(sizes.heads, length, d, expansion, layers)
            shapes = layer_shapes(d, expansion, layers)
            useful = sizes.heads * length * memory_flops(shapes, sizes.chunk)
            facts = dict(time=length, chunk=sizes.chunk, layers=layers, width=d, grad=True)
            for backend in _backends("memory", device, torch.float32, **facts):
                slow = backend != "triton" and device.type == "cuda"
                if slow and length > 8192:
                    continue  # ten times slower: the shorter ones tell
                main = (d, expansion, layers) in sizes.widths[:2] or layers == 1
                rank = (6 if slow else 0 if main else 5) + (layers == 1)
                for compiled in (False, True) if backend == "torch" and length == sizes.lengths[0] else (False,):
                    for both in (True, False):
                        make = _memory(device, dtype, sizes, length, shapes, backend, both, compiled)
                        direction, name = "both" if both else "forward", backend + ", compiled" * compiled
                        yield Case(
                            "memory", name, shape, direction, make, useful * (3 if both else 1),
                            tokens=sizes.heads * length, operation="memory", rank=rank,
                        )  # fmt: skip
                if backend == "triton" and length == sizes.lengths[0]:
                    for schedule in ("resident", "streamed"):
                        make = _memory(device, dtype, sizes, length, shapes, backend, True, False, schedule)
                        yield Case(
                            "memory", f"triton, {schedule}", shape, "both", make, useful * 3,
                            tokens=sizes.heads * length, operation="memory", rank=5,
                        )  # fmt: skip


def _shape(rows: int, length: int, d: int, expansion: int, layers: int) -> str:
    return f"{rows} x {length}, d {d}, " + (f"expansion {expansion}" if layers > 1 else "one layer")


def blocks(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """The memory block, with its projections, and titans-pytorch's memory, which has some too; of two layers."""
    heads = min(4, sizes.heads)
    rows = sizes.heads // heads
    for length in sizes.lengths:
        if length > max(8192, sizes.lengths[0]):
            continue
        for d, expansion, layers in sizes.widths[:2]:
            if layers != 2:
                continue
            shape = _shape(sizes.heads, length, d, expansion, layers)
            spec = {"type": "memory", "heads": heads, "depth": 2, "expansion": expansion, "chunk": sizes.chunk}

            def ours(length: int = length, d: int = d, spec: dict[str, Any] = spec) -> tuple[Any, list[Tensor]]:
                block = create(spec, dim=heads * d).to(device)
                x = torch.randn(rows, length, heads * d, device=device)

                def forward() -> Tensor:
                    with autocast(device, dtype):
                        return block(x)[0]

                return forward, [x, *block.parameters()]

            def theirs(length: int = length, d: int = d, expansion: int = expansion) -> tuple[Any, list[Tensor]]:
                return titans_pytorch(device, dtype, rows, length, heads, d, expansion, sizes.chunk)

            for backend, start in (("auto", ours), ("titans-pytorch", theirs)):
                for both in (True, False):
                    yield Case(
                        "memory block", backend, shape, "both" if both else "forward", _started(start, both),
                        tokens=sizes.heads * length, rank=3,
                    )  # fmt: skip


def rules(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Other linear memories, of states as large as those of one layer."""
    for length in sizes.lengths:
        for d, expansion, layers in sizes.widths:
            if layers > 1:
                continue
            for name, start in linear_memories(device, dtype, sizes.heads, length, d).items():
                for both in (True, False):
                    shape, direction = _shape(sizes.heads, length, d, expansion, layers), "both" if both else "forward"
                    rank = 4 if "gated" in name else 7
                    make = _started(start, both)
                    yield Case("memory", name, shape, direction, make, tokens=sizes.heads * length, rank=rank)


def _started(start: Callable[[], tuple[Callable[[], Tensor], list[Tensor]]], both: bool) -> Callable[[], Run]:
    def make() -> Run:
        torch.manual_seed(0)
        forward, leaves = start()
        for leaf in leaves:
            leaf.requires_grad_(both)
        return _passes(forward, leaves, both)

    return make


def layer_shapes(d: int, expansion: int, layers: int) -> list[tuple[int, int]]:
    """``(out, in)`` of each layer."""
    widths = [d, *[d * expansion] * (layers - 1), d]
    return [(out, in_) for in_, out in pairwise(widths)]


def _tokens(device: torch.device, dtype: torch.dtype, rows: int, length: int, d: int) -> Tokens:
    shape = (1, length, rows)
    q, k, v = (torch.randn(*shape, d, device=device) for _ in range(3))
    gates = (torch.sigmoid(torch.randn(shape, device=device) + bias) for bias in (-3, 1, -6))
    theta, eta, alpha = gates
    return Tokens(normalize(q, dim=-1), normalize(k, dim=-1), v, 0.1 * theta, eta, alpha).map(lambda x: x.to(dtype))


def _answers(tokens: Tokens, state: MemoryState, chunk: int, gain: Tensor, backend: str) -> Tensor:
    q, k, v, theta, eta, alpha = tokens
    return titans_memory(q, k, v, theta, eta, alpha, state, chunk=chunk, norm=gain, backend=backend)[0]


def _memory(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, length: int, shapes: list[tuple[int, int]], backend: str,
    both: bool, compiled: bool, schedule: str = "auto",
) -> Callable[[], Run]:  # fmt: skip
    def make() -> Run:
        torch.manual_seed(0)
        d = shapes[0][1]
        tokens = _tokens(device, dtype, sizes.heads, length, d)
        weights = [torch.randn(1, sizes.heads, out, in_, device=device) * in_**-0.5 for out, in_ in shapes]
        gain = torch.ones(sizes.heads, d, device=device, dtype=dtype)
        leaves = [*(x for x in tokens if x is not None), gain, *weights]
        for leaf in leaves:
            leaf.requires_grad_(both)

        def forward() -> Tensor:
            return _answers(tokens, MemoryState.fresh(tuple(weights)), sizes.chunk, gain, backend)

        return scheduled(schedule)(_passes(torch.compile(forward) if compiled else forward, leaves, both))

    return make


def decoding(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """One token of many rows: the state is read once and written once, and that is what has to be paid for."""
    for d, expansion, layers in sizes.widths:
        shapes = layer_shapes(d, expansion, layers)
        moved = sizes.stepping * sum(out * in_ for out, in_ in shapes) * 6 * 4  # weights, momentum, anchor: in and out
        facts = dict(time=1, chunk=sizes.chunk, layers=layers, width=d, grad=False)
        shape = f"{sizes.stepping} x 1, d {d}, " + (f"expansion {expansion}" if layers > 1 else "one layer")
        for backend in _backends("memory", device, torch.float32, **facts):
            make = _step(device, dtype, sizes, shapes, backend)
            yield Case(
                "memory step", backend, shape, "forward", make, moved=moved, tokens=sizes.stepping, operation="memory",
                rank=2,
            )  # fmt: skip


def _step(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, shapes: list[tuple[int, int]], backend: str
) -> Callable[[], Run]:
    def make() -> Run:
        torch.manual_seed(0)
        d = shapes[0][1]
        tokens = _tokens(device, dtype, sizes.stepping, 1, d)
        weights = [torch.randn(1, sizes.stepping, out, in_, device=device) * in_**-0.5 for out, in_ in shapes]
        gain = torch.ones(sizes.stepping, d, device=device, dtype=dtype)
        state = MemoryState.fresh(tuple(weights))
        return _passes(lambda: _answers(tokens, state, sizes.chunk, gain, backend), [], False)

    return make


def streams(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """What a pass over memory is worth: norm, gate, SwiGLU and convolution."""
    rows, width = sizes.lengths[-1], 1024 if sizes.seconds else 32
    element = dtype.itemsize
    gain, taps = (
        (lambda: torch.ones(width, device=device, dtype=dtype)),
        torch.randn(width, 4, device=device, dtype=dtype),
    )
    kinds: list[tuple[str, str, int, Callable[[str, list[Tensor]], Tensor], int]] = [
        ("rms_norm", "RMSNorm", 1, lambda b, x: rms_norm(x[0], gain(), backend=b), 2),
        ("gate", "gate", 2, lambda b, x: gate(x[0], x[1], gain(), gain(), backend=b), 3),
        ("swiglu", "SwiGLU", 1, lambda b, x: swiglu(x[0], backend=b), 2),
        ("convolution", "convolution", 1, lambda b, x: causal_convolution(x[0], taps, backend=b), 2),
    ]
    for operation, what, inputs, run, passes in kinds:
        for backend in _backends(operation, device, dtype):
            for both in (False, True):

                def make(inputs: int = inputs, run: Any = run, backend: str = backend, both: bool = both) -> Run:
                    shape = (1, rows, width)
                    given = [torch.randn(shape, device=device).to(dtype).requires_grad_(both) for _ in range(inputs)]
                    return _passes(lambda: run(backend, given), given, both)

                # backward reads the inputs and the result's gradient, and writes as many gradients
                moved: float = rows * width * element * (passes + (2 * inputs + 1 if both else 0))
                if what == "SwiGLU":
                    moved = rows * width * element * (4 if both else 1.5)
                direction = "both" if both else "forward"
                shape = f"{rows} x {width}"
                yield Case(what, backend, shape, direction, make, moved=moved, operation=operation, rank=8)


def attentions(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """A window with a prefix, and all tokens: what memory is an alternative to."""
    heads, d, persistent = 16 if sizes.seconds else 2, 64, 16
    for length in sizes.lengths:
        for window in (sizes.window, None):
            if window is None and length > 32768:
                continue
            pairs = length * (length + 1) // 2 if window is None else length * (window + persistent)
            for backend in _backends("attention", device, dtype, grad=True):
                for both in (False, True):

                    def make(
                        length: int = length, window: int | None = window, backend: str = backend, both: bool = both
                    ) -> Run:
                        def random(time: int) -> Tensor:
                            return torch.randn(1, time, heads, d, device=device).to(dtype).requires_grad_(both)

                        q, k, v = (random(length) for _ in range(3))
                        first = (
                            None if window is None else Prefix(random(length), random(persistent), random(persistent))
                        )
                        leaves = [q, k, v, *(first or ())]
                        call = lambda: attention(q, k, v, window=window, prefix=first, backend=backend)  # noqa: E731
                        return _passes(call, leaves, both)

                    seen = "all tokens" if window is None else f"window {window} + {persistent}"
                    useful = 4 * heads * d * pairs * (3.5 if both else 1)
                    shape, direction = f"{heads} x {length}, {seen}", "both" if both else "forward"
                    rank = 6 if backend in ("xformers", "sdpa") else 8
                    yield Case(
                        "attention", backend, shape, direction, make, useful, tokens=length, operation="attention",
                        rank=rank,
                    )  # fmt: skip


def models(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """A training step's two passes of whole models of one size, under autocast; one of them compiled, too."""
    for length in sizes.texts:
        for name in ("transformer", "mag", "mac", "mal", "lmm"):
            compiled = (False, True) if name in ("transformer", "mag") and length == sizes.texts[0] else (False,)
            for each in compiled:
                backend = ("SDPA" if name == "transformer" else "auto") + ", compiled" * each
                rank = 9 if each else 1 if name in ("transformer", "mag") else 5
                make = functools.partial(_model, device, dtype, sizes, name, length, each)
                yield Case(f"model {name}", backend, f"1 x {length}", "both", make, tokens=length, rank=rank)


def _model(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, name: str, length: int, compiled: bool
) -> Run:  # fmt: skip
    torch.manual_seed(0)
    text = torch.randint(sizes.transformer["vocab"], (1, length + 1), device=device)
    if name == "transformer":
        plain = Transformer(**sizes.transformer).to(device)
        loss: Callable[[Tensor], Tensor] = plain.loss
        parameters = list(plain.parameters())
    else:
        recipe = recipes.load_recipe(name + sizes.model, overrides={"vocab": sizes.transformer["vocab"]})
        model = recipes.build(recipe).to(device)
        loss = lambda text: model(text[:, :-1], targets=text[:, 1:]).loss  # noqa: E731
        parameters = list(model.parameters())
    if compiled:
        loss = torch.compile(loss)

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        with autocast(device, dtype):
            found = loss(text)
        found.backward()

    return both

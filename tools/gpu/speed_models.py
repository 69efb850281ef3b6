"""What is timed beside the memories: operations that memory bandwidth bounds, attention, and whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import recipes
from ...kernels.attention import Prefix, attention
from ...kernels.norm_gate.gate import gate, swiglu
from ...kernels.norm_gate.norm import rms_norm
from ...kernels.short_conv.convolution import causal_convolution
from .baselines import Transformer, autocast
from .sizes import Sizes
from .timing import Case, Run, backends, passes


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
    for operation, what, inputs, run, transfers in kinds:
        for backend in backends(operation, device, dtype):
            for both in (False, True):

                def make(inputs: int = inputs, run: Any = run, backend: str = backend, both: bool = both) -> Run:
                    shape = (1, rows, width)
                    given = [torch.randn(shape, device=device).to(dtype).requires_grad_(both) for _ in range(inputs)]
                    return passes(lambda: run(backend, given), given, both)

                # backward reads the inputs and the result's gradient, and writes as many gradients
                moved: float = rows * width * element * (transfers + (2 * inputs + 1 if both else 0))
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
            for backend in backends("attention", device, dtype, grad=True):
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
                        return passes(call, leaves, both)

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

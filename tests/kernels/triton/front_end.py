"""A program for ``test_specialised.py``: every launch of the smallest memories through Triton's front end.

What Triton knows of the arguments when it compiles for a GPU is what they are: a size of 1 and a tensor that is not
there are constants then, which neither the interpreter nor compiling ahead of time with other sizes tells.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # with it, what is defined below are no kernels to be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from titans_build.kernels import triton_runtime

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int64: "*i64"}
seen: set[str] = set()


def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **fixed: Any) -> None:
    """In the place of ``launch``: what is computed stays as it was allocated."""
    given = dict(zip(kernel.arg_names, arguments)) | {n: x for n, x in fixed.items() if n in kernel.arg_names}
    signature, constants, known = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            kind, constants[(place,)] = "constexpr", x
        elif isinstance(x, Tensor):
            kind, known[(place,)] = POINTERS[x.dtype], [["tt.divisibility", 16]]
        else:
            kind = "i32" if isinstance(x, int) else "fp32"
        signature[parameter.name] = kind
    if str((kernel.__name__, signature, constants)) in seen:
        return
    seen.add(str((kernel.__name__, signature, constants)))
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    options = BACKEND.parse_options({})
    ASTSource(kernel, signature, constants, known).make_ir(
        TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context
    )
    print(f"{kernel.__module__}.{kernel.__name__}".removeprefix("titans_build.kernels."))


def ones(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=learned)


def memory(depth: int, full: bool, learned: bool, schedule: str = "streamed", backend: str = "triton") -> None:
    """Everything of size 1; ``full`` with all there is: norm, gates, clipping, a mask, the middle of a chunk."""
    from titans_build.kernels.memory import MemoryState, read_memory, titans_memory

    os.environ["TITANS_BUILD_SCHEDULE"] = schedule
    one = lambda *shape: ones(*shape, dtype=torch.bfloat16, learned=learned)  # noqa: E731
    part = lambda: tuple(ones(1, 1, 1, 1, learned=learned) for _ in range(depth))  # noqa: E731
    state = MemoryState(part(), part(), part(), torch.tensor([int(full)]))
    q, k, v, gates = one(1, 1, 1, 1), one(1, 1, 1, 1), one(1, 1, 1, 1), [one(1, 1, 1) if full else None] * 2
    _, after = titans_memory(
        q, k, v, one(1, 1, 1), *gates, state, chunk=3 if full else 1, norm=one(1, 1) if full else None,
        mask=torch.ones(1, 1, dtype=torch.bool) if full else None, clip=1.0 if full else None,
        read="after" if full else "before", backend=backend,
    )  # fmt: skip
    if learned:
        sum(x.sum() for x in after.weights).backward()
        read_memory(q, part(), "gelu", one(1, 1) if full else None, backend="triton").sum().backward()


def others() -> None:
    from titans_build.kernels.norm_gate.form import GATE, Form
    from titans_build.kernels.norm_gate.triton import gated
    from titans_build.kernels.short_conv.triton import convolve

    x, gain = ones(1, 1, 1), ones(1, 1)
    gated(Form(GATE, 1, 1, 1.0, 1e-6), x, x * 1, gain, gain * 1).sum().backward()
    convolve(ones(1, 1, 1), ones(1, 1)).sum().backward()


if __name__ == "__main__":
    triton_runtime.launch = compile_only  # before those that import it are imported themselves
    triton_runtime.refuse = lambda **facts: None
    for depth, full in itertools.product((1, 2), (True, False)):
        for schedule in ("streamed", "resident"):
            memory(depth, full, True, schedule)
        memory(depth, full, False, backend="triton_step")
    others()

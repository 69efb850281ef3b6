"""A program for ``test_specialised.py``: the launches of small memories through Triton's front end, as for a GPU.

Triton compiles a kernel for what its arguments are: a size of 1 and a tensor that is not there are constants then.
Neither the interpreter nor compiling ahead of time with other sizes tells. Nothing runs: what is computed stays as it
was allocated. Prints what was found as one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # with it, what is defined below are no kernels to be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource, make_backend

from titans_build.kernels import triton_runtime

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
SINGLE = re.compile(
    r"(?:arith\.(?:add|sub|mul|div|rem|neg|max|min|cmp)\w*|math\.\w+|tt\.(?:dot|reduce)\b).*\bf32\b|tt\.func.*: f32\b"
)
"""A line of a program that computes in float32, or takes a float32 number."""
CONSTANT = re.compile(r"arith.constant (?:dense<)?(-?\d\.\d+e[-+]\d+)>? : (?:tensor<.*)?f32")
rounded: set[str] = set()
"""Numbers in programs that are not what they are in float32."""
compiled: dict[str, tuple[str, str]] = {}
"""What a launch would have compiled: name and program, by Triton's own key."""


class Driver(DriverBase):
    """That of a GPU that is not there."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    map_python_to_cpp_type = get_benchmarker = get_active_torch_device = lambda self, *given: None

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
    """Triton's hook before it compiles: up to its first stage, and no further."""
    if key not in compiled:
        context = ir.context()
        ir.load_dialects(context)
        BACKEND.load_dialects(context)
        options = BACKEND.parse_options({n: compile[n] for n in ("num_warps", "num_stages")})
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        module = source.make_ir(
            TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context
        )
        rounded.update(x for x in CONSTANT.findall(str(module)) if torch.tensor(float(x)).double() != float(x))
        stages: dict[str, Any] = {}
        BACKEND.add_stages(stages, options, Language.TRITON)
        compiled[key] = f"{fn.module}.{fn.name}".removeprefix("titans_build.kernels."), str(stages["ttir"](module, {}))
    return True


def ones(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=learned)


def memory(
    depth: int, full: bool, learned: bool, schedule: str = "streamed", backend: str = "triton", *,
    dtype: torch.dtype = torch.bfloat16, size: int = 1, rows: int = 1, time: int = 1, chunk: int = 3, position: int = 1,
) -> None:  # fmt: skip
    """``full`` with all there is: norm, gates, clipping, the middle of a chunk, and with sizes of 1 a mask."""
    from titans_build.kernels.memory import MemoryState, read_memory, titans_memory

    os.environ["TITANS_BUILD_SCHEDULE"] = schedule
    one = lambda *shape: ones(*shape, dtype=dtype, learned=learned)  # noqa: E731
    wide = torch.promote_types(dtype, torch.float32)
    part = lambda: tuple(ones(rows, 1, size, size, dtype=wide, learned=learned) for _ in range(depth))  # noqa: E731
    state = MemoryState(part(), part(), part(), torch.full((rows,), position if full else 0))
    q, k, v = (one(rows, time, 1, size) for _ in range(3))
    gates, gain = [one(rows, time, 1) if full else None] * 2, one(1, size) if full else None
    _, after = titans_memory(
        q, k, v, one(rows, time, 1), *gates, state, chunk=chunk if full else 1, norm=gain,
        mask=torch.ones(1, 1, dtype=torch.bool) if full and size == 1 else None, clip=0.3 if full else None,
        read="after" if full else "before", backend=backend,
    )  # fmt: skip
    if learned:
        sum(x.sum() for x in after.weights).backward()
        read_memory(q, part(), "gelu", gain, backend="triton").sum().backward()


def others(
    dtype: torch.dtype = torch.float32, size: int = 1, rows: int = 1, time: int = 1, batched: bool = False
) -> None:
    from titans_build.kernels.memory import MemoryState, Options, Tokens
    from titans_build.kernels.memory.operation import run_memory
    from titans_build.kernels.memory.triton.batched import batched_memory
    from titans_build.kernels.norm_gate.form import GATE, Form
    from titans_build.kernels.norm_gate.triton import gated
    from titans_build.kernels.rotary.triton import normed_rotation
    from titans_build.kernels.short_conv.triton import convolve, query, query_key_value

    x, gain = ones(rows, time, size, dtype=dtype), ones(1, size, dtype=dtype)
    gated(Form(GATE, 1, size, float(size), 1e-6), x, x * 1, gain, gain * 1).sum().backward()
    for depth, momentum in ((1, True), (2, False)):  # decays by channel
        q, gate, alpha = (ones(rows, time, 1, *last, dtype=dtype) for last in ((size,), (), (depth * size,)))
        layers = tuple(ones(rows, 1, size, size, dtype=dtype) for _ in range(depth))
        state = MemoryState(layers, layers if momentum else (), layers, torch.zeros(rows, dtype=torch.int64))
        tokens, options = Tokens(q, q, q, gate, gate if momentum else None, alpha), Options(16, "gelu", 0.3, "after")
        run_memory(tokens, state, None, None, options, "triton")[0].sum().backward()
        tokens = tokens._replace(alpha=gate)
        if batched:
            batched_memory(tokens, state, ones(1, size, dtype=dtype), None, options)[0].sum().backward()
    convolve(x, ones(size, 1, dtype=dtype)).sum().backward()
    taps, before, length = ones(3 * size, 2, dtype=dtype), ones(rows, 1, 3 * size, dtype=dtype), torch.ones(rows).long()
    sum(
        y.sum() for y in query_key_value(ones(rows, time, 3 * size, dtype=dtype), taps, before, 1, length, 1e-6)
    ).backward()
    query(x * 1, taps * 1, before * 1, 1, 1e-6).sum().backward()
    cos, sin = (ones(1, time, 1, 2 * size, dtype=dtype, learned=False) for _ in range(2))
    turned, plain = normed_rotation(
        ones(rows, time, 1, 2 * size, dtype=dtype), ones(2, 2 * size, dtype=dtype), cos, sin, 1, True, 1e-6
    )
    (turned + plain).sum().backward()


def everything(**given: Any) -> None:
    for depth, full in itertools.product((1, 2), (True, False)):
        for schedule in ("streamed", "resident", *["fused"] * (depth == 1)):
            memory(depth, full, True, schedule, **given)
        memory(depth, full, False, backend="triton_step", **given)
    others(given.get("dtype", torch.float32), batched=True)


def at_length(rows: int, time: int, position: int) -> list[str]:
    """What is compiled for sequences of this length that was not before."""
    before = set(compiled)
    given = dict(size=16, rows=rows, time=time, chunk=16)
    for schedule in ("streamed", "resident"):
        memory(2, True, True, schedule, position=position, **given)
        memory(2, True, False, schedule, position=position, **given)
    for learned in (True, False):
        memory(1, True, learned, "fused", position=position, **given)
    memory(2, True, False, backend="triton_step", position=position, **given | dict(time=1))
    others(size=16, rows=rows, time=time)
    # a piece of one token has matrices with strides of 1, for which batched products are compiled once more
    return [name for key, (name, _) in compiled.items() if key not in before and not name.endswith("product_kernel")]


def stored_too_early(program: str) -> list[str]:
    """Tensors that are stored to after a load of the same tensor, with no barrier between the two.

    Other threads may not have loaded yet. Stores of one chunk's state after loads of another's are no such case.
    """
    root: dict[str, str] = {}
    loaded: set[str] = set()
    found = []
    for line in program.splitlines():
        names = re.findall(r"%[\w#]+", line)
        if "gpu.barrier" in line or "ttg.barrier" in line:
            loaded.clear()
        elif made := re.match(r"\s*(%\w+) = tt\.(?:splat|addptr|broadcast|expand_dims) (%\w+)", line):
            root[made[1]] = root.get(made[2], made[2])
        elif " = tt.load" in line:
            loaded.add(root.get(names[1], names[1]))
        elif "tt.store" in line and (name := root.get(names[0], names[0])) in loaded:
            found.append(name)
    return [name for name in found if not name.startswith(("%stack", "%grad_stack"))]


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    triton.knobs.runtime.jit_cache_hook = compile_only
    triton_runtime.refuse = lambda **facts: None
    everything()
    kernels, early = sorted({name for name, _ in compiled.values()}), {}
    for name, program in compiled.values():
        if stores := stored_too_early(program):
            early[name] = stores
    compiled.clear()
    rounded.clear()
    everything(dtype=torch.float64)
    single = rounded | {
        f"{name}: {line.strip()}" for name, program in compiled.values()
        for line in program.splitlines() if SINGLE.search(line)
    }  # fmt: skip
    for position in (0, 3):
        for time in (7, 40):
            at_length(2, time, position)
    again = {
        f"{rows} x {time} from {position}": new
        for rows, time, position in [(1, 1, 0), (3, 15, 5), (1, 16, 0), (2, 17, 8), (16, 47, 3), (1, 100, 12)]
        if (new := at_length(rows, time, position))
    }
    print(json.dumps(dict(kernels=kernels, early=early, single=sorted(single), again=again)))

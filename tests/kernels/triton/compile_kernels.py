"""Compiles every Triton kernel ahead of time, which needs no GPU: a line of JSON for each kernel and target.

    python compile_kernels.py WIDTH CHUNK BLOCK OPERAND TARGET...        a target: sm_90, gfx942

In a process of its own: where TRITON_INTERPRET is set, what ``triton.jit`` makes is no kernel to be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans_build.kernels.gated import GATE
from titans_build.kernels.triton import convolution, gated, memory

FLOATS = ("divisor", "eps", "clip")
WHOLE = re.compile(r"tokens|dim|heads|.*_step|stretch|time|chunks|rows|d_in|width|d_out")


def kernels(width: int, chunk: int, block: int, operand: str):
    """Every kernel with what it is compiled for."""
    wide = tl.float32
    norm = dict(KIND=GATE, GIVEN=True, WIDE=wide, ROWS=max(1, 1024 // width), WIDTH=width)
    taps = dict(WIDTH=4, TAPS=4, WIDE=wide, TIMES=32, CHANNELS=64)
    net = dict(
        LAYERS=2, PARTS=2, ACTIVATION=3, NORM=True, CLIP=True, ANCHORED=True, KEEP=True,
        TIME=chunk, IN=width, OUT=width, BLOCK=block,
        OPERAND=getattr(tl, operand), WIDE=wide, PRECISION="ieee" if operand == "float32" else "tf32",
    )  # fmt: skip
    yield from ((gated.forward_kernel, norm), (gated.backward_kernel, norm))
    yield from ((convolution.forward_kernel, taps), (convolution.backward_kernel, taps))
    for kernel in (
        memory.write_kernel,
        memory.read_kernel,
        memory.read_backward_kernel,
        memory.write_backward_kernel,
    ):
        yield kernel, net


def compiled(kernel, fixed: dict, target: str) -> dict:
    names = kernel.arg_names
    whole = lambda n: WHOLE.fullmatch(n) or (n == "b" and "d_in" in names)  # noqa: E731
    kind = lambda n: "fp32" if n in FLOATS else "i32" if whole(n) else "*fp32"  # noqa: E731
    signature = {n: "constexpr" if n in fixed else kind(n) for n in names}
    constants = {(names.index(n),): value for n, value in fixed.items() if n in names}
    nvidia = target.startswith("sm_")
    where = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    done = triton.compile(
        ASTSource(kernel, signature, constants), target=where, options={"num_warps": 8, "num_stages": 1}
    )
    row = {"kernel": f"{kernel.__module__.rsplit('.', 1)[1]}.{kernel.__name__}", "target": target}
    return row | {"shared": done.metadata.shared, "spilled": spilled(done.asm["cubin"]) if nvidia else None}


def spilled(cubin: bytes) -> int:
    """Bytes of stack a thread, which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", said.stdout)[1])


def main() -> None:
    width, chunk, block, operand, *targets = sys.argv[1:]
    for target in targets:
        for kernel, fixed in kernels(int(width), int(chunk), int(block), operand):
            print(json.dumps(compiled(kernel, fixed, target)), flush=True)


if __name__ == "__main__":
    main()

"""The registers and memory of each Triton kernel, compiled for GPUs that need not be installed.

    python benchmarks/kernel_resources.py [--target sm_90 ...] [--kernel NAME ...] [--json FILE]
    python benchmarks/kernel_resources.py --dim 64 [--hidden 256] [--chunk 64] [--layers 2] [--operands bfloat16] ...

Without ``--dim``, for the memories of all packaged sizes. Every kernel is compiled ahead of time, with the tiles of its
launch (``kernels/memory/triton/schedule.py``) and the assumption that addresses and sizes of the model are multiples of
16. ``registers``: per thread. ``spilled``: bytes per thread in local memory. ``shared``: bytes of shared memory per
program. ``dot``: operand types of the matrix units. ``wgmma``, ``tcgen05``, ``mma`` and ``mfma``: instructions for
products of matrices, those of Hopper's groups of warps, those of Blackwell, which call bfloat16 ``f16``, too, those of
one warp, and those of AMD. ``tensor_memory``: columns of Blackwell's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # its kernels cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns if it is not set

import measure
import torch
import triton
import triton.language as tl
from resource_tables import TARGETS, tables
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans_build.kernels.memory.state import SQUARED
from titans_build.kernels.memory.triton import (
    batched_kernels,
    channels,
    decay,
    linear_kernels,
    products,
    read,
    read_kernels,
    step,
    write_backward_kernels,
    write_kernels,
)
from titans_build.kernels.memory.triton.schedule import (
    FUSED_SIZE,
    RESIDENT,
    loss_constants,
    operands,
    resident,
    schedule,
)
from titans_build.kernels.norm_gate import triton as gated
from titans_build.kernels.norm_gate.form import GATE
from titans_build.kernels.rotary import triton as rotation
from titans_build.kernels.short_conv import triton as convolution

HEADS = (48, 64, 96, 256)
"""Those of the packaged sizes: 170m; 30m, 340m and 400m; 760m; 1.3b."""
TNT = (16, True)
"""The chunk of the local memories of the packaged TNT, and that they have neither momentum nor forgetting."""
LARGEST = 128
"""Wider heads have the kernels of batched products."""
BATCHED = [kernel for name, kernel in vars(batched_kernels).items() if name.endswith("_kernel")]
MEMORY = dict.fromkeys(
    kernel
    for module in (write_kernels, read_kernels, write_backward_kernels, step, read, linear_kernels)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel") and isinstance(kernel, triton.JITFunction)
)
PRODUCTS = {
    "bfloat16": operands(torch.float32, torch.bfloat16),
    "float16": operands(torch.float32, torch.float16),
    "float32": operands(torch.float32),
    "tf32": operands(torch.float32) | dict(PRECISION="tf32", FINE_PRECISION="bf16x3"),
}
WHOLE = re.compile(
    r"tokens|dim|(?:batch_)?heads|interval|once|.*_(?:step|row|head)|stretch|time|problems|chunks?|rows|d_in|width|d_out|"
    r"b|writes|units|channels|own|depth|last|(?:left|right|onto|to)_(?:batch|part)|width|up"
)
"""Integer arguments."""
TOKENS = {f"{grad}{name}" for grad in ("", "grad_") for name in ("queries", "keys", "values", "y")}
HALF = {tl.bfloat16: "*bf16", tl.float16: "*fp16"}
TYPED = {"mask": "*i1", "position": "*i64", "length": "*i64"}


def kernels(
    dim: int, hidden: int, chunk: int, operand: str, layers: int = 2, target: str = "sm_90",
    gated_network: bool = False, plain: bool = False,
) -> Iterator[tuple[Any, dict[str, Any], dict[str, int]]]:  # fmt: skip
    """Every kernel with its constants and its known sizes. ``plain``: without momentum and forgetting.

    Resident kernels are included where the rule of ``schedule.py`` would choose them.
    """
    hidden, parts = dim if layers == 1 else hidden, 1 if plain else 2
    products = PRODUCTS[operand] | dict(UNIT_ROWS=64 if target in ("sm_90", "sm_100") else 16)
    wide = tl.float32
    rows, register = gated.tiles(dim)
    norm = dict(KIND=GATE, GIVEN=True, WIDE=wide, ROWS=rows, WIDTH=register, DIVISOR=float(dim), EPS=1e-6)
    steps = dict.fromkeys(("a_step", "b_step", "grad_step", "grad_a_step", "grad_b_step"), 16 * dim)
    for kernel in (gated.forward_kernel, gated.backward_kernel):
        yield kernel, norm, dict(dim=dim, **steps)
    turn = dict(EPS=1e-6, PLAIN=True, WIDE=wide, **rotation.tiles(dim))
    steps = {f"{name}_{to}": 16 * dim for name in ("x", "turn", "grad", "plain") for to in ("row", "step")}
    for kernel in (rotation.forward_kernel, rotation.backward_kernel):
        yield kernel, turn, dict(dim=dim, first=1, **steps)
    times, register = convolution.tiles(dim)
    taps = dict(WIDTH=4, TAPS=4, GIVEN=True, FIXED=False, SILU=True, AFTER=True, MASKED=True, EPS=1e-6, WIDE=wide,
                TIMES=times, CHANNELS=register)  # fmt: skip
    steps = {f"{name}_{to}": 48 * dim for name in ("x", "h", "first", "second", "third") for to in ("row", "step")}
    for kernel in (convolution.forward_kernel, convolution.backward_kernel):
        yield kernel, taps, dict(dim=dim, channels=48 * dim, own=16 * dim, **steps)
    net = dict(
        LAYERS=layers, PARTS=parts, ACTIVATION=3 if layers == 2 else 0, NORM=True, CLIP=1.0, ANCHORED=True, KEEP=True,
        MOMENTUM=not plain, FORGETTING=not plain, MASKED=True, AFTER=True, READ=1, DELTAS=False, READS=True,
        GATED=int(gated_network), BY_CHANNEL=False, WIDE=wide, **products,
        **loss_constants(SQUARED),
    )  # fmt: skip
    for kernel in (decay.decay_kernel, decay.decay_backward_kernel):
        yield kernel, net | decay.decay_tiles(chunk), dict(b=chunk)
    if dim > LARGEST:
        yield from batched(dim, hidden, chunk, net)
        return
    for kernel in (channels.channel_scores_kernel, channels.channel_scores_backward_kernel):
        yield (
            kernel,
            net | dict(DELAY=0) | channels.channel_tiles(chunk, dim),
            dict(b=chunk, writes=chunk, channels=dim),
        )
    every = dim + hidden if layers == 2 else dim
    for kernel in (channels.channel_decay_kernel, channels.channel_decay_backward_kernel):
        yield kernel, net | dict(MOVES=True, CHANNELS=channels.decay_channels(every)), dict(b=chunk, channels=every)
    for kernel in MEMORY:
        if kernel.__name__ in RESIDENT.values():
            backward = kernel is write_backward_kernels.write_backward_resident_kernel
            if not resident(layers, parts, dim, hidden, dim, products, backward=backward):
                continue
        if kernel.__module__ == linear_kernels.__name__ and (layers == 2 or max(dim, chunk) > FUSED_SIZE):
            continue
        tiles = schedule(kernel.__name__, chunk, dim, hidden, dim, products, layers=layers, parts=parts)
        if kernel.__module__ == linear_kernels.__name__:
            tiles |= dict(width=dim, d_out=dim)
        steps = {f"{name}_{to}": 16 * dim for name in "qkvyp" for to in ("row", "head", "step")}
        yield kernel, net | tiles, dict(b=chunk, writes=chunk, d_in=dim, width=hidden, d_out=dim, **steps)


def batched(
    dim: int, hidden: int, chunk: int, net: dict[str, Any]
) -> Iterator[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Those of ``triton_batched``: products with everything that they may have, of three products each."""
    for kernel in BATCHED:
        tiles = dict(TOKENS=4, BLOCK=128, OUT=dim) if "hidden" not in kernel.__name__ else dict(TOKENS=16, BLOCK=128)
        yield kernel, net | tiles | dict(SIGN=-1), dict(d_in=dim, d_out=dim, width=hidden, up=hidden)
    fine = net | dict(OPERAND=net["FINE"], PRECISION=net["FINE_PRECISION"], SIGN=-1)
    strides = {f"{x}_{to}": dim * hidden for x in ("left", "right", "onto", "to") for to in ("batch", "part")}
    for kernel, sizes in (
        (products.product_kernel, (chunk, hidden, dim)),
        (products.update_kernel, (hidden, dim, chunk)),
        (products.state_backward_kernel, (hidden, dim, chunk)),
    ):
        kind, known = fine, dict(columns=sizes[1])
        if kernel is products.product_kernel:
            kind = fine | dict(left_column=1, right_row=1)
            known |= strides | dict(left_row=dim, right_column=dim)
        else:
            known |= dict(rows=sizes[0])
            if kernel is products.state_backward_kernel:
                kind = net
        parts = net["PARTS"] if kernel is products.product_kernel else 1
        yield kernel, kind | products.product_tiles(8, *sizes, net, parts), known


def compiled(kernel: Any, fixed: dict[str, Any], sizes: dict[str, int], target: str) -> dict[str, Any]:
    """Compile a kernel and return its row of the report."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else _type(name, sizes) for name in names}
    if kernel.__module__ == linear_kernels.__name__:  # as models have their tokens
        signature.update(dict.fromkeys(TOKENS & set(names), HALF.get(fixed["OPERAND"], "*fp32")))
    constants = {(names.index(name),): value for name, value in fixed.items() if name in names}
    divisible = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and sizes.get(name, 1) % 16 == 0)
    ]
    known = {(index,): [["tt.divisibility", 16]] for index in divisible}
    nvidia = target.startswith("sm_")
    where = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {name: fixed[name] for name in ("num_warps", "num_stages") if name in fixed}
    done = triton.compile(ASTSource(kernel, signature, constants, known), target=where, options=options)
    module = kernel.__module__.removeprefix("titans_build.kernels.")
    row = dict(kernel=f"{module}.{kernel.__name__}", target=target)
    tiles = ("ROWS", "TOKENS", "KEYS", "BLOCK", "WIDTH")
    row |= {name: fixed[name] for name in tiles if name in fixed and name in names}
    row |= dict(warps=done.metadata.num_warps, shared=done.metadata.shared)
    if columns := getattr(done.metadata, "tmem_size", 0):
        row["tensor_memory"] = columns
    return row | (_nvidia(done.asm) if nvidia else _amd(done.asm))


def _type(name: str, sizes: dict[str, int]) -> str:
    if name in sizes or WHOLE.fullmatch(name):
        return "i32"
    return TYPED.get(name, "*fp32")


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    count = lambda name: int(re.search(rf"{name}:(\d+)", said.stdout)[1])  # type: ignore[index] # noqa: E731
    dots = re.findall(r"(?:w?g?mma|tcgen05\.mma)\.\S*?(bf16|f16|tf32|f64)", asm["ptx"])
    kinds = dict(wgmma="wgmma.mma_async", tcgen05="tcgen05.mma", mma="mma.sync")
    products = {name: asm["ptx"].count(instruction) for name, instruction in kinds.items()}
    return dict(registers=count("REG"), spilled=count("STACK"), dot=" ".join(sorted(set(dots)))) | products


def _amd(asm: dict[str, Any]) -> dict[str, Any]:
    count = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])[1])  # type: ignore[index] # noqa: E731
    dots = re.findall(r"v_mfma_\w+?x\d+_?\d*_?(bf16|f16|xf32|f32|f64)", asm["amdgcn"])
    registers = count("vgpr_count") + count("agpr_count")
    kinds = " ".join(sorted(set(dots)))
    return dict(registers=registers, spilled=count("private_segment_fixed_size"), dot=kinds, mfma=len(dots))


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["environment"]["versions"]["triton"] = triton.__version__
    dims = [arguments.dim] if arguments.dim else HEADS
    memories = [(dim, arguments.chunk, arguments.plain) for dim in dims]
    if not arguments.dim:
        memories += [(dim, *TNT) for dim in HEADS if dim <= LARGEST]
    if arguments.quick:
        memories, arguments.kernel = memories[:1], ["decay"]
    rows = []
    for target in arguments.target:
        for dim, chunk, plain in memories:
            how = (arguments.operands, arguments.layers, target, arguments.gated, plain)
            for kernel, fixed, sizes in kernels(dim, arguments.hidden or 4 * dim, chunk, *how):
                if arguments.kernel and not any(name in kernel.__name__ for name in arguments.kernel):
                    continue
                rows.append({"heads": dim, "chunk": chunk, "plain": plain, **compiled(kernel, fixed, sizes, target)})
                measure.say("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    return {"rows": rows}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--kernel", nargs="+", help="only kernels whose name contains one of these")
    parser.add_argument("--dim", type=int, help="of heads (default: those of all packaged sizes)")
    parser.add_argument("--hidden", type=int, help="units (default: four times as many)")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--gated", action="store_true", help="a gated network")
    parser.add_argument("--plain", action="store_true", help="without momentum and forgetting")
    parser.add_argument("--layers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--operands", choices=PRODUCTS, default="bfloat16")


def main() -> None:
    measure.benchmark("resources", __doc__, "5 minutes", measured, tables, add_options=_options)


if __name__ == "__main__":
    main()

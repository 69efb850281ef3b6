"""The cost of a training step on a GPU by counting, on any machine: launches, waits, FLOPs and bytes.

    python benchmarks/kernel_estimate.py [--recipe mac-170m ...] [--length 32768] [--json FILE]
    python benchmarks/kernel_estimate.py --memory gated channels ... [--dim 64] [--heads 128] [--layers 2]

A step (forward and backward, one row, bfloat16 autocast) runs on a GPU that only counts
(``titans_build.tools.gpu.counting``), with one and two repetitions of the recipe's stack: costs are linear in these,
and those of the whole model follow. Where each token takes several launches (chunks of memories without a kernel),
costs are linear in the length, too, and are counted at two lengths. What a layer keeps for backward
is what fits for the first ones. Counted are casts, copies, and what backward repeats, too.

The times are estimates for an H200 and no measurements. The device takes for each launch the longer of moving its bytes
and computing its products; the host takes ``LAUNCH`` for each launch and ``WAIT`` for each wait. The products of the
memory's kernels run at ``SHARE`` of the matrix rate, more of them where each is of two or three bfloat16 products, and
a kernel with fewer programs than multiprocessors uses as many of these. Bytes are counted once for each launch: what
the streamed schedule reads again comes from the cache.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import measure
import torch

import titans_build as tb
from titans_build.recipes.loading import packaged_names
from titans_build.tools.gpu.counting import Counting
from titans_build.tools.gpu.speed import layer_shapes, memory_operation
from titans_build.tools.gpu.timing import passes

RATE, BANDWIDTH, PROGRAMS = 790e12, 4.3e12, 132
"""FLOP/s of bfloat16 products, bytes/s and multiprocessors of an H200."""
SHARE = 0.3
THREE = "bf16x3"
"""The precision of three products of bfloat16 each."""
LAUNCH, WAIT = 6e-6, 25e-6
"""Seconds of the host, with autograd's work for an operator."""
LENGTHS = (2560, 3072)
"""Lengths that costs of many launches are extended from: whole segments of MAC, and longer than windows."""
MANY = 2
"""Launches of a layer for each token from which on costs are extended."""
COPIES = {"clone", "copy_", "cat", "stack", "constant_pad_nd", "slice_backward", "select_backward", "roll", "index",
          "repeat", "index_select", "gather"}  # fmt: skip
COUNTS = (
    "launches", "waits", "products", "memory", "attention", "casts", "copies", "other", "repeated", "device", "host"
)  # fmt: skip
"""FLOPs of ``products``, ``memory`` and ``attention``; bytes of ``casts``, ``copies`` and ``other``; FLOPs of the
memory's writes that backward repeats; seconds of ``device`` and ``host``."""


def memory_flops(name: str, arguments: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of a kernel of the memory (docs/kernels.md): of half precision, and of fine products."""
    if name in ("product_kernel", "update_kernel", "state_backward_kernel"):
        batch, several = (arguments.get("left") or arguments["errors"])[0], arguments["PARTS"]
        if name == "state_backward_kernel":
            several = 1 if arguments["left_2"] is None else 2
        count = 2 * batch * several * math.prod(arguments[size] for size in ("rows", "columns", "depth"))
        return (0.0, count) if arguments["PRECISION"] == THREE else (count, 0.0)
    tokens = arguments.get("keys") or arguments.get("queries")
    width, d_in, d_out = (arguments.get(size, 0) for size in ("width", "d_in", "d_out"))
    if not isinstance(tokens, tuple) or not width:
        return 0.0, 0.0
    below = d_in * (1 + arguments.get("GATED", 0)) if arguments.get("LAYERS", 2) == 2 else 0
    numbers = width * (d_out + below)
    count = tokens[0] * tokens[1] * tokens[2]  # chunks, rows and tokens
    fine = 3 * count * numbers  # keys forward, errors back
    state = 2 * arguments.get("PARTS", 1) * count * numbers
    scores = 4 * count * tokens[2] * (d_in + width)
    if name.startswith("linear"):
        keys, scores, norm = 2 * count * numbers, 2 * count * arguments["b"] * (width + d_out), arguments["NORM"]
        read = state if arguments.get("READS", True) else 0
        return {
            "linear": (state + (scores if read else 0), keys + read),
            "linear_read_backward": ((1.5 + norm / 2) * scores, keys + (2 + norm) * state + scores),
            "linear_write_backward": (2 * state + 2 * keys, keys * (1 + norm)),
        }[name.removesuffix("_kernel")]
    return {
        "write": (state, fine), "write_resident": (state, fine), "rewrite": (0, fine),
        "read": (scores, state), "read_backward": (scores, state), "read_backward_state": (scores, state),
        "write_backward": (2 * state, 2 * fine), "write_backward_resident": (2 * state, 2 * fine),
        "read_fixed": (2 * count * numbers, 0), "read_fixed_backward": (2 * count * numbers, 0),
        "read_fixed_backward_weights": (2 * count * numbers, 0),
    }.get(name.removesuffix("_kernel"), (0, 0))  # fmt: skip


def costs(gpu: Counting, backward_from: int) -> dict[str, float]:
    """The sums over the launches and waits of a step. Those from ``backward_from`` on belong to the backward pass."""
    found = dict.fromkeys(COUNTS, 0.0)
    found["launches"], found["waits"] = len(gpu.launches), len(gpu.waits)
    for number, launch in enumerate(gpu.launches):
        seconds = launch.bytes / BANDWIDTH
        if launch.programs:
            half, fine = memory_flops(launch.name, launch.arguments)
            precisions = (launch.arguments.get(kind) for kind in ("PRECISION", "FINE_PRECISION"))
            products = 1
            if THREE in precisions:
                products = 2 if launch.name.startswith("linear") else 3  # tokens in bfloat16 are exact
            found["memory"] += half + fine
            busy = min(1.0, launch.programs / PROGRAMS)
            seconds = max(seconds / busy, (half + products * fine) / (RATE * SHARE * busy))
            if number >= backward_from and re.match("(re)?write(_resident)?_kernel|linear_kernel", launch.name):
                found["repeated"] += half + fine
        else:
            kind = "attention" if launch.name.startswith("attention") else "products"
            found[kind] += launch.flops
            seconds = max(seconds, launch.flops / RATE)
        if launch.name == "_to_copy":
            found["casts"] += launch.bytes
        elif launch.name in COPIES:
            found["copies"] += launch.bytes
        else:
            found["other"] += launch.bytes
        found["device"] += seconds
    found["host"] = found["launches"] * LAUNCH + found["waits"] * WAIT
    return found


def step(recipe: str, layers: int, length: int) -> dict[str, float]:
    """Count one training step."""
    with Counting() as gpu:
        model = gpu.moved(tb.build(tb.load_recipe(recipe, overrides={"stack.0.repeat": layers}), device="meta"))
        tokens = gpu.empty(1, length, dtype=torch.int64)
        gpu.clear()
        with gpu.autocast(torch.bfloat16):
            loss = model(tokens, targets=tokens).loss
        forward = len(gpu.launches)
        loss.backward()
        return costs(gpu, forward)


def probed(recipe: str) -> tuple[int, int]:
    """Two lengths that show how launches grow: whole stretches between resets, which are rows side by side."""

    def resets(part: Any) -> Iterator[int]:
        if isinstance(part, dict):
            yield part.get("reset") or 0
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from resets(inner)

    longest = max(resets(tb.load_recipe(recipe).layers), default=0)
    return (2 * longest, 3 * longest) if longest else (512, 1024)


def estimate(recipe: str, length: int, lengths: tuple[int, int] = LENGTHS) -> dict[str, Any]:
    """The costs of the whole model, and the seconds of a step."""
    layers = tb.load_recipe(recipe).stack[0]["repeat"]

    def extended(a: dict[str, float], b: dict[str, float], steps: float) -> dict[str, float]:
        return {name: a[name] + steps * (b[name] - a[name]) for name in COUNTS}

    def whole(length: int) -> dict[str, float]:
        one = step(recipe, 1, length)
        return one if layers == 1 else extended(one, step(recipe, 2, length), layers - 1)

    short, long = probed(recipe)
    few, many = (step(recipe, 1, n)["launches"] for n in (short, long))
    if many - few < (long - short) * MANY:
        found = whole(length)
    else:
        shorter, longer = lengths
        found = extended(whole(shorter), whole(longer), (length - shorter) / (longer - shorter))
    return {"recipe": recipe, "length": length, **found, "seconds": max(found["device"], found["host"])}


def operation(kind: str, dim: int, length: int, heads: int, layers: int) -> dict[str, Any]:
    """The costs of the memory alone: hidden layers twice as wide as its heads, chunks of 64 tokens."""
    with Counting() as gpu:
        made = memory_operation(
            1, length, heads, layer_shapes(dim, 2, layers), 64, "auto", gpu.device, torch.bfloat16, kind=kind
        )
        gpu.clear()
        passes(*made, True)()
        found = costs(gpu, len(gpu.launches))
    seconds = max(found["device"], found["host"])
    return {"recipe": f"memory, {kind}, heads of {dim}", "length": length, **found, "seconds": seconds}


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    if arguments.memory:
        sizes = arguments.dim, arguments.length, arguments.heads, arguments.layers
        return {"rows": [operation(kind, *sizes) for kind in arguments.memory]}
    recipes = arguments.recipe or packaged_names()
    if arguments.quick:
        recipes = recipes[:1]
    rows = []
    for recipe in recipes:
        rows.append(estimate(recipe, arguments.length))
        measure.say(f"{recipe}: {rows[-1]['launches']:,.0f} launches, {rows[-1]['waits']:,.0f} waits")
    return {"rows": rows}


def tables(results: measure.Result) -> dict[str, str]:
    """The costs of every model, and where they were counted."""
    head = (
        "model", "launches", "waits", "TFLOP", "of memory", "repeated", "GB", "of casts", "of copies", "host ms",
        "device ms", "step ms", "tokens/s",
    )  # fmt: skip
    rows = []
    for row in results["rows"]:
        flops, moved = (sum(row[n] for n in names) for names in (("products", "memory", "attention"),
                                                                 ("casts", "copies", "other")))  # fmt: skip
        share = lambda part, whole: f"{part / whole:.0%}" if whole else "0%"  # noqa: E731
        rows.append([
            row["recipe"], f"{row['launches']:,.0f}", f"{row['waits']:,.0f}", f"{flops / 1e12:,.1f}",
            share(row["memory"], flops), share(row["repeated"], flops), f"{moved / 1e9:,.0f}",
            share(row["casts"], moved), share(row["copies"], moved), f"{1e3 * row['host']:,.0f}",
            f"{1e3 * row['device']:,.0f}", f"{1e3 * row['seconds']:,.0f}", f"{row['length'] / row['seconds']:,.0f}",
        ])  # fmt: skip
    return {"steps": measure.table(head, rows), "machine": measure.machine_table(results)}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", nargs="+", help="such as mac-170m (default: all packaged ones)")
    parser.add_argument("--memory", nargs="+", choices=("plain", "gated", "channels", "window", "thresholds"),
                        help="the memory alone, of this kind")  # fmt: skip
    parser.add_argument("--dim", type=int, default=64, help="of the memory's heads (default: 64)")
    parser.add_argument("--heads", type=int, default=128, help="how many of them (default: 128)")
    parser.add_argument("--layers", type=int, default=2, help="of that memory (default: 2)")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the one row (default: 32768)")


def main(words: Sequence[str] | None = None) -> None:
    measure.benchmark("estimate", __doc__, "30 minutes", measured, tables, add_options=_options)


if __name__ == "__main__":
    main()

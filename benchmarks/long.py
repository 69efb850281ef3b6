"""The time of a training step against the length of a row: models, and a memory with and without resets.

python benchmarks/long.py [--quick] [--json FILE] [--plots FOLDER]

Forward and backward passes over one row, in processor time of one thread, which other processes affect little; the
longest rows also in elapsed time of one thread and of as many as there are cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch

import titans_build as tb
from titans_build.tools.plotting import COLORS, draw

MODELS = {
    "tnt": ("tnt", {}),
    "mag": ("mag", {}),
    "transformer, window of 1,024": ("transformer", {}),
    "transformer, full attention": ("transformer", {"layers.plain.0.window": None}),
}
NONE, RESET, MASKED, PLACES = "no reset", "reset", "reset, masked", "reset, at another place in each row"
MEMORIES = (NONE, RESET, MASKED, PLACES)


class Sizes(NamedTuple):
    dim: int
    reset: int
    lengths: tuple[int, ...]
    rounds: int


FULL, QUICK = Sizes(128, 2048, (2048, 8192, 32768), 2), Sizes(8, 32, (64, 128), 1)


def step(run: Callable[[], torch.Tensor], module: torch.nn.Module) -> Callable[[], None]:
    def once() -> None:
        module.zero_grad()
        run().backward()

    return once


def model_step(name: str, length: int, sizes: Sizes) -> Callable[[], None]:
    recipe, changes = MODELS[name]
    model = tb.build(recipe, overrides={"dim": sizes.dim, "stack.0.repeat": 2, **changes})
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    return step(lambda: model(tokens, targets=tokens).loss, model)


def memory_step(name: str, length: int, sizes: Sizes) -> Callable[[], None]:
    """A step over two rows."""
    reset = None if name == NONE else sizes.reset
    block = tb.build_block({"type": "memory", "chunk": 16, "reset": reset}, dim=sizes.dim)
    x = torch.randn(2, length, sizes.dim, generator=torch.Generator().manual_seed(0))
    mask, state = torch.ones(2, length, dtype=torch.bool), None
    mask[0, -10:] = False
    if name == PLACES:
        with torch.no_grad():
            state = block(x[:, -20:], mask=mask[:, -20:])[1]
    given = mask if name == MASKED else None
    return step(lambda: block(x, state, mask=given)[0].square().mean(), block)


KINDS = {"models": (MODELS, model_step), "memories": (MEMORIES, memory_step)}


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    torch.set_num_threads(1)
    results["environment"]["threads"] = 1
    sizes = QUICK if arguments.quick else FULL
    found: measure.Result = {"shape": sizes._asdict()}
    for kind, (names, make) in KINDS.items():
        times: dict[str, list[float]] = {name: [] for name in names}
        for length in sizes.lengths:
            measure.say(f"{kind}: {length:,} tokens")
            cases = {name: make(name, length, sizes) for name in names}
            how = {"least": sizes.rounds, "most": sizes.rounds, "clock": time.process_time}
            samples = measure.interleave(cases, 0, warm=length == sizes.lengths[0], **how)
            for name in names:
                times[name].append(statistics.median(samples[name]))
        found[kind] = times
    cases = {name: model_step(name, sizes.lengths[-1], sizes) for name in MODELS}
    for threads in (1, os.cpu_count() or 1):
        measure.say(f"models: {sizes.lengths[-1]:,} tokens, {threads} threads")
        torch.set_num_threads(threads)
        samples = measure.interleave(cases, 0, warm=False, least=sizes.rounds, most=sizes.rounds)
        elapsed = {name: statistics.median(seconds) for name, seconds in samples.items()}
        found.setdefault("elapsed", []).append({"threads": threads, "seconds": elapsed})
    torch.set_num_threads(1)
    if not arguments.quick:
        cases = {name: measure.alone(__file__, name, False, OMP_NUM_THREADS="1") for name in MODELS}
        found["peaks"] = {name: case["peak"] - case["imports"] for name, case in cases.items()}
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for format, drawn in draw(lambda axes: plot(axes, found), size=(6.4, 3.6)).items():
            (arguments.plots / f"long.{format}").write_bytes(drawn)
    return found


def peak(name: Any, quick: bool) -> measure.Result:
    sizes = QUICK if quick else FULL
    return measure.peak_memory(lambda: model_step(name, sizes.lengths[-1], sizes))


def plot(axes: Any, results: measure.Result) -> None:
    lengths = results["shape"]["lengths"]
    for color, (name, times) in zip(COLORS, results["models"].items()):
        axes.plot(lengths, times, color=color, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="seconds of a training step")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=[])
    axes.legend()


def tables(results: measure.Result) -> dict[str, str]:
    lengths, found = results["shape"]["lengths"], {}
    for kind in KINDS:
        rows = []
        for name, times in results[kind].items():
            each = [seconds / length for seconds, length in zip(times, lengths)]
            row = [name, *(f"{one * 1e6:.3g}" for one in each), f"{each[-1] / each[0]:.2f}"]
            if kind == "models":
                row += [f"{lengths[-1] / each['seconds'][name]:,.0f}" for each in results.get("elapsed", ())]
                row += [measure.megabytes(results["peaks"][name]) if "peaks" in results else None]
            rows.append(row)
        head = ["microseconds a token", *(f"{length:,}" for length in lengths), "last over first"]
        more = [f"tokens a second, {threads_of(each)}" for each in results.get("elapsed", ())]
        more = [*more, f"peak MB at {lengths[-1]:,}"] if kind == "models" else []
        found[kind] = measure.table([*head, *more], rows)
    found["models"] += "\n\n![seconds of a training step against the length of a row](plots/long.svg)"
    return {**found, "machine": measure.machine_table(results)}


def threads_of(elapsed: measure.Result) -> str:
    return "1 thread" if elapsed["threads"] == 1 else f"{elapsed['threads']} threads"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where the picture is written")


if __name__ == "__main__":
    measure.benchmark("long", __doc__, "5 minutes", measured, tables, alone=peak, add_options=add_options)

"""The cost of a training step whose tokens are shared out over ranks: bytes, FLOPs and steps in sequence, by formula.

The bytes are compared with those that two processes send. The rest is drawn to a million tokens on eight devices.

    python benchmarks/parallel.py --json benchmarks/results/parallel.json --plots benchmarks/plots
"""

from __future__ import annotations

import argparse
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch

import titans_build as tb
from titans_build.tools.plotting import COLORS, draw

RATE, STEP, LINK, MESSAGE = 4e14, 2e-5, 1e11, 2e-5
"""Of a device: FLOP/s in products, seconds of a step in a sequence, bytes/s to another, seconds of a message."""
DIM, HEADS, LAYERS, RANKS = 1024, 16, 24, 8
LENGTHS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
CHECKED = ("mag", "mac", "lmm", "tnt", "transformer")


class Cost(NamedTuple):
    """Of one layer of a rank, in a training step with one row."""

    sent: float
    """Bytes to the next rank, and back."""
    flops: float
    steps: float
    """Steps that follow each other, in the whole model."""

    def seconds(self) -> float:
        computed = max(LAYERS * self.flops / RATE, self.steps * STEP)
        return computed + LAYERS * (self.sent / LINK + 2 * MESSAGE)


# -- the formulas ------------------------------------------------------------------------------------------------------


def flops_of(spec: dict[str, Any], tokens: float) -> float:
    """Of the forward and backward pass of a block, a multiply-add being 2."""
    block = tb.build_block(spec, dim=DIM, device="meta")
    return 3 * block.flops(8_192) * tokens / 8_192


def pipelined(spec: dict[str, Any], tokens: int, chunk: int, state: float) -> Cost:
    """Each rank waits for the state of the one before, and works on other layers meanwhile."""
    mine = tokens / RANKS
    return Cost(2 * state, flops_of(spec, mine), 3 * mine / chunk * (LAYERS + RANKS - 1))


def side_by_side(spec: dict[str, Any], tokens: int, chunk: int, past: int) -> Cost:
    """Each rank is given the last tokens of the one before, which it computes again. Resets are rows."""
    mine = tokens / RANKS + past
    return Cost(2 * past * DIM * 4, flops_of(spec, mine), 3 * LAYERS * min(past, mine) / chunk)


def affine(spec: dict[str, Any], tokens: int, chunk: int, state: float) -> Cost:
    """Each rank computes the map of its tokens and what they add, gets those of all ranks, and reads. (Not built.)"""
    mine = tokens / RANKS
    return Cost(2 * RANKS * 2 * state, 2 * flops_of(spec, mine), 3 * 2 * LAYERS * mine / chunk)


def by_chunk(spec: dict[str, Any], tokens: int, chunk: int, state: float) -> Cost:
    """Each chunk is divided, and its gradient summed over the ranks. (Not built.)"""
    chunks = tokens / chunk
    return Cost(2 * chunks * 2 * state, flops_of(spec, tokens / RANKS), 3 * LAYERS * chunks)


DEEP = {"type": "memory", "heads": HEADS, "chunk": 64}
RESET = {**DEEP, "chunk": 16, "reset": 2048, "momentum": False}
LINEAR = {"type": "gated_delta_net", "heads": HEADS}
LARGE = {**DEEP, "chunk": 2048, "retrieve": "anchor", "momentum": False}
WINDOW = {"type": "attention", "heads": HEADS, "window": 2048}


def state_of(spec: dict[str, Any]) -> int:
    return tb.build_block(spec, dim=DIM, device="meta").state_bytes()


def costs(tokens: int) -> dict[str, Cost]:
    """By learner and mode."""
    return {
        "deep memory, chunk 64: pipelined": pipelined(DEEP, tokens, 64, state_of(DEEP)),
        "deep memory, reset 2,048: side by side": side_by_side(RESET, tokens, 16, 2052),
        "large chunks of 2,048: pipelined": pipelined(LARGE, tokens, 2048, state_of(LARGE)),
        "large chunks of 2,048: a sum per chunk": by_chunk(LARGE, tokens, 2048, state_of(LARGE)),
        "matrix (64 tokens at once): pipelined": pipelined(LINEAR, tokens, 64, state_of(LINEAR)),
        "matrix (64 tokens at once): affine": affine(LINEAR, tokens, 64, state_of(LINEAR)),
        "attention, window 2,048: side by side": side_by_side(WINDOW, tokens, 2048, 2047),
    }


# -- bytes of two processes --------------------------------------------------------------------------------------------


def _leaves(block: Any, prefix: int = 0) -> Iterator[tuple[Any, int]]:
    """The blocks that communicate, and the number of persistent tokens in their states."""
    if block.sharding != "local":
        yield block, prefix
        return
    prefix += len(getattr(block, "tokens", ()))
    for child in block.children():
        for each in child if isinstance(child, torch.nn.ModuleList) else [child]:
            if isinstance(each, tb.Block):
                yield from _leaves(each, prefix)


def _message(tensors: list[torch.Tensor]) -> int:
    return sum(-(-x.numel() * x.element_size() // 16) * 16 for x in tensors)


def predicted(model: Any, rows: int, tokens: int) -> dict[str, int]:
    """Bytes from the first rank to the second, and back in the backward pass."""
    found = {"state": 0, "gradient": 0}
    for layer in model.layers:
        for block, prefix in _leaves(layer):
            past = block.past()
            if past is not None and past <= tokens // 2:
                sent = back = _message([torch.empty(rows, past, block.dim)])
            else:
                if block.grows:
                    state = block(torch.zeros(rows, tokens // 2, block.dim))[1]
                else:
                    state = block.prefix(torch.zeros(rows, prefix, block.dim))[1] if prefix else block.init_state(rows)
                tensors = [x for _, x in tb.state.named_tensors(state)]
                sent, back = _message(tensors), _message([x for x in tensors if x.is_floating_point()])
                sent += 8 * sum(x.dim() for x in tensors) if block.grows else 0
            found["state"] += sent
            found["gradient"] += back
    return found


def _count(rank: int, port: int, folder: str, recipe: Any, rows: int, tokens: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    model: Any = tb.parallelize(tb.build(recipe, seed=0), init_device_mesh("cpu", (2,), mesh_dim_names=("context",)))
    ids = torch.arange(rows * tokens).view(rows, tokens) % model.vocab
    model(ids, targets=ids).loss.backward()
    (Path(folder) / str(rank)).write_text(str(model.parallel.context.sent[("state", "gradient")[rank]]))
    dist.barrier()
    dist.destroy_process_group()


def counted(recipe: Any, rows: int, tokens: int) -> dict[str, int]:
    """The bytes that each of two processes has sent to the other."""
    import tempfile

    import torch.multiprocessing as mp

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        mp.start_processes(_count, (port, folder, recipe, rows, tokens), nprocs=2, start_method="fork")
        state, gradient = (int((Path(folder) / str(rank)).read_text()) for rank in range(2))
    return {"state": state, "gradient": gradient}


# -- the results -------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    rows, tokens, found = 2, 64, []
    for name in CHECKED[:2] if arguments.quick else CHECKED:
        measure.say(name)
        recipe = tb.load_recipe(name, {"dim": 32, "stack.0.repeat": 2})
        model = tb.build(recipe, seed=0)
        bytes_sent = {"counted": counted(recipe, rows, tokens), "formula": predicted(model, rows, tokens)}
        found.append({"recipe": name, **bytes_sent})
    drawn = {str(tokens): {name: [*cost, cost.seconds()] for name, cost in costs(tokens).items()} for tokens in LENGTHS}
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for format, picture in draw(lambda axes: plot(axes, drawn), size=(7.2, 4.2)).items():
            (arguments.plots / f"parallel.{format}").write_bytes(picture)
    return {"checked": found, "drawn": drawn}


def plot(axes: Any, drawn: dict[str, dict[str, list[float]]]) -> None:
    lengths = list(map(int, drawn))
    for color, name in zip(COLORS, next(iter(drawn.values()))):
        axes.plot(lengths, [at[name][3] for at in drawn.values()], color=color, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="seconds of a training step, by formula")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=[])
    axes.legend(fontsize="x-small")


def tables(results: measure.Result) -> dict[str, str]:
    rows = []
    for each in results["checked"]:
        for kind in ("state", "gradient"):
            way = "forward" if kind == "state" else "backward"
            rows.append([each["recipe"], way, f"{each['formula'][kind]:,}", f"{each['counted'][kind]:,}"])
    checked = measure.table(["recipe", "pass", "bytes by formula", "bytes counted"], rows)
    last = list(results["drawn"])[-1]
    lines = [
        [name, f"{sent / 1e6:,.1f}", f"{flops / 1e12:.2f}", f"{steps:,.0f}", f"{seconds:.3g}"]
        for name, (sent, flops, steps, seconds) in sorted(results["drawn"][last].items(), key=lambda item: item[1][3])
    ]
    head = ["learner and mode", "MB sent, a layer", "TFLOP of a rank, a layer", "steps in sequence", "seconds"]
    picture = "\n\n![seconds of a training step against the length of a row](plots/parallel.svg)"
    return {
        "checked": checked,
        "drawn": measure.table(head, lines) + picture,
        "machine": measure.machine_table(results),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where the picture is written")


if __name__ == "__main__":
    measure.benchmark("parallel", __doc__, "2 minutes", measured, tables, add_options=add_options)

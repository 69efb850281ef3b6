"""The cost of a training step whose tokens are shared out over ranks: bytes, FLOPs and steps in sequence, by formula.

The formulas are those by which ``tb.parallelize`` chooses. They are compared with what two processes send and compute.
The rest is drawn to a million tokens on eight devices. How ranks wait is measured with a block that only takes time.

    python benchmarks/parallel.py --json benchmarks/results/parallel.json --plots benchmarks/plots
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch

import titans_build as tb
from titans_build.blocks.collectives import Ranks
from titans_build.blocks.memory import NeuralMemory
from titans_build.blocks.parallel_plan import Step, elapsed, plan, row_groups
from titans_build.tools.plotting import COLORS, draw

RATE, STEP, MESSAGE = 4e14, 2e-5, 2e-5
"""Of a device: FLOP/s in products, seconds of a step in a sequence, seconds of a message."""
DIM, HEADS, LAYERS, RANKS = 1024, 16, 24, 8
LENGTHS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
TOGETHER = 64
"""Chunks of one token that are solved together."""

DEEP = {"type": "memory", "heads": HEADS, "chunk": 64}
RESET = {**DEEP, "chunk": 16, "reset": 2048, "momentum": False}
LINEAR = {"type": "gated_delta_net", "heads": HEADS}
LARGE = {**DEEP, "chunk": 2048, "retrieve": "anchor", "momentum": False}
WINDOW = {"type": "attention", "heads": HEADS, "window": 2048}
DRAWN = {
    "deep memory, chunk 64: pipelined": (DEEP, "pipelined"),
    "deep memory, reset 2,048: side by side": (RESET, "auto"),
    "large chunks of 2,048: pipelined": (LARGE, "pipelined"),
    "large chunks of 2,048: a sum per chunk": (LARGE, "chunk"),
    "chunks of 65,536: pipelined": ({**LARGE, "chunk": 65_536}, "pipelined"),
    "chunks of 65,536: a sum per chunk": ({**LARGE, "chunk": 65_536}, "chunk"),
    "matrix (64 tokens at once): pipelined": (LINEAR, "pipelined"),
    "matrix (64 tokens at once): affine": (LINEAR, "affine"),
    "attention, window 2,048: side by side": (WINDOW, "auto"),
}
"""A learner and a value of ``context``, by name."""
COMPARED = {
    "matrix": (LINEAR, "affine"),
    "matrix with momentum": ({**LINEAR, "type": "momentum_delta"}, "affine"),
    "deep memory, chunks of 2,048": (LARGE, "chunk"),
    "deep memory, chunks of 65,536": ({**LARGE, "chunk": 65_536}, "chunk"),
    "lact, chunks of 65,536": ({"type": "lact", "heads": 4, "chunk": 65_536}, "chunk"),
}
"""A learner and what is compared with waiting, by name."""


def recipe_of(spec: Any, dim: int, layers: int) -> Any:
    return tb.load_recipe({"version": 1, "dim": dim, "vocab": 64, "layers": {"a": [spec]}, "stack": ["a"] * layers})


def steps_of(step: Step, length: int, ranks: int) -> float:
    """Chunks that a rank computes one after the other; with resets, those of a row between two."""
    if not isinstance(step.block, NeuralMemory):
        return float(step.way != "local")
    rule, chunk = step.block.rule, step.block.chunk
    if step.way == "chunk":  # the last token of a chunk is a step of its own
        return -(-length * ranks // chunk) + length * ranks // chunk
    size = TOGETHER if rule is not None and rule.solves else chunk
    past = step.block.past()
    return -(-min(length, past or length) // size)


def cost(spec: Any, way: str, tokens: int) -> list[float]:
    """Bytes that a rank sends in a layer, FLOPs of a rank in a layer, steps in sequence, and seconds of a step.

    The backward pass sends as much as the forward pass, and computes twice as much.
    """
    steps = plan(tb.build(recipe_of(spec, DIM, LAYERS), device="meta").layers, RANKS, tokens, way)
    learners = [step for step in steps if step.way != "local"]
    sequence = 3 * elapsed(learners, RANKS, lambda step: steps_of(step, tokens // RANKS, RANKS))
    seconds = max(3 * elapsed(learners, RANKS) / RATE, sequence * STEP) + LAYERS * 2 * MESSAGE
    return [2 * learners[0].sent, 3 * learners[0].flops, sequence, seconds]


def compared(layers: int) -> list[list[str]]:
    """For each learner and length, the time of the forward pass side by side over that of waiting."""
    rows = []
    for name, (spec, way) in COMPARED.items():
        recipe = {"version": 1, "dim": DIM, "vocab": 64, "layers": {"a": [spec, "ffn"]}, "stack": ["a"] * layers}
        model = tb.build(tb.load_recipe(recipe), device="meta")
        times = [
            [elapsed(plan(model.layers, RANKS, tokens, each), RANKS) for each in (way, "pipelined")]
            for tokens in LENGTHS
        ]
        rows.append([name, way, str(layers), *(f"{a / b:.2f}" for a, b in times)])
    return rows


# -- two processes --------------------------------------------------------------------------------------------


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


MATRIX = {"type": "memory", "heads": 2, "depth": 1, "norm": False, "clip": None, "chunk": 16}
CHECKED = {
    **{name: (tb.load_recipe(name, {"dim": 32, "stack.0.repeat": 2}), "pipelined") for name in ("mag", "mac", "lmm")},
    "matrix, pipelined": (recipe_of(MATRIX, 64, 2), "pipelined"),
    "matrix, affine": (recipe_of(MATRIX, 64, 2), "affine"),
    "matrix, affine, within a chunk": (recipe_of({**MATRIX, "chunk": 24}, 64, 2), "affine"),
    "lact, pipelined": (recipe_of({"type": "lact", "heads": 2, "chunk": 64}, 64, 2), "pipelined"),
    "lact, a sum": (recipe_of({"type": "lact", "heads": 2, "chunk": 64}, 64, 2), "chunk"),
    "tnt": (tb.load_recipe("tnt", {"dim": 32, "stack.0.repeat": 2}), "auto"),
    "transformer": (tb.load_recipe("transformer", {"dim": 32, "stack.0.repeat": 2}), "auto"),
}
"""A recipe and a value of ``context``, by name."""
BACKENDS = "torch,attention=reference,memory=closed_form"
"""Those whose products are all counted."""


def predicted(model: Any, way: str, rows: int, tokens: int) -> dict[str, float]:
    """Bytes from the first rank to the second, and back in the backward pass; bytes of each rank to all in the forward
    pass; FLOPs of the second rank, and steps in sequence, of the forward pass.
    """
    steps, length = plan(model.layers, 2, tokens, way), tokens // 2
    ways = {step.block: step for step in steps}
    found: dict[str, float] = {"state": 0, "gradient": 0, "gather": 0}
    for layer in model.layers:
        for block, prefix in _leaves(layer):
            step = ways[block]
            if step.way in ("affine", "chunk"):
                halo = 4 * block.dim * (block.conv - 1)
                sent = back = rows * halo
                found["gather"] += rows * (step.sent - halo)
            elif step.way == "window":
                sent = back = _message([torch.empty(rows, block.past(), block.dim)])
            else:
                if block.grows:
                    state = block(torch.zeros(rows, length, block.dim))[1]
                else:
                    state = block.prefix(torch.zeros(rows, prefix, block.dim))[1] if prefix else block.init_state(rows)
                tensors = [x for _, x in tb.state.named_tensors(state)]
                sent, back = _message(tensors), _message([x for x in tensors if x.is_floating_point()])
                sent += 8 * sum(x.dim() for x in tensors) if block.grows else 0
            found["state"] += sent
            found["gradient"] += back
    flops = sum(step.flops for step in steps) + 2 * length * model.dim * model.vocab
    learners = [step for step in steps if isinstance(step.block, NeuralMemory)]
    return {**found, "flops": rows * flops, "steps": elapsed(learners, 2, lambda step: steps_of(step, length, 2))}


class Logged(Ranks):
    """Ranks that note what they wait for."""

    def __init__(self, ranks: Ranks, events: list[Any]) -> None:
        super().__init__(ranks.group, ranks.rank, ranks.size)
        self.events = events

    def send(self, *arguments: Any, **named: Any) -> None:
        self.events.append("send")
        super().send(*arguments, **named)

    def receive(self, *arguments: Any, **named: Any) -> list[torch.Tensor]:
        self.events.append("receive")
        return super().receive(*arguments, **named)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.events.append("all")
        return super().gather(x)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.events.append("all")
        return super().sum(x)


def sequence_of(first: list[Any], second: list[Any]) -> int:
    """The number of steps that follow each other in the events of two ranks."""
    clocks, places, events = [0, 0], [0, 0], [first, second]
    sent: list[int] = []
    while places != [len(first), len(second)]:
        for rank in range(2):
            while places[rank] < len(events[rank]):
                event = events[rank][places[rank]]
                if event == "all" or (event == "receive" and not sent):
                    break
                if event == "send":
                    sent.append(clocks[rank])
                elif event == "receive":
                    clocks[rank] = max(clocks[rank], sent.pop(0))
                else:
                    clocks[rank] += event
                places[rank] += 1
        if all(place < len(each) and each[place] == "all" for place, each in zip(places, events)):
            clocks, places = [max(clocks)] * 2, [place + 1 for place in places]
    return max(clocks)


def _noted(memory: NeuralMemory, events: list[Any]) -> Any:
    """The method ``update``, which notes the chunks that it computes."""
    update = memory.update

    def noted(x: Any, state: Any, **named: Any) -> Any:
        tokens = x.shape[1] if named.get("inputs") is None else named["inputs"][0].theta.shape[1]
        phase = 0 if state is None else int(state.memory.position[0]) % memory.chunk
        events.append(-(-(phase + tokens) // memory.chunk))
        return update(x, state, **named)

    return noted


def _count(rank: int, port: int, folder: str, recipe: Any, way: str, rows: int, tokens: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.utils.flop_counter import FlopCounterMode

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ["TITANS_BUILD_BACKEND"] = BACKENDS
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    model: Any = tb.parallelize(tb.build(recipe, seed=0), mesh, context=way, gather_outputs=False)
    ids = torch.arange(rows * tokens).view(rows, tokens) % model.vocab
    model(ids, targets=ids).loss.backward()  # also finds which parameters are used
    events: list[Any] = []
    ranks = model.parallel.context = Logged(model.parallel.context, events)
    for memory in model.modules():
        if isinstance(memory, NeuralMemory):
            memory.update = _noted(memory, events)  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counter:
        out = model(ids, targets=ids)
    found = {"flops": counter.get_total_flops(), "events": list(events), "gather": 0}
    found["gather"] = sum(ranks.sent.get(name, 0) for name in ("gather", "sum")) - 4  # the loss
    out.loss.backward()
    (Path(folder) / str(rank)).write_text(json.dumps({**found, **ranks.sent, "gather": found["gather"]}))
    dist.barrier()
    dist.destroy_process_group()


def on_processes(program: Any, count: int, *arguments: Any) -> list[Any]:
    """What each of ``count`` processes wrote that ran ``program(rank, port, folder, *arguments)``."""
    import tempfile

    import torch.multiprocessing as mp

    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        mp.start_processes(program, (port, folder, *arguments), nprocs=count, start_method="fork")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(count)]


def counted(recipe: Any, way: str, rows: int, tokens: int) -> dict[str, float]:
    """The same of two processes."""
    first, second = on_processes(_count, 2, recipe, way, rows, tokens)
    found = {"state": first.get("state", 0), "gradient": second.get("gradient", 0), "gather": second["gather"]}
    return {**found, "flops": second["flops"], "steps": sequence_of(first["events"], second["events"])}


# -- waiting -----------------------------------------------------------------------------------------------------------

PAUSE, WAITING, ROWS = 0.3, 6, 4
"""Seconds of a layer in each direction, layers, and rows."""


class Pause(torch.autograd.Function):
    """``x`` and the state, after the time of a layer for its rows, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE * len(x) / ROWS)
        return x + state[:, None]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(PAUSE * len(grad) / ROWS)
        return grad, grad.sum(1)


class Paused(tb.Block):
    """Takes time and no processor. State: the sum of all tokens, [batch, dim]."""

    sharding = "pipelined"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale = torch.nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.scale)

    def init_state(self, batch_size: int) -> torch.Tensor:
        return self.scale.new_zeros(batch_size, self.dim)

    def forward(self, x: torch.Tensor, state: Any = None, *, mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.init_state(len(x)) if state is None else state
        return Pause.apply(x * self.scale, state), state + x.sum(1)  # type: ignore[no-untyped-call]


def _wait(rank: int, port: int, folder: str, ranks: int, rows: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    tb.register("paused")(Paused)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    model: Any = tb.parallelize(tb.build(recipe_of("paused", 8, WAITING), seed=0), mesh, gather_outputs=False)
    ids, found = torch.arange(rows * 32).view(rows, 32) % model.vocab, []
    for _ in range(2):
        clocks = []
        for direction in ("forward", "backward"):
            dist.barrier()
            start = time.perf_counter()
            if direction == "forward":
                out = model(ids, targets=ids)
            else:
                out.loss.backward()
            dist.barrier()
            clocks.append((time.perf_counter() - start) / PAUSE * ROWS / rows)
        found.append(clocks)
    (Path(folder) / str(rank)).write_text(json.dumps([min(each) for each in zip(*found)]))
    dist.destroy_process_group()


def waited(ranks: int, rows: int) -> dict[str, Any]:
    """The time of both passes in that of a layer, by formula and measured."""
    groups = row_groups(rows, 8, True, ranks)
    layers = [Step("", Paused(8), "pipelined", 1.0)] * WAITING
    formula = [elapsed(layers, ranks, lambda step: 1.0, groups=groups), WAITING * (1 + (ranks - 1) / groups)]
    return {"ranks": ranks, "rows": rows, "formula": formula, "measured": on_processes(_wait, ranks, ranks, rows)[0]}


# -- the results -------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    rows, tokens, found = 1, 64, []
    for name, (recipe, way) in list(CHECKED.items())[:: 4 if arguments.quick else 1]:
        measure.say(name)
        formula = predicted(tb.build(recipe, seed=0), way, rows, tokens)
        found.append({"recipe": name, "counted": counted(recipe, way, rows, tokens), "formula": formula})
    waits = [(2, 2)] if arguments.quick else [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    waiting = [waited(*each) for each in waits]
    drawn = {str(tokens): {name: cost(*each, tokens) for name, each in DRAWN.items()} for tokens in LENGTHS}
    if arguments.plots is not None:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for format, picture in draw(lambda axes: plot(axes, drawn), size=(7.2, 4.2)).items():
            (arguments.plots / f"parallel.{format}").write_bytes(picture)
    return {"checked": found, "waiting": waiting, "drawn": drawn, "compared": compared(4) + compared(LAYERS)}


def plot(axes: Any, drawn: dict[str, dict[str, list[float]]]) -> None:
    lengths = list(map(int, drawn))
    for color, name in zip(COLORS, next(iter(drawn.values()))):
        axes.plot(lengths, [at[name][3] for at in drawn.values()], color=color, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="seconds of a training step, by formula")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=[])
    axes.legend(fontsize="x-small")


def tables(results: measure.Result) -> dict[str, str]:
    head = ["recipe, way", "what", "by formula", "counted"]
    names = {
        "state": "bytes to the next rank", "gradient": "bytes to the rank before", "gather": "bytes to all",
        "flops": "FLOPs of a rank", "steps": "chunks in sequence",
    }  # fmt: skip
    rows = []
    for each in results["checked"]:
        for kind, name in names.items():
            formula, counted = (each[by][kind] for by in ("formula", "counted"))
            if formula:
                rows.append([each["recipe"], name, f"{formula:,.0f}", f"{counted:,.0f}"])
    checked = measure.table(head, rows)
    head = ["ranks", "rows", "forward, by formula", "measured", "backward, by formula", "measured"]
    waiting = [
        [str(each["ranks"]), str(each["rows"])]
        + [f"{x:.2f}" for pair in zip(each["formula"], each["measured"]) for x in pair]
        for each in results["waiting"]
    ]
    waits = measure.table(head, waiting)
    last = list(results["drawn"])[-1]
    lines = [
        [name, f"{sent / 1e6:,.1f}", f"{flops / 1e12:.2f}", f"{steps:,.0f}", f"{seconds:.3g}"]
        for name, (sent, flops, steps, seconds) in sorted(results["drawn"][last].items(), key=lambda item: item[1][3])
    ]
    head = ["learner and mode", "MB sent, a layer", "TFLOP of a rank, a layer", "steps in sequence", "seconds"]
    picture = "\n\n![seconds of a training step against the length of a row](plots/parallel.svg)"
    return {
        "checked": checked,
        "waiting": waits,
        "drawn": measure.table(head, lines) + picture,
        "compared": measure.table(["learner", "way", "layers", *(f"{n:,}" for n in LENGTHS)], results["compared"]),
        "machine": measure.machine_table(results),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where the picture is written")


if __name__ == "__main__":
    measure.benchmark("parallel", __doc__, "2 minutes", measured, tables, add_options=add_options)

"""Models trained with a large chunk and read with smaller ones, before and after a short second stage at chunk 1.

python benchmarks/stages.py [--quick] [--json FILE]

Each model recalls the values of keys in a long series of pairs, most of which only its memory can know. The second
stage has 5% of the steps. Beside it, as many steps are trained at the large chunk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from safetensors.torch import load_file

import titans_build as tb

MODELS = {"mac": "layers.mac.0.memory", "mag": "layers.mag.0.of.branches.1", "lmm": "layers.lmm.0"}
"""The packaged recipes, and the path of the memory of each."""
NEAR = {"mac": {"layers.mac.0.segment": 64}, "mag": {"layers.mag.0.of.branches.0.window": 16}, "lmm": {}}
"""Attention sees less than a row, so that what is far is left to the memory."""
LARGE, SMALL = 64, 1
CHUNKS = (1, 8, 16, 64)
WANTED = 1.01
"""The goal: the loss at chunk 1 after the second stage, over that at chunk 64 before it."""


class Sizes(NamedTuple):
    dim: int
    vocab: int
    steps: int
    second: int
    batch: int
    length: int
    valid: int

    @property
    def data(self) -> dict[str, Any]:
        return {"task": "recall", "vocab": self.vocab, "length": self.length}


FULL, QUICK = Sizes(48, 64, 1500, 75, 16, 256, 16), Sizes(8, 8, 2, 1, 2, 128, 1)


def settings(sizes: Sizes, **more: Any) -> dict[str, Any]:
    never = {"valid_every": None, "checkpoint_every": None, "surprise_every": None, "tensorboard": False}
    return {"batch": sizes.batch, "lr": 3e-3, "log_every": sizes.steps, **never, **more}


def losses(folder: Path, path: str, sizes: Sizes) -> dict[str, float]:
    """The loss on held-out files of a saved model that is read at each chunk."""
    found = {}
    for chunk in CHUNKS:
        model = tb.load(folder, overrides={f"{path}.chunk": chunk}).eval()
        source = tb.open_source(sizes.data, rows=sizes.batch, split="valid")
        with torch.no_grad():
            batches = [source.batch(index) for index in range(sizes.valid)]
            parts = [float(model(batch.tokens, targets=batch.targets).loss) for batch in batches]
        found[str(chunk)] = sum(parts) / len(parts)
    return found


def trained(name: str, path: str, sizes: Sizes, folder: Path) -> measure.Result:
    torch.set_num_threads(1)
    small = {"dim": sizes.dim, "vocab": sizes.vocab, "stack.0.repeat": 2, **NEAR[name]}
    recipe = tb.load_recipe(name, {**small, f"{path}.chunk": LARGE, f"{path}.heads": 2})
    second = {"steps": sizes.second, "lr": 1e-3, "optimizer": "fresh"}
    stages = [{"steps": sizes.steps}, {**second, "recipe": {f"{path}.chunk": SMALL}}]
    run = tb.train(recipe, sizes.data, settings(sizes, stages=stages), folder / "run")
    # where a stage changes the recipe, a run has a checkpoint
    before, checkpoint = tb.build(recipe), folder / "run" / "checkpoints" / f"step-{sizes.steps:08d}"
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    before.load_state_dict({name: tensors[f"model.{name}"] for name in before.state_dict()})
    tb.save(before, folder / "before")
    more = settings(sizes, lr=second["lr"], steps=sizes.second)
    tb.train(recipe, sizes.data, more, folder / "more", weights=folder / "before")
    read = {kind: losses(folder / kind, path, sizes) for kind in ("before", "run", "more")}
    parameters = sum(x.numel() for x in before.parameters())
    ticks = [event for event in run.history if event["event"] == "step"]
    return {"model": name, "parameters": parameters, "losses": read, "tokens": ticks[-1]["tokens"]}


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    measure.say(f"{', '.join(MODELS)}: {sizes.steps} steps at chunk {LARGE}, {sizes.second} at chunk {SMALL}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=context) as pool:
        runs = [pool.submit(trained, name, path, sizes, Path(folder) / name) for name, path in MODELS.items()]
        return {"shape": sizes._asdict(), "models": [run.result() for run in runs]}


KINDS = {"before": f"chunk {LARGE}", "more": f"chunk {LARGE}, and 5% more", "run": f"chunk {LARGE}, then 5% at chunk 1"}


def tables(results: measure.Result) -> dict[str, str]:
    rows, goals, small, large = [], [], str(SMALL), str(LARGE)
    for row in results["models"]:
        found = row["losses"]
        for kind, text in KINDS.items():
            cells = [f"{found[kind][str(chunk)]:.4f}" for chunk in CHUNKS]
            rows.append([row["model"], text, *cells, f"{found[kind][small] / found[kind][large]:.3f}"])
        goals.append(found["run"][small] / found["before"][large])
    near = lambda ratio: ratio <= WANTED  # noqa: E731
    what = "loss at chunk 1 after the second stage, over that at chunk 64 before"
    goal = measure.goal(what, f"at most {WANTED}", goals, near, "{:.4f}")
    head = ["model", "trained at", *(f"read at {chunk}" for chunk in CHUNKS), "at 1 over at 64"]
    return {
        "losses": measure.table(head, rows),
        "goals": measure.table(measure.GOALS, [goal]),
        "machine": measure.machine_table(results),
    }


if __name__ == "__main__":
    measure.benchmark("stages", __doc__, "25 minutes", measured, tables)

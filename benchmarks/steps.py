"""The time of a step of one program over that of another.

python benchmarks/steps.py overhead|packing|torch_path|learners [--quick] [--json FILE]

``overhead``: the packaged MAG against the same model without memories and gates. ``packing``: documents packed in one
row against one document of as many tokens, and against the same documents with padding. ``torch_path``: the PyTorch
backend, eager and compiled, and the C kernels. ``learners``: the family of learners with as many parameters each. All
but the first in processor time of one thread, which other processes affect little.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import measure
import torch

import titans_build as tb
from titans_build.tools.gpu.speed import layer_shapes, memory_operation
from titans_build.tools.gpu.timing import passes
from titans_build.tools.training.compare import fit, parameters_of
from titans_build.tools.training.family import LEARNERS, recipe_of

Kinds = dict[str, dict[str, Callable[[], Any]]]
"""The cases of each kind of step; the first is the one that the others are compared with."""


# -- the cost of the memory in MAG -------------------------------------------------------------------------------------


def mag_and_window(quick: bool) -> dict[str, Any]:
    """The recipe of MAG, and the same without memories and gates."""
    mag = tb.load_recipe("mag", {"dim": 32, "stack.0.repeat": 1} if quick else None)
    data = mag.to_dict()
    persistent = data["layers"]["mag"][0]
    persistent["of"] = persistent["of"]["branches"][0]
    return {"window": tb.load_recipe(data), "MAG": mag}


def overhead(quick: bool) -> Kinds:
    """A training step, reading, and one token of each model."""
    tokens = torch.randint(256, (1, 64) if quick else (4, 1024), generator=torch.Generator().manual_seed(0))

    def steps(model: Any) -> dict[str, Callable[[], Any]]:
        read = torch.no_grad()(lambda: model(tokens))
        state = read().state
        return {
            "training step": passes(lambda: model(tokens, targets=tokens).loss, list(model.parameters()), True),
            "reading": read,
            "one token": torch.no_grad()(lambda: model(tokens[:, -1:], state)),
        }

    every = {name: steps(tb.build(recipe, seed=0)) for name, recipe in mag_and_window(quick).items()}
    return {kind: {name: every[name][kind] for name in every} for kind in every["MAG"]}


# -- packed documents --------------------------------------------------------------------------------------------------

DOCUMENTS = {
    "long": [244, 460, 485, 165, 332, 362],
    "short": [40, 9, 122, 61, 17, 133, 90, 28, 75, 103, 55, 8, 119, 36, 128],
}


def packing(quick: bool) -> Kinds:
    """A training step of each packaged architecture: one document, several in a row, and the same with padding."""
    torch.set_num_threads(1)
    return {
        f"{name}, {len(lengths)} {kind} documents": pack(name, [4, 9, 3] if quick else lengths, quick)
        for name in (["lmm"] if quick else ["lmm", "mac", "mag", "mal", "transformer"])
        for kind, lengths in DOCUMENTS.items()
    }


def pack(name: str, lengths: list[int], quick: bool) -> dict[str, Callable[[], Any]]:
    model = tb.build(tb.load_recipe(name, overrides={"dim": 32} if quick else None), seed=0)
    row = torch.randint(256, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    pieces = row[0].split(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    parameters = list(model.parameters())
    return {
        "one document": passes(lambda: model(row, targets=row).loss, parameters, True),
        "packed": passes(lambda: model(row, targets=row, cu_seqlens=ends).loss, parameters, True),
        "padded": passes(lambda: model(padded, targets=padded, mask=mask).loss, parameters, True),
    }


# -- the PyTorch backend -----------------------------------------------------------------------------------------------

MEMORIES = {"memory, expansion 4": (2, 4), "memory, expansion 1": (2, 1), "memory, one layer": (1, 1)}
WAYS = {"torch": "torch,attention=sdpa", "compiled": "torch,attention=sdpa", "C kernels": "auto"}


def torch_path(quick: bool) -> Kinds:
    """Memory operations and models, forward and both passes, in each of three ways."""
    torch.set_num_threads(1)
    whats = ["memory, one layer"] if quick else [*MEMORIES, "lmm", "mac", "mag"]
    return {
        f"{what}, {'both' if both else 'forward'}": {way: run(what, both, way, quick) for way in WAYS}
        for what in whats
        for both in (False, True)
    }


def run(what: str, both: bool, way: str, quick: bool) -> Callable[[], Any]:
    """Create inputs and parameters of a case, and return a function that runs it once."""
    torch.manual_seed(0)
    if what in MEMORIES:
        heads, length, width, chunk = (1, 24, 8, 8) if quick else (4, 2048, 64, 64)
        depth, expansion = MEMORIES[what]
        shapes = layer_shapes(width, expansion, depth)
        backend = "native" if way == "C kernels" else "torch"
        forward, leaves = memory_operation(1, length, heads, shapes, chunk, backend)
    else:
        model = tb.build(tb.load_recipe(what, overrides={"dim": 128, "vocab": 256, "stack.0.repeat": 2}))
        text = torch.randint(256, (1, 513))
        forward, leaves = (lambda: model(text[:, :-1], targets=text[:, 1:]).loss), list(model.parameters())
    once = passes(torch.compile(forward) if way == "compiled" else forward, leaves, both)

    def step() -> None:
        os.environ["TITANS_BUILD_BACKEND"] = WAYS[way]
        once()

    return step


# -- the family of learners --------------------------------------------------------------------------------------------


def learners(quick: bool) -> Kinds:
    """A training step of each learner of ``titans-train reproduce``: first the memory of Titans, then attention."""
    torch.set_num_threads(1)
    # small: some learners make the weights of every token, and more than 10 GB of them at twice this width and length
    dim, shape = (32, (1, 32)) if quick else (128, (2, 256))
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))
    parameters = parameters_of(load_with_vocab(recipe_of({"type": "attention"}, dim)))

    def lazily(learner: Any) -> Callable[[], Any]:
        """A learner that this version or machine does not have raises at the first call, which reports it."""

        @functools.cache
        def made() -> Callable[[], Any]:
            model = tb.build(fit(load_with_vocab(recipe_of(learner, dim)), parameters).recipe, seed=0)
            return passes(lambda: model(tokens, targets=tokens).loss, list(model.parameters()), True)

        return lambda: made()()

    names = ["titans", "transformer", *(name for name in LEARNERS if name not in ("titans", "transformer"))]
    return {"training step": {name: lazily(LEARNERS[name][1]) for name in names}}


def load_with_vocab(recipe: tb.Recipe) -> tb.Recipe:
    return tb.load_recipe(recipe, {"vocab": 256})


COMPARISONS = {
    "overhead": (overhead, {"seconds": 60}),
    "packing": (packing, {"seconds": 0, "least": 4, "clock": time.process_time}),
    "torch_path": (torch_path, {"seconds": 0, "least": 4, "clock": time.process_time}),
    "learners": (learners, {"seconds": 0, "least": 4, "clock": time.process_time}),
}


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["program"] = arguments.comparison
    make, how = COMPARISONS[arguments.comparison]
    kinds = make(arguments.quick)
    results["environment"]["threads"] = torch.get_num_threads()
    rows = []
    for kind, cases in kinds.items():
        measure.say(kind)
        for name, case in list(cases.items()):
            try:
                case()
            except (tb.BackendError, tb.RecipeError) as error:  # there may be no C compiler, or no such learner
                results["skipped"][f"{kind}, {name}"] = str(error).splitlines()[-1].strip(" -")
                del cases[name]
        rows += measure.compare(kind, cases, **how | {"seconds": 0} if arguments.quick else how)
    return {"steps": rows}


def tables(results: measure.Result) -> dict[str, str]:
    return {"steps": measure.comparison_table(results["steps"]), "machine": measure.machine_table(results)}


if __name__ == "__main__":
    measure.benchmark(
        "steps", __doc__, "2 to 4 minutes", measured, tables,
        add_options=lambda parser: parser.add_argument("comparison", choices=COMPARISONS),
    )  # fmt: skip

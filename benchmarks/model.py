"""Whole models: a training step and cached generation of MAC, against titans-pytorch's and plain transformers.

python benchmarks/model.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import measure
import torch
from baselines import Transformer, titans_pytorch_mac
from torch import Tensor, nn

import titans_build as tb


class Sizes(NamedTuple):
    dim: int
    depth: int
    batch: int
    time: int
    contexts: tuple[int, ...]
    late: int
    """A late position to generate at."""
    tokens: int
    """New tokens in one sample: a whole segment, so that every sample has the same segment boundaries."""
    seconds: float
    matrix: int


FULL = Sizes(256, 4, 2, 1024, (128, 4096), 1_000_000, 128, 60, 2048)
QUICK = Sizes(32, 1, 1, 16, (8, 16), 1_000, 8, 0, 128)
SHAPE = {"heads": 4, "vocab": 256, "segment": 128, "chunk": 64, "persistent": 16}
"""Of the packaged recipes, and so of the models that they are compared with."""


class Case(NamedTuple):
    kind: str
    expansion: int | None = None
    bfloat16: bool = False
    """Under autocast."""
    medium: bool = False
    """With float32 matrix products of ``medium`` precision."""

    @property
    def name(self) -> str:
        how = ", bfloat16 autocast" if self.bfloat16 else ", bfloat16 operands" if self.medium else ""
        return KINDS[self.kind] + how


KINDS = {
    "mac": "mac",
    "package": "titans-pytorch MAC",
    "transformer": "transformer (packaged recipe)",
    "plain": "plain SDPA transformer",
}
CASES = [
    *(Case("mac", expansion, *how) for how in ((), (True,), (False, True)) for expansion in (4, 1)),
    *(Case("package", expansion) for expansion in (4, 1)),
    Case("transformer"),
    Case("plain"),
]


def model(case: Case, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    size = {"dim": sizes.dim, "depth": sizes.depth}
    if case.kind == "package":
        return titans_pytorch_mac(**size, **SHAPE, expansion=case.expansion or 0)
    if case.kind == "plain":
        slots = max(sizes.time, max(sizes.contexts) + 2 * sizes.tokens)
        return Transformer(**size, heads=SHAPE["heads"], vocab=SHAPE["vocab"], slots=slots)
    memory = {"layers.mac.0.memory.expansion": case.expansion} if case.kind == "mac" else {}
    return tb.build(tb.load_recipe(case.kind, {"dim": sizes.dim, "stack.0.repeat": sizes.depth, **memory}))


# -- a training step ---------------------------------------------------------------------------------------------------


def training_step(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Forward, backward and AdamW on one batch. The step raises ``FloatingPointError`` if the loss is not finite."""
    module = model(case, sizes)
    text = torch.randint(SHAPE["vocab"], (sizes.batch, sizes.time + 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def loss() -> Tensor:
        if case.kind == "plain":
            return module.loss(text)  # type: ignore[operator]
        if case.kind == "package":
            return module(text, return_loss=True)
        return module(text[:, :-1], targets=text[:, 1:]).loss

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
            value = loss()
        if not value.isfinite():
            raise FloatingPointError(f"the loss is {value.item()}")
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return measure.medium(step) if case.medium else step


def training(sizes: Sizes, absent: bool, quick: bool) -> list[measure.Result]:
    ready = {case: training_step(case, sizes) for case in CASES if not (absent and case.kind == "package")}
    measure.say(f"training steps: {len(ready)} cases, about {sizes.seconds:.0f} s")
    samples, rate = measure.interleave_with_rate(ready, sizes.seconds, sizes.matrix)
    measure.say(f"peak memory: about {8 * len(ready)} s")
    return [
        {
            **case._asdict(),
            "parameters": sum(p.numel() for p in model(case, sizes).parameters()),
            "seconds": measure.summary(samples[case]),
            "peak": None if quick and case != CASES[0] else measure.alone(__file__, case, quick),
            "rate": rate,
        }
        for case in ready
    ]


# -- generation --------------------------------------------------------------------------------------------------------


def ours(module: Any, prompt: Tensor, position: int, new: int) -> Callable[[], None]:
    """Generate ``new`` tokens in a call, after ``prompt``, from ``position`` or the next multiple of the period on."""
    generated = module.generate(prompt, max_new_tokens=0)
    ahead = max(0, -(-(position - prompt.shape[1]) // module.period)) * module.period
    names = iter([name for name, _ in tb.state.named_tensors(generated.state)])
    moved = tb.state.map_state(lambda x: x + ahead if next(names).endswith("position") else x, generated.state)
    generated = generated._replace(state=moved)

    def sample() -> None:
        nonlocal generated
        none = generated.tokens[:, :0]
        generated = module.generate(none, max_new_tokens=new, state=generated.state, logits=generated.logits)

    return sample


def plain(module: Transformer, prompt: Tensor, new: int) -> Callable[[], None]:
    """Every sample starts at the same slot: the cache is limited."""
    caches = module.empty_cache(1)

    @torch.no_grad()
    def sample() -> None:
        logits = first
        for count in range(new):
            logits = module(logits[:, -1:].argmax(dim=-1), caches, prompt.shape[1] + count)

    with torch.no_grad():
        first = module(prompt, caches)
    return sample


def package(module: Any, prompt: Tensor, new: int, samples: int) -> list[float]:
    """Seconds of each sample, timed between the tokens of one call, because generation cannot be continued."""
    ticks: list[float] = []

    def tick(logits: Tensor, **_: Any) -> Tensor:
        ticks.append(time.perf_counter())
        return logits

    total = prompt.shape[1] + samples * new + 1
    module.sample(prompt, total, temperature=0.0, filter_fn=tick, filter_kwargs={}, show_progress=False, use_cache=True)
    return [b - a for a, b in itertools.pairwise(ticks[::new])]


def generation(sizes: Sizes, absent: bool) -> list[measure.Result]:
    rounds, ready, samples = 5 if sizes.seconds else 1, {}, {}
    measure.say(f"generation: {rounds} rounds, about {sizes.seconds:.0f} s")
    for case in CASES:
        if case.bfloat16 or case.medium or (absent and case.kind == "package"):
            continue
        module: Any = model(case, sizes).eval()
        for context in (*sizes.contexts, sizes.late):
            prompt = torch.randint(SHAPE["vocab"], (1, min(context, max(sizes.contexts))))
            if case.kind in ("mac", "transformer"):
                ready[case, context] = ours(module, prompt, context, sizes.tokens)
            elif context != sizes.late:
                if case.kind == "plain":
                    ready[case, context] = plain(module, prompt, sizes.tokens)
                else:
                    samples[case, context] = package(module, prompt, sizes.tokens, min(rounds, 3))
    samples |= measure.interleave(ready, 0, least=rounds)
    return [
        {**case._asdict(), "context": context, "seconds": measure.summary([s / sizes.tokens for s in taken])}
        for (case, context), taken in sorted(samples.items(), key=lambda item: (CASES.index(item[0][0]), item[0][1]))
    ]


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    per_token: dict[Case, dict[int, float]] = {}
    for row in results["generation"]:
        per_token.setdefault(_case(row), {})[row["context"]] = row["seconds"]["median"]
    steps = []
    for row in results["training"]:
        seconds, peak = row["seconds"], row["peak"]
        times = [f"{seconds['median']:.3f}", f"{seconds['low']:.3f} to {seconds['high']:.3f}"]
        peaks = [measure.megabytes(peak["peak"] - below) for below in (0, peak["inputs"])] if peak else [None, None]
        steps.append([_case(row).name, row["expansion"], f"{row['parameters'] / 1e6:.2f} M", *times, *peaks])
    contexts = sorted({row["context"] for row in results["generation"]})
    tokens = [
        [case.name, case.expansion, *(f"{1 / of[c]:,.0f} ({of[c] * 1e3:.2f})" if c in of else None for c in contexts)]
        for case, of in per_token.items()
    ]
    step_head = ["model", "expansion", "parameters", "seconds", "quartiles", "peak MB", "of it above the model"]
    token_head = ["tokens per second (ms per token)", "expansion", *(f"after {context:,}" for context in contexts)]
    return {
        "goals": measure.table(measure.GOALS, goals(results, per_token)),
        "machine": measure.machine_table(results, [row["rate"] for row in results["training"]]),
        "training step": measure.table(step_head, steps),
        "generation": measure.table(token_head, tokens),
    }


def goals(results: measure.Result, per_token: dict[Case, dict[int, float]]) -> Iterator[tuple[str, ...]]:
    steps = {_case(row): row for row in results["training"]}
    for expansion, most in ((4, 0.65), (1, 0.45)):
        case, name = Case("mac", expansion), f"mac, expansion {expansion}"
        step, tokens = steps[case], list(per_token[case].values())
        taken, peak = [step["seconds"]["median"]], [step["peak"]["peak"] / 1e6] if step["peak"] else []
        yield measure.goal(f"{name}: s per step", f"{most}", taken, lambda x, y=most: x <= y, "{:.3f}")
        what = f"{name}: peak MB of a step, whole process"
        yield measure.goal(what, "under 1000", peak, lambda x: x < 1000, "{:.0f}")
        rates = [1 / seconds for seconds in tokens]
        yield measure.goal(f"{name}: tokens generated per s", "400", rates, lambda x: x >= 400, "{:.0f}")
        what, ratio = f"{name}: time of a token at the latest position over the first", tokens[-1] / tokens[0]
        yield measure.goal(what, "within 5% of 1", [ratio], lambda x: abs(x - 1) <= 0.05, "{:.3f}")


def _case(row: measure.Result) -> Case:
    return Case(**{field: row[field] for field in Case._fields})


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    results["skipped"] = absent = measure.missing()
    return {
        "shape": {**sizes._asdict(), **SHAPE},
        "training": training(sizes, bool(absent), arguments.quick),
        "generation": generation(sizes, bool(absent)),
    }


def alone(case: list[Any], quick: bool) -> measure.Result:
    if case[0] == "package":
        measure.missing()  # imports it
    return measure.peak_memory(lambda: training_step(Case(*case), QUICK if quick else FULL))


if __name__ == "__main__":
    measure.benchmark("model", __doc__, "5 minutes", measured, tables, alone=alone)

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
from titans_build.blocks.generation import Sampler, read_prompt, steps

RATE = "matrix product"


class Sizes(NamedTuple):
    dim: int
    heads: int
    depth: int
    vocab: int
    segment: int
    chunk: int
    persistent: int
    batch: int
    time: int
    contexts: tuple[int, ...]
    late: int
    """A late position to generate at."""
    tokens: int
    """New tokens in one sample: a whole segment, so that every sample has the same segment boundaries."""
    seconds: float
    matrix: int


FULL = Sizes(256, 4, 4, 256, 128, 64, 16, 2, 1024, (128, 4096), 1_000_000, 128, 60, 2048)
QUICK = Sizes(32, 2, 1, 32, 8, 4, 2, 1, 16, (8, 16), 1_000, 8, 0, 128)


class Case(NamedTuple):
    kind: str
    expansion: int | None = None
    bfloat16: bool = False
    """Under autocast."""
    medium: bool = False
    """With float32 matrix products of ``medium`` precision."""

    @property
    def name(self) -> str:
        return (
            KINDS[self.kind]
            + (", bfloat16 autocast" if self.bfloat16 else "")
            + (", bfloat16 operands" if self.medium else "")
        )


KINDS = {
    "mac": "mac",
    "package": "titans-pytorch MAC",
    "transformer": "transformer (packaged recipe)",
    "plain": "plain SDPA transformer",
}
CASES = [
    Case("mac", 4),
    Case("mac", 1),
    Case("mac", 4, bfloat16=True),
    Case("mac", 1, bfloat16=True),
    Case("mac", 4, medium=True),
    Case("mac", 1, medium=True),
    Case("package", 4),
    Case("package", 1),
    Case("transformer"),
    Case("plain"),
]


def model(case: Case, sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dim": sizes.dim, "vocab": sizes.vocab, "stack.0.repeat": sizes.depth}
    if case.kind == "mac":
        block = "layers.mac.0"
        shape |= {
            f"{block}.segment": sizes.segment,
            f"{block}.persistent": sizes.persistent,
            f"{block}.memory.heads": sizes.heads,
            f"{block}.memory.chunk": sizes.chunk,
            f"{block}.memory.expansion": case.expansion,
            f"{block}.attend.heads": sizes.heads,
        }
        return tb.build(tb.load_recipe("mac", overrides=shape))
    if case.kind == "transformer":
        return tb.build(tb.load_recipe("transformer", overrides=shape | {"layers.plain.0.heads": sizes.heads}))
    if case.kind == "plain":
        slots = max(sizes.time, max(sizes.contexts) + 2 * sizes.tokens)
        return Transformer(sizes.dim, sizes.heads, sizes.depth, sizes.vocab, slots)
    assert case.expansion is not None
    return titans_pytorch_mac(
        sizes.dim, sizes.heads, sizes.depth, sizes.vocab, sizes.segment, sizes.chunk, sizes.persistent, case.expansion
    )


# -- a training step ---------------------------------------------------------------------------------------------------


def training_step(case: Case, sizes: Sizes) -> Callable[[], Any]:
    """Forward, backward and AdamW on one batch. The step raises ``FloatingPointError`` if the loss is not finite."""
    module = model(case, sizes)
    text = torch.randint(sizes.vocab, (sizes.batch, sizes.time + 1))
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


def training(sizes: Sizes, skipped: dict[str, str], quick: bool) -> list[measure.Result]:
    ready: dict[Case, Callable[[], Any]] = {}
    for case in CASES:
        if case.kind == "package" and measure.TITANS_PYTORCH in skipped:
            continue
        step = training_step(case, sizes)
        try:
            step()
        except Exception as error:
            if not case.bfloat16:
                raise
            skipped[f"{case.name}, expansion {case.expansion}"] = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        ready[case] = step
    measure.say(f"training steps: {len(ready)} cases, about {sizes.seconds:.0f} s")
    samples = measure.interleave(
        {RATE: measure.matrix_product(sizes.matrix), **ready}, sizes.seconds, least=3 if sizes.seconds else 1
    )
    wanted = [case for case in ready if case.expansion == 4 or not quick][: 1 if quick else None]
    measure.say(f"peak memory: {len(wanted)} processes, about {8 * len(wanted)} s")
    peaks = {case: measure.peak_memory(__file__, case, quick) for case in wanted}
    reached = measure.rate(samples[RATE], sizes.matrix)
    return [
        {
            **case._asdict(),
            "parameters": sum(p.numel() for p in model(case, sizes).parameters()),
            "seconds": measure.summary(samples[case]),
            "peak": peaks.get(case),
            "rate": reached,
        }
        for case in ready
    ]


# -- generation --------------------------------------------------------------------------------------------------------


def late(state: Any, tokens: int) -> Any:
    """The state with its positions moved by ``tokens``, a multiple of the model's period."""
    if not isinstance(state, tuple):
        return state
    if not hasattr(state, "_fields"):
        return tuple(late(child, tokens) for child in state)
    children = {name: late(child, tokens) for name, child in state._asdict().items()}
    if "position" in children:
        children["position"] = children["position"] + tokens
    return type(state)(**children)


@torch.no_grad()
def ours(module: Any, prompt: Tensor, position: int) -> Iterator[None]:
    """Generate after ``prompt``, from ``position`` or the next multiple of the period on; yields after every token."""
    logits, state = read_prompt(module, prompt)
    ahead = position - prompt.shape[1]
    state = late(state, -(-ahead // module.period) * module.period if ahead > 0 else 0)
    for _ in steps(module, logits, state, Sampler(), 10**9):
        yield


@torch.no_grad()
def plain(module: Transformer, prompt: Tensor, sizes: Sizes) -> Iterator[None]:
    caches = module.empty_cache(1)
    logits = module(prompt, caches)
    # the cache is limited: every sample starts at the same slot
    for count in itertools.count():
        token = logits[:, -1:].argmax(dim=-1)
        logits = module(token, caches, prompt.shape[1] + count % sizes.tokens)
        yield


def package(module: Any, prompt: Tensor, sizes: Sizes, samples: int) -> list[float]:
    """Seconds of each sample, timed between the tokens of one call, because generation cannot be continued."""
    ticks: list[float] = []

    def tick(logits: Tensor, **_: Any) -> Tensor:
        ticks.append(time.perf_counter())
        return logits

    total = prompt.shape[1] + samples * sizes.tokens + 1
    module.sample(prompt, total, temperature=0.0, filter_fn=tick, filter_kwargs={}, show_progress=False, use_cache=True)
    marks = ticks[:: sizes.tokens]
    return [b - a for a, b in itertools.pairwise(marks)]


def generation(sizes: Sizes, skipped: dict[str, str]) -> list[measure.Result]:
    cases = [case for case in CASES if not (case.bfloat16 or case.medium)]
    rounds = 5 if sizes.seconds else 1
    measure.say(f"generation: {rounds} rounds, about {sizes.seconds:.0f} s")
    streams: dict[tuple[Case, int], Iterator[None]] = {}
    for case in cases:
        if case.kind == "package":
            continue
        module = model(case, sizes).eval()
        for context in sizes.contexts if case.kind == "plain" else (*sizes.contexts, sizes.late):
            prompt = torch.randint(sizes.vocab, (1, min(context, max(sizes.contexts))))
            if case.kind == "plain":
                streams[case, context] = plain(module, prompt, sizes)  # type: ignore[arg-type]
            else:
                streams[case, context] = ours(module, prompt, context)

    def sample(stream: Iterator[None]) -> Callable[[], None]:
        return lambda: next(itertools.islice(stream, sizes.tokens - 1, None))

    samples: dict[Any, list[float]] = measure.interleave(
        {key: sample(stream) for key, stream in streams.items()}, 0, least=rounds
    )
    if measure.TITANS_PYTORCH not in skipped:
        for case in cases:
            if case.kind == "package":
                module = model(case, sizes).eval()
                for context in sizes.contexts:
                    prompt = torch.randint(sizes.vocab, (1, context))
                    samples[case, context] = package(module, prompt, sizes, min(rounds, 3))
    return [
        {**case._asdict(), "context": context, "seconds": measure.summary([s / sizes.tokens for s in taken])}
        for case, context in sorted(samples, key=lambda key: (CASES.index(key[0]), key[1]))
        for taken in [samples[case, context]]
    ]


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    contexts = sorted({row["context"] for row in results["generation"]})
    per_token: dict[Case, dict[int, measure.Result]] = {}
    for row in results["generation"]:
        per_token.setdefault(_case(row), {})[row["context"]] = row["seconds"]
    return {
        "goals": measure.table(measure.GOALS, goals(results, per_token)),
        "machine": measure.machine_table(results, [row["rate"] for row in results["training"]]),
        "training step": measure.table(
            ["model", "expansion", "parameters", "seconds", "quartiles", "peak MB", "of it above the model"],
            [
                [_case(row).name, row["expansion"], f"{row['parameters'] / 1e6:.2f} M"]
                + [f"{row['seconds']['median']:.3f}", f"{row['seconds']['low']:.3f} to {row['seconds']['high']:.3f}"]
                + [
                    measure.megabytes(row["peak"][a] - (row["peak"][b] if b else 0)) if row["peak"] else None
                    for a, b in PEAKS
                ]
                for row in results["training"]
            ],
        ),
        "generation": measure.table(
            ["tokens per second (ms per token)", "expansion", *(f"after {context:,}" for context in contexts)],
            [
                [case.name, case.expansion]
                + [
                    f"{1 / found[c]['median']:,.0f} ({found[c]['median'] * 1e3:.2f})" if c in found else None
                    for c in contexts
                ]
                for case, found in per_token.items()
            ],
        ),
    }


def goals(results: measure.Result, per_token: dict[Case, dict[int, measure.Result]]) -> list[tuple[str, ...]]:
    rows = []
    steps = {_case(row): row for row in results["training"]}
    for expansion, seconds in ((4, 0.65), (1, 0.45)):
        case = Case("mac", expansion)
        step, tokens = steps[case], [found["median"] for found in per_token[case].values()]
        name = f"mac, expansion {expansion}"
        taken = [step["seconds"]["median"]]
        rows.append(measure.goal(f"{name}: s per step", f"{seconds}", taken, lambda x, y=seconds: x <= y, "{:.3f}"))
        peak = [step["peak"]["peak"] / 1e6] if step["peak"] else []
        rows.append(
            measure.goal(f"{name}: peak MB of a step, whole process", "under 1000", peak, lambda x: x < 1000, "{:.0f}")
        )
        rate = [1 / seconds for seconds in tokens]
        rows.append(measure.goal(f"{name}: tokens generated per s", "400", rate, lambda x: x >= 400, "{:.0f}"))
        *_, last = tokens
        what = f"{name}: time of a token at the latest position over the first"
        rows.append(measure.goal(what, "within 5% of 1", [last / tokens[0]], lambda x: abs(x - 1) <= 0.05, "{:.3f}"))
    return rows


PEAKS = (("peak", ""), ("peak", "inputs"))


def _case(row: measure.Result) -> Case:
    return Case(**{field: row[field] for field in Case._fields if field in row})


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    results["skipped"] = skipped = measure.missing()
    return {
        "shape": sizes._asdict(),
        "training": training(sizes, skipped, arguments.quick),
        "generation": generation(sizes, skipped),
    }


def peak_case(case: list[Any], quick: bool) -> Callable[[], Callable[[], Any]]:
    found = Case(*case)
    if found.kind == "package":
        measure.missing()  # imports it
    return lambda: training_step(found, QUICK if quick else FULL)


if __name__ == "__main__":
    measure.benchmark("model", __doc__, "5 minutes", measured, tables, peak_case=peak_case)

"""Speculative decoding by prompt look-up, and questions about one text with and without a prefix cache.

python benchmarks/generation.py [--quick] [--json FILE]

Times are those of the processor in one thread, which other processes affect little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

import titans_build as tb

RECIPES = ("mac", "mag")
QUICK_MODEL = {"stack.0.repeat": 1, "dim": 32}
TEXTS = ("README.md", "docs/state.md", "docs/recipes.md")


class Sizes(NamedTuple):
    steps: int
    """Training steps. A model of few steps repeats itself in greedy decoding, and does not when it is sampled."""
    prompt: int
    tokens: int
    """New tokens of a generation."""
    seconds: float
    """For the rounds of a recipe."""
    text: int
    """Tokens of the text that is asked about."""
    questions: int
    answer: int


FULL = Sizes(60, 1000, 256, 90.0, 100_000, 20, 32)
QUICK = Sizes(1, 50, 20, 0.0, 500, 2, 4)


def corpus() -> Tensor:
    """The documentation as bytes, ``[time]``."""
    root = Path(__file__).parents[1]
    return torch.tensor(list(b"".join((root / name).read_bytes() for name in TEXTS)))


def trained(name: str, sizes: Sizes, quick: bool) -> Any:
    """A packaged recipe after some steps on the documentation."""
    model, text = tb.build(tb.load_recipe(name, QUICK_MODEL if quick else None), seed=0), corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(sizes.steps):
        starts = torch.randint(len(text) - 257, (2,), generator=generator).tolist()
        rows = torch.stack([text[start : start + 257] for start in starts])
        loss = model(rows[:, :-1], targets=rows[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    measure.say(f"{name}: loss {loss.item():.2f} after {sizes.steps} steps")
    return model.requires_grad_(False)


# -- speculative decoding ----------------------------------------------------------------------------------------------


def drafts(sizes: Sizes, quick: bool) -> Iterator[measure.Result]:
    """Text that repeats (greedy) and text that does not (sampled), with and without look-up."""
    for name in RECIPES:
        model = trained(name, sizes, quick)
        for kind, temperature in (("repeats", 0.0), ("does not repeat", 1.0)):
            yield {"recipe": name, "text": kind, **looked_up(model, sizes, temperature)}


def looked_up(model: Any, sizes: Sizes, temperature: float) -> measure.Result:
    """Seconds of a token after the prompt, and what the draft did."""
    prompt = corpus()[None, : sizes.prompt]

    def generate(draft: str | None) -> Any:
        return model.generate(prompt, sizes.tokens, temperature=temperature, seed=0, draft=draft)

    plain, drafted = generate(None), generate("prompt")
    cases = {
        "reading": lambda: model.generate(prompt, 0),
        "plain": lambda: generate(None),
        "look-up": lambda: generate("prompt"),
    }
    samples = measure.interleave(cases, sizes.seconds / 2, clock=time.process_time)
    rounds = list(zip(*samples.values()))
    return {
        "same_tokens": bool(torch.equal(plain.tokens, drafted.tokens)),
        "drafted": drafted.drafted._asdict(),
        "plain": statistics.median(plain - reading for reading, plain, _ in rounds) / sizes.tokens,
        "look-up": statistics.median(looked - reading for reading, _, looked in rounds) / sizes.tokens,
        "speedup": statistics.median((plain - reading) / (looked - reading) for reading, plain, looked in rounds),
        "rounds": len(rounds),
        "sample": bytes(plain.tokens[0, sizes.prompt :][:60].tolist()).decode(errors="replace"),
    }


# -- questions about one text ------------------------------------------------------------------------------------------


def questions(sizes: Sizes, quick: bool) -> measure.Result:
    """Text and question are one prompt each time."""
    model = tb.build(tb.load_recipe("mac", QUICK_MODEL if quick else None), seed=0).requires_grad_(False)
    text = corpus().repeat(-(-sizes.text // len(corpus())))[None, : sizes.text]
    cache, seconds, read, same = tb.PrefixCache(), [], [], []
    asked = [
        torch.randint(256, (1, 40 + 11 * i), generator=torch.Generator().manual_seed(i)) for i in range(sizes.questions)
    ]
    resident = measure.resident()
    for question in asked:
        prompt, before = torch.cat([text, question], dim=1), cache.statistics.tokens_read
        start = time.process_time()
        found = model.generate(prompt, sizes.answer, prefix_cache=cache)
        seconds.append(time.process_time() - start)
        read.append(cache.statistics.tokens_read - before)
        measure.say(f"question {len(seconds)}: {seconds[-1]:.2f} s, {read[-1]:,} tokens read")
    grown = measure.resident() - resident
    # without a cache each question takes as long as the first: one is measured, in pieces as the cache reads them
    plain = []
    for question in asked[-1:]:
        start, state, logits = time.process_time(), None, None
        with torch.no_grad():
            for piece in torch.cat([text, question], dim=1).split(4096, dim=1):
                out = model(piece, state)
                state, logits = out.state, out.logits[:, -1]
        expected = model.generate(text[:, :0], sizes.answer, state=state, logits=logits)
        plain.append(time.process_time() - start)
        same.append(bool(torch.equal(expected.tokens, found.tokens[:, -sizes.answer :])))
    return {
        "text": sizes.text,
        "answer": sizes.answer,
        "cached": seconds,
        "read": read,
        "plain": plain[0],
        "same_tokens": all(same),
        "resident_growth": grown,
        "statistics": cache.statistics._asdict(),
        "state_bytes": tb.state.nbytes(model.init_state(1)),
    }


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    rows, goals = [], []
    for row in results["drafts"]:
        times = [measure.milliseconds(row[case]) for case in ("plain", "look-up")]
        drafted = row["drafted"]
        rows.append(
            [row["recipe"], row["text"], *times, f"{row['speedup']:.2f}", drafted["proposed"], drafted["accepted"],
             drafted["calls"], row["rounds"]]
        )  # fmt: skip
        repeats = row["text"] == "repeats"
        what = f"{row['recipe']}, text that {row['text']}: times faster with look-up"
        goals.append(measure.goal(what, "at least 1.5" if repeats else "at least 0.95", [row["speedup"]],
                                  lambda x, least=1.5 if repeats else 0.95: x >= least))  # fmt: skip
    of = results["questions"]
    later, count = of["cached"][1:], len(of["cached"])
    cached, plain = sum(of["cached"]), count * of["plain"]
    asked = [
        ("first question", f"{of['plain']:.1f}", f"{of['cached'][0]:.1f}", f"{of['read'][0]:,}"),
        ("each later question", f"{of['plain']:.1f}", f"{statistics.median(later):.2f}",
         f"{statistics.median(of['read'][1:]):,.0f}"),
        (f"all {count} questions", f"{plain:,.0f}", f"{cached:,.1f}", f"{sum(of['read']):,}"),
    ]  # fmt: skip
    statistic = of["statistics"]
    memory = [
        (f"{of['state_bytes'] / 1e6:.1f}", statistic["states"], f"{statistic['nbytes'] / 1e6:,.0f}",
         measure.megabytes(of["resident_growth"]))
    ]  # fmt: skip
    return {
        "goals": measure.table(measure.GOALS, goals),
        "drafts": measure.table(
            [
                "recipe",
                "text",
                "ms per token, plain",
                "with look-up",
                "times faster",
                "proposed",
                "accepted",
                "calls",
                "rounds",
            ],
            rows,
        ),
        "questions": measure.table(["seconds", "without a cache", "with a cache", "tokens read with it"], asked),
        "memory": measure.table(
            ["MB of a state", "states in the cache", "MB in the cache", "process grew by MB"], memory
        ),
        "machine": measure.machine_table(results),
    }


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    sizes = QUICK if arguments.quick else FULL
    return {
        "shape": sizes._asdict(),
        "drafts": list(drafts(sizes, arguments.quick)),
        "questions": questions(sizes, arguments.quick),
    }


if __name__ == "__main__":
    measure.benchmark("generation", __doc__, "10 minutes", measured, tables)

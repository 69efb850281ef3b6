"""The cost of the memory: a step of MAG over a step of the same model with attention alone.

python benchmarks/overhead.py [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import torch

import titans_build as tb

MAG = "mag"
SECONDS = 60.0
"""For the rounds of one kind of step."""


def recipes(quick: bool) -> dict[str, Any]:
    """The packaged MAG, and the same recipe without memories and gates."""
    small = {"dim": 32, "stack.0.repeat": 1} if quick else None
    mag = tb.load_recipe(MAG, small)
    data = mag.to_dict()
    persistent = data["layers"]["mag"][0]
    persistent["of"] = persistent["of"]["branches"][0]
    return {"MAG": mag, "window": tb.load_recipe(data)}


def steps(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """A training step, a forward pass, and a decoding step."""

    def train() -> None:
        model.zero_grad()
        model(tokens, targets=tokens).loss.backward()

    @torch.no_grad()
    def read() -> None:
        model(tokens)

    with torch.no_grad():
        state = model(tokens).state
    one = tokens[:, -1:]

    @torch.no_grad()
    def token() -> None:
        model(one, state)

    return {"training step": train, "reading": read, "one token": token}


def measured(quick: bool) -> list[measure.Result]:
    tokens = torch.randint(256, (1, 64) if quick else (4, 1024), generator=torch.Generator().manual_seed(0))
    built = {name: tb.build(recipe, seed=0) for name, recipe in recipes(quick).items()}
    of = {name: steps(model, tokens) for name, model in built.items()}
    found = []
    for kind in of["MAG"]:
        rows = measure.compare({name: of[name][kind] for name in ("window", "MAG")}, 0 if quick else SECONDS)
        found.append(
            {
                "kind": kind,
                "tokens": tokens.numel() if kind != "one token" else len(tokens),
                "seconds": {name: row["seconds"] for name, row in rows.items()},
                "ratio": rows["MAG"]["ratio"],
                "rounds": rows["MAG"]["rounds"],
            }
        )
    return found


# -- the tables --------------------------------------------------------------------------------------------------------


def tables(results: measure.Result) -> dict[str, str]:
    rows = [
        (
            row["kind"],
            f"{row['tokens']:,}",
            measure.milliseconds(row["seconds"]["MAG"]),
            measure.milliseconds(row["seconds"]["window"]),
            f"{row['ratio']:.2f}",
            row["rounds"],
        )
        for row in results["steps"]
    ]
    head = ("step", "tokens", "MAG, ms", "window alone, ms", "MAG over window", "rounds")
    return {"steps": measure.table(head, rows), "machine": measure.machine_table(results, [])}


if __name__ == "__main__":
    measure.benchmark(
        "overhead", __doc__, "2 minutes", lambda arguments, results: {"steps": measured(arguments.quick)}, tables
    )

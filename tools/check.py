"""``titans-build check``: whether recipes are right, without giving a single weight memory."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from ..recipes.composing import assemble, shortage, state_bytes
from ..recipes.recipe import Recipe
from ..registry import RecipeError, Unavailable
from .options import add_recipe, load
from .terminal import complain, count, in_bytes, say, say_json

SUMMARY = "Validate recipes, all mistakes of each at once, without allocating weights or state."
EXAMPLES = (
    "titans-build check my.yaml",
    "titans-build check recipes/*.yaml",
    "titans-build check mac --set layers.mac.0.memory.depth=4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipes."""
    add_recipe(parser, several=True)


def run(arguments: argparse.Namespace) -> int:
    """Check every recipe and print what came out; 2 when any of them is wrong."""
    results = []
    for source in arguments.recipes:
        result: dict[str, Any] = {"recipe": source, "ok": True, "problems": []}
        try:
            recipe = load(source, arguments)
            result |= _measured(recipe)
            if not arguments.json:
                say(f"{source}: fine ({', '.join(_figures(result))})")
                if result["warning"] is not None:
                    sys.stdout.flush()
                    complain(f"{source}: {result['warning']}", "warning")
        except RecipeError as error:
            result["ok"] = False
            result["problems"] = [{"path": problem.path, "message": problem.message} for problem in error.problems]
            if not arguments.json:
                sys.stdout.flush()
                complain(str(error))
        results.append(result)
    ok = all(result["ok"] for result in results)
    if arguments.json:
        say_json({"ok": ok, "recipes": results})
    return 0 if ok else 2


def _measured(recipe: Recipe) -> dict[str, Any]:
    """How large the model is, and what would keep it from being made here, which is no mistake of the recipe."""
    try:
        # on the meta device: constructors have their say, and shapes exist without values
        model = assemble(recipe)
    except Unavailable as error:
        lacking = "; ".join(map(str, error.problems))
        sizes = dict.fromkeys(("state_bytes_per_row", "state_grows"))
        return {"parameters": None, "depth": recipe.depth, **sizes, "warning": f"cannot be built here: {lacking}"}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "depth": recipe.depth,
        "state_bytes_per_row": state_bytes(model, recipe),
        "state_grows": model.grows,
        "warning": shortage(model, recipe),
    }


def _figures(result: dict[str, Any]) -> Iterator[str]:
    yield "1 layer" if result["depth"] == 1 else f"{result['depth']} layers"
    if result["parameters"] is not None:
        yield f"{count(result['parameters'])} parameters"
    if result["state_bytes_per_row"] is not None:
        grows = ", growing with every token" if result["state_grows"] else ""
        yield f"{in_bytes(result['state_bytes_per_row'])} of state per row{grows}"

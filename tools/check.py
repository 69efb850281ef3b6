"""``titans-build check``: whether recipes are right, without giving a single weight memory."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..recipes.composing import assemble
from ..registry import RecipeError
from .options import add_recipe, load
from .terminal import complain, count, say, say_json

SUMMARY = "Validate recipes, all mistakes of each at once, without allocating weights."
EXAMPLES = (
    "titans-build check my.yaml",
    "titans-build check recipes/*.yaml",
    "titans-build check mac --set layers.mac.0.memory.depth=4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, several=True)


def run(arguments: argparse.Namespace) -> int:
    results = []
    for source in arguments.recipes:
        result: dict[str, Any] = {"recipe": source, "ok": True, "problems": []}
        try:
            recipe = load(source, arguments)
            # on the meta device: constructors have their say, and shapes exist without values
            model = assemble(recipe)
            result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            result["depth"] = recipe.depth
            if not arguments.json:
                say(f"{source}: fine ({recipe.depth} layers, {count(result['parameters'])} parameters)")
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

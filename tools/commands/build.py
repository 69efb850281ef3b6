"""``titans-build RECIPE`` and ``titans-build check``: build, measure, save and test the model of a recipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from ... import recipes
from ...blocks.build import check_device
from ...blocks.language_model import LanguageModel
from ...recipes.build import measure, shortage
from ...recipes.saved_format import INDEX
from ...registry import RecipeError, Unavailable, show
from ..command_line import Command, problem_list
from ..options import add_placement, add_recipe, load, overrides, placement, saved_folder, whole_number, writable_folder
from ..terminal import (
    UsageError,
    complain,
    count,
    in_bytes,
    say,
    say_columns,
    say_json,
    say_prose,
    terminal_width,
    wrap,
)
from .cost_table import cost_table
from .model_summary import LENGTH, ModelSummary, on_meta, summarize
from .smoke_test import BYTES, SmokeTest, check_memory, read_bytes, smoke_test

# -- build -------------------------------------------------------------------------------------------------------------


def _add_build(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, saved="a saved folder (with its weights)")
    add_placement(parser)
    parser.set_defaults(dtype=None)  # a saved model keeps its own
    parser.add_argument(
        "--seed",
        type=whole_number,
        metavar="N",
        help="of new weights (default: 0), also for a saved folder",
    )
    parser.add_argument("--out", metavar="DIR", help="save recipe and weights here (what --try trains is not saved)")
    parser.add_argument("--force", action="store_true", help="let --out replace a model that is saved there")
    parser.add_argument(
        "--try",
        dest="text",
        metavar="TEXTFILE",
        help="train a few steps on the file's bytes, check that streaming equals one pass, time it, and generate",
    )


def _build(arguments: argparse.Namespace) -> int:
    """1 if the smoke test of ``--try`` fails."""
    recipe = load(arguments.recipe, arguments)
    device, dtype = placement(arguments.device, "float32" if arguments.dtype is None else arguments.dtype)
    writable_folder(arguments.out, arguments.force, (INDEX,), "a saved model")
    text = None if arguments.text is None else _text(arguments.text, recipe, device, dtype)
    folder = saved_folder(arguments.recipe) if arguments.seed is None else None
    seed = None if folder is not None else arguments.seed or 0
    model: LanguageModel | None = None
    if folder is not None:
        model = _load(folder, arguments, device)
    elif text is not None or arguments.out is not None:
        model = recipes.build(recipe, device=device, dtype=dtype, seed=seed)
    # costs need no weights, which may not fit into memory
    shapes = on_meta(recipe, model, dtype)
    check_device(shapes, device)
    dtype_name = str(next(shapes.parameters()).dtype).removeprefix("torch.")
    found = summarize(shapes, recipe)
    report: dict[str, Any] = {
        "recipe": {
            "name": recipe.name or arguments.recipe,
            "dim": recipe.dim,
            "vocab": recipe.vocab,
            "depth": recipe.depth,
            "fingerprint": recipe.fingerprint,
            "overrides": recipe.overrides,
        },
        "device": str(device),
        "dtype": dtype_name,
        "seed": seed,
        "weights": None if folder is None else os.path.abspath(folder),
        "parts": [part.to_dict() for part in found.parts],
        "totals": {
            "parameters": found.parameters,
            "flops_per_token": found.flops / LENGTH,
            "flops_length": LENGTH,
            "state_bytes_per_row": found.state_bytes,
            "state_grows": found.grows,
        },
    }
    if arguments.out is not None:
        assert model is not None
        # before anything is printed: the end of a reader (`| head`) ends the command
        recipes.save(model, arguments.out, overwrite=arguments.force)
        report["out"] = os.path.abspath(arguments.out)
    if not arguments.json:
        weights = f"weights of {folder}" if folder is not None else f"seed {seed}"
        say_prose(_heading(recipe, arguments.recipe, f"{device}, {dtype_name}, {weights}"), "")
        say_columns(cost_table(found))
        say_prose("", _footing(found))
        if arguments.out is not None:
            say("", f"saved to {arguments.out}")
    result = None
    if text is not None:
        assert model is not None
        if arguments.json:
            result = smoke_test(model, text)
        else:
            say("")
            result = smoke_test(model, text, _announce)
        report["try"] = {"file": arguments.text, **result.to_dict()}
        if not arguments.json:
            say("", *_result_lines(result, arguments.text))
    if arguments.json:
        say_json(report)
    if result is not None and result.failure:
        complain(result.failure)
        return 1
    return 0


def _text(path: str, recipe: recipes.Recipe, device: torch.device, dtype: torch.dtype) -> bytes:
    """The bytes for ``--try``. Raises ``UsageError`` where the recipe or this machine's memory does not allow it."""
    if recipe.vocab is None or recipe.vocab < BYTES:
        needs = f"the recipe needs vocab >= {BYTES}, it has {show(recipe.vocab)}"
        raise UsageError(f"--try reads bytes: {needs} (--set vocab={BYTES})")
    text = read_bytes(path)
    if device.type == "cpu":
        check_memory(recipe, len(text), dtype)
    return text


def _load(folder: Path, arguments: argparse.Namespace, device: torch.device) -> LanguageModel:
    """The saved model, with the overrides that its weights allow."""
    try:
        return recipes.load(folder, device=device, dtype=arguments.dtype, overrides=overrides(arguments.set))
    except RecipeError as error:
        # the recipe has been loaded, so the weights do not fit
        raise UsageError(f"{error}\n  --seed N initializes new weights for the changed recipe") from None


def _heading(recipe: recipes.Recipe, source: str, where: str) -> Text:
    changed = "".join(f", {path} = {show(value)}" for path, value in recipe.overrides.items())
    vocab = "vectors in, vectors out" if recipe.vocab is None else f"vocab {recipe.vocab:,}"
    layers = "1 layer" if recipe.depth == 1 else f"{recipe.depth} layers"
    return Text.assemble((recipe.name or source, "bold"), f": dim {recipe.dim}, {vocab}, {layers}{changed} ({where})")


def _footing(found: ModelSummary) -> Text:
    grows = " State marked + grows with every token read." if found.grows else " The state does not grow."
    repeated = any(part.count > 1 for part in found.parts)
    many = " A part marked ×N occurs N times in the stack; its row shows one." if repeated else ""
    return Text(f"FLOPs are forward, averaged over {LENGTH:,} tokens.{many}{grows}", style="dim")


def _announce(part: str) -> None:
    say(Text(part, style="dim"))


def _result_lines(result: SmokeTest, name: str) -> list[Text]:
    def line(label: str, text: str, good: bool | None = None) -> list[Text]:
        mark = "" if good is None else "  ok" if good else "  WRONG"
        words = Text.assemble(text, (mark, "green" if good else "bold red"))
        first = Text(f"{label:<12}", style="bold")
        width = terminal_width()
        return [first.append_text(words)] if width is None else wrap(words, width, first, " " * 12)

    exact = "" if result.difference_float64 is None else f"; in float64 {result.difference_float64:.1e}"
    return [
        *line("text", f"the first {result.bytes_read:,} bytes of {name}"),
        *line(
            "learns",
            f"{result.bits_before:.2f} -> {result.bits_after:.2f} bits per byte after {result.steps} steps of AdamW "
            f"on {result.rows} x {result.length} bytes",
            result.learns,
        ),
        *line(
            "streams",
            f"{len(result.cuts)} pieces of {min(result.cuts)} to {max(result.cuts)} bytes against one pass: "
            f"largest difference {result.difference:.1e} of logits up to {result.scale:.1f}{exact}",
            result.streams,
        ),
        *line("speed", f"{result.prefill:,.0f} tokens/s reading, {result.decode:,.0f} tokens/s generating (one row)"),
        *line("says", show(result.generated, 200)),
    ]


BUILD = Command(
    "Build the model of a recipe: check it, show the cost of each part, save it, and try it.",
    (
        "titans-build mac                                  its parts and their cost",
        "titans-build mac --try README.md                  a test on the bytes of a text",
        "titans-build mac --set layers.mac.0.segment=256   with one value changed",
        "titans-build my.yaml --seed 7 --out models/mine   save recipe and weights",
        "titans-build mag-170m --dtype bfloat16 --json     for machines",
    ),
    _add_build,
    _build,
)

# -- check -------------------------------------------------------------------------------------------------------------


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, several=True)


def _check(arguments: argparse.Namespace) -> int:
    """2 if any of the recipes is invalid."""
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
            result["problems"] = problem_list(error)
            if not arguments.json:
                sys.stdout.flush()
                complain(str(error))
        results.append(result)
    ok = all(result["ok"] for result in results)
    if arguments.json:
        say_json({"ok": ok, "recipes": results})
    return 0 if ok else 2


def _measured(recipe: recipes.Recipe) -> dict[str, Any]:
    """The size of the model and, as a warning, why this machine cannot build it."""
    try:
        size = measure(recipe)
    except Unavailable as error:
        missing = "; ".join(map(str, error.problems))
        sizes = dict.fromkeys(("state_bytes_per_row", "state_grows"))
        return {"parameters": None, "depth": recipe.depth, **sizes, "warning": f"cannot be built here: {missing}"}
    return {
        "parameters": size.parameters,
        "depth": recipe.depth,
        "state_bytes_per_row": size.state_bytes,
        "state_grows": size.grows,
        "warning": shortage(size),
    }


def _figures(result: dict[str, Any]) -> Iterator[str]:
    yield "1 layer" if result["depth"] == 1 else f"{result['depth']} layers"
    if result["parameters"] is not None:
        yield f"{count(result['parameters'])} parameters"
    if result["state_bytes_per_row"] is not None:
        grows = ", growing with every token" if result["state_grows"] else ""
        yield f"{in_bytes(result['state_bytes_per_row'])} of state per row{grows}"


CHECK = Command(
    "Validate recipes and report all errors, without allocating weights or state.",
    (
        "titans-build check my.yaml",
        "titans-build check recipes/*.yaml",
        "titans-build check mac --set layers.mac.0.memory.depth=4",
    ),
    _add_recipes,
    _check,
)

"""``titans-build RECIPE``: validates a recipe, makes the model, prints what it is made of, saves it, tries it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from .. import recipes
from ..blocks.language_model import LanguageModel
from ..recipes.index import INDEX
from ..registry import RecipeError, show
from .cost_table import cost_table
from .options import add_placement, add_recipe, load, overrides, placement, saved_folder, whole_number
from .survey import LENGTH, Survey, survey, with_shapes
from .terminal import PIPED_WIDTH, UsageError, complain, edge, flow, progress, say, say_json, say_prose
from .trial import BYTES, Trial, read_bytes, try_out
from .trial_memory import large_need

SUMMARY = "Build the model that a recipe describes: check it, make it, show what each part costs, save it, try it."
EXAMPLES = (
    "titans-build mac                                  what it is made of",
    "titans-build mac --try README.md                  and does it work, on bytes of text",
    "titans-build mac --set layers.mac.0.segment=256   with one value changed",
    "titans-build my.yaml --seed 7 --out models/mine   save recipe and weights",
    "titans-build mag-170m --dtype bfloat16 --json     for machines",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, where and how it is made, and what is done with it."""
    add_recipe(parser, saved="a saved folder (with its weights)")
    add_placement(parser)
    parser.set_defaults(dtype=None)  # so that a saved model keeps its own
    parser.add_argument(
        "--seed",
        type=whole_number,
        metavar="N",
        help="of fresh weights (default: 0), which a saved folder then gets, too",
    )
    parser.add_argument("--out", metavar="DIR", help="save recipe and weights here (what --try trains is not saved)")
    parser.add_argument("--force", action="store_true", help="let --out replace a model that is saved there")
    parser.add_argument(
        "--try",
        dest="text",
        metavar="TEXTFILE",
        help="train a few steps on the file's bytes, check that streaming equals one pass, time it, and generate",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build, print, save and try as ``arguments`` say; 1 when the trial finds a fault."""
    recipe = load(arguments.recipe, arguments)
    device, dtype = placement(arguments.device, "float32" if arguments.dtype is None else arguments.dtype)
    if arguments.out is not None:
        if not arguments.out:
            raise UsageError("--out: expected the name of a folder, got none")
        _check_writable(Path(arguments.out), arguments.force)
    elif arguments.force:
        raise UsageError("--force: lets --out DIR replace a saved model, and there is no --out")
    text = None
    if arguments.text is not None:
        if recipe.vocab is None or recipe.vocab < BYTES:
            needs = f"the recipe needs vocab >= {BYTES}, it has {show(recipe.vocab)}"
            raise UsageError(f"--try reads bytes: {needs} (--set vocab={BYTES})")
        text = read_bytes(arguments.text)
        need = large_need(recipe, len(text), dtype) if device.type == "cpu" else None
        if need is not None:
            if not need.enough:
                raise UsageError(f"--try {arguments.text}: {need.text}")
            complain(need.text, "warning")
    folder = saved_folder(arguments.recipe) if arguments.seed is None else None
    if folder is None:
        seed = arguments.seed or 0
        model = recipes.build(recipe, device=device, dtype=dtype, seed=seed)
        weights = f"seed {seed}"
    else:
        seed = None
        model = _load(folder, arguments, device)
        weights = f"weights of {folder}"
    dtype = next(model.parameters()).dtype
    found = survey(with_shapes(recipe, model), recipe)
    dtype_name = str(dtype).removeprefix("torch.")
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
        # before a word is printed: a reader that leaves (`| head`) ends the command
        recipes.save(model, arguments.out)
        report["out"] = os.path.abspath(arguments.out)
    if not arguments.json:
        say_prose(_heading(recipe, arguments.recipe, f"{device}, {dtype_name}, {weights}"), "")
        say(*cost_table(found, edge() or PIPED_WIDTH))
        say_prose("", _footing(found))
        if arguments.out is not None:
            say("", f"saved to {arguments.out}")
    trial = None
    if text is not None:
        with progress(f"trying on {arguments.text}", Trial.STAGES) as advance:
            trial = try_out(model, text, advance)
        report["try"] = {"file": arguments.text, **trial.to_dict()}
        if not arguments.json:
            say("", *_lines(trial, arguments.text))
    if arguments.json:
        say_json(report)
    if trial is not None and trial.fault:
        complain(trial.fault)
        return 1
    return 0


def _load(folder: Path, arguments: argparse.Namespace, device: torch.device) -> LanguageModel:
    """The saved model, changed as far as its weights allow."""
    try:
        return recipes.load(folder, device=device, dtype=arguments.dtype, overrides=overrides(arguments.set))
    except RecipeError as error:
        # the changed recipe itself has been read before: it is the weights that do not fit
        raise UsageError(f"{error}\n  --seed N draws fresh weights for the changed recipe") from None


def _heading(recipe: recipes.Recipe, source: str, where: str) -> Text:
    changed = "".join(f", {path} = {show(value)}" for path, value in recipe.overrides.items())
    vocab = "vectors in, vectors out" if recipe.vocab is None else f"vocab {recipe.vocab:,}"
    layers = "1 layer" if recipe.depth == 1 else f"{recipe.depth} layers"
    return Text.assemble((recipe.name or source, "bold"), f": dim {recipe.dim}, {vocab}, {layers}{changed} ({where})")


def _footing(found: Survey) -> Text:
    grows = " State marked + grows with every token read." if found.grows else " The state does not grow."
    many = " A part marked ×N stands N times in the stack; its row shows one." if found.depth > len(found.parts) else ""
    return Text(f"FLOPs are forward, averaged over {LENGTH:,} tokens.{many}{grows}", style="dim")


def _lines(trial: Trial, name: str) -> list[Text]:
    def line(label: str, text: str, good: bool | None = None) -> list[Text]:
        mark = "" if good is None else "  ok" if good else "  WRONG"
        said = Text.assemble(text, (mark, "green" if good else "bold red"))
        first = Text(f"{label:<12}", style="bold")
        width = edge()
        return [first.append_text(said)] if width is None else flow(said, width, first, " " * 12)

    exact = "" if trial.difference_float64 is None else f"; in float64 {trial.difference_float64:.1e}"
    return [
        *line("text", f"the first {trial.bytes_read:,} bytes of {name}"),
        *line(
            "learns",
            f"{trial.bits_before:.2f} -> {trial.bits_after:.2f} bits per byte after {trial.steps} steps of AdamW "
            f"on {trial.rows} x {trial.length} bytes",
            trial.learns,
        ),
        *line(
            "streams",
            f"{len(trial.cuts)} pieces of {min(trial.cuts)} to {max(trial.cuts)} bytes against one pass: "
            f"largest difference {trial.difference:.1e} of logits up to {trial.scale:.1f}{exact}",
            trial.streams,
        ),
        *line("speed", f"{trial.prefill:,.0f} tokens/s reading, {trial.decode:,.0f} tokens/s generating (one row)"),
        *line("says", show(trial.generated, 200)),
    ]


def _check_writable(folder: Path, replace: bool) -> None:
    """Raise ``UsageError`` before the work when the result could not, or should not, be saved after it."""
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
        taken = (folder / INDEX).exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {folder}: {getattr(error, 'strerror', None) or error}") from None
    if not place.is_dir():
        raise UsageError(f"--out {folder}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: {place} cannot be written to")
    if taken and not replace:
        raise UsageError(f"--out {folder}: a model is saved there; --force replaces it, recipe and weights")

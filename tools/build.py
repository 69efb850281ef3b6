"""``titans-build RECIPE``: validates a recipe, makes the model, prints what it is made of, saves it, tries it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .. import recipes
from ..registry import show
from .options import add_placement, add_recipe, load, placement
from .survey import LENGTH, Part, Survey, survey
from .terminal import UsageError, columns, complain, count, in_bytes, progress, say, say_json
from .trial import BYTES, Trial, read_bytes, try_out

SUMMARY = "Build the model that a recipe describes: check it, make it, show what each part costs, save it, try it."
EXAMPLES = (
    "titans-build mac                                  what it is made of",
    "titans-build mac --try README.md                  and does it work, on bytes of text",
    "titans-build mac --set layers.mac.0.segment=256   with one value changed",
    "titans-build my.yaml --seed 7 --out models/mine   save recipe and weights",
    "titans-build mag-170m --dtype bfloat16 --json     for machines",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_placement(parser)
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the fresh weights (default: 0)")
    parser.add_argument(
        "--out", metavar="DIR", help="save recipe and fresh weights here (what --try trains is not saved)"
    )
    parser.add_argument(
        "--try",
        dest="text",
        metavar="TEXTFILE",
        help="train a few steps on the file's bytes, check that streaming equals one pass, time it, and generate",
    )


def run(arguments: argparse.Namespace) -> int:
    recipe = load(arguments.recipe, arguments)
    device, dtype = placement(arguments)
    if arguments.out is not None:
        _check_writable(Path(arguments.out))
    text = None
    if arguments.text is not None:
        if recipe.vocab is None or recipe.vocab < BYTES:
            needs = f"the recipe needs vocab >= {BYTES}, it has {show(recipe.vocab)}"
            raise UsageError(f"--try reads bytes: {needs} (--set vocab={BYTES})")
        text = read_bytes(arguments.text)
    model = recipes.build(recipe, device=device, dtype=dtype, seed=arguments.seed)
    found = survey(model, recipe)
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
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "parts": [part.to_dict() for part in found.parts],
        "totals": {
            "parameters": found.parameters,
            "flops_per_token": found.flops / LENGTH,
            "flops_length": LENGTH,
            "state_bytes_per_row": found.state_bytes,
            "state_grows": found.grows,
        },
    }
    if not arguments.json:
        say(_heading(recipe, arguments), "", _table(found), "", _footing(found))
    if arguments.out is not None:
        recipes.save(model, arguments.out)
        report["out"] = os.path.abspath(arguments.out)
        if not arguments.json:
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


def _heading(recipe: recipes.Recipe, arguments: argparse.Namespace) -> Text:
    changed = "".join(f", {path} = {show(value)}" for path, value in recipe.overrides.items())
    vocab = "vectors in, vectors out" if recipe.vocab is None else f"vocab {recipe.vocab:,}"
    where = f"{arguments.device}, {arguments.dtype}, seed {arguments.seed}"
    return Text.assemble(
        (recipe.name or arguments.recipe, "bold"),
        f": dim {recipe.dim}, {vocab}, {recipe.depth} layers{changed} ({where})",
    )


def _table(found: Survey) -> Table:
    rows = [row for part in found.parts for row in _rows(part, "", "")]
    total = _figures(found.parameters, found.flops, found.state_bytes, found.grows)
    rows.append([Text(cell, style="bold") for cell in ("total", "", *total)])
    headings = ("part", "settings", "parameters", "FLOPs/token", "state/row")
    table = columns(*headings, right=headings[2:])
    # a tree is only readable with one line for each part: what does not fit is cut from the settings
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    return table


def _rows(part: Part, lead: str, indent: str) -> Iterator[list[Text]]:
    """The row of a part and those of the parts inside, with the tree's branches before their names."""
    times = f" ×{part.count}" if part.count > 1 else ""
    name = (
        part.label
        if part.type in ("", "layer")
        else part.type
        if part.label.startswith("blocks.")
        else f"{part.label}: {part.type}"
    )
    figures = _figures(part.parameters, part.flops, part.state_bytes, part.grows)
    yield [
        Text.assemble((lead, "dim"), (name, "" if lead else "bold"), (times, "bold magenta")),
        Text(settings(part), style="dim", no_wrap=True, overflow="ellipsis"),
        *map(Text, figures),
    ]
    for index, child in enumerate(part.parts):
        last = index == len(part.parts) - 1
        yield from _rows(child, indent + ("└ " if last else "├ "), indent + ("  " if last else "│ "))


def settings(part: Part, most: int = 6) -> str:
    """The settings of a block that tell it from others, in a few words."""
    shown = [
        f"{key} {value}" for key, value in part.fields.items() if not isinstance(value, bool) and value is not None
    ]
    return ", ".join(shown[:most])


def _figures(parameters: int, flops: int, state: int, grows: bool) -> tuple[str, str, str]:
    size = f"{in_bytes(state)}{' +' if grows else ''}" if state or grows else "-"
    return count(parameters), count(flops / LENGTH), size


def _footing(found: Survey) -> Text:
    grows = " State marked + grows with every token read." if found.grows else " The state does not grow."
    many = " A part marked ×N stands N times in the stack; its row shows one." if found.depth > len(found.parts) else ""
    return Text(f"FLOPs are forward, averaged over {LENGTH:,} tokens.{many}{grows}", style="dim")


def _lines(trial: Trial, name: str) -> list[Text]:
    def line(label: str, text: str, good: bool | None = None) -> Text:
        mark = "" if good is None else "  ok" if good else "  WRONG"
        return Text.assemble((f"{label:<12}", "bold"), text, (mark, "green" if good else "bold red"))

    exact = "" if trial.difference_float64 is None else f"; in float64 {trial.difference_float64:.1e}"
    return [
        line("text", f"the first {trial.bytes_read:,} bytes of {name}"),
        line(
            "learns",
            f"{trial.bits_before:.2f} -> {trial.bits_after:.2f} bits per byte after {trial.steps} steps of AdamW "
            f"on {trial.rows} x {trial.length} bytes",
            trial.learns,
        ),
        line(
            "streams",
            f"{len(trial.cuts)} pieces of {min(trial.cuts)} to {max(trial.cuts)} bytes against one pass: "
            f"largest difference {trial.difference:.1e} of logits up to {trial.scale:.1f}{exact}",
            trial.streams,
        ),
        line("speed", f"{trial.prefill:,.0f} tokens/s reading, {trial.decode:,.0f} tokens/s generating (one row)"),
        line("says", show(trial.generated, 200)),
    ]


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1, got {show(text)}")
    return seed


def _check_writable(folder: Path) -> None:
    """Raise ``UsageError`` before the work when the result could not be saved after it."""
    try:
        place = folder.absolute()
        while not place.exists():
            place = place.parent
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {folder}: {error}") from None
    if not place.is_dir():
        raise UsageError(f"--out {folder}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--out {folder}: {place} cannot be written to")

"""``titans-build diagram``: a picture of what a recipe stacks, as SVG."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path

from .. import recipes
from ..recipes.composing import assemble
from ..recipes.replacing import replacing
from ..registry import RecipeError, list_blocks, lookup
from .drawing.picture import draw_stack
from .drawing.shapes import box
from .options import add_recipe, load
from .survey import Part, survey_layer, with_shapes
from .terminal import UsageError, count, in_bytes, say, say_json

SUMMARY = "Draw the stack of a recipe: blocks, branches, repeats, the flow of data and the state, as SVG."
EXAMPLES = ("titans-build diagram mac --out mac.svg", "titans-build diagram my.yaml > my.svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and the file."""
    add_recipe(parser)
    parser.add_argument("--out", metavar="FILE.svg", help="write here instead of to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Draw the recipe to the file or to standard output."""
    recipe = load(arguments.recipe, arguments)
    if arguments.out is not None and not arguments.out.endswith(".svg"):
        raise UsageError(f"--out {arguments.out}: the picture is SVG; expected a name that ends in .svg")
    # a file's name may hold what no XML may
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in arguments.recipe)
    picture = draw(recipe, recipe.name or name)
    if arguments.out is not None:
        try:
            with replacing(Path(arguments.out)) as temporary:
                temporary.write_text(picture, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--out {arguments.out}: {getattr(error, 'strerror', None) or error}") from None
    if arguments.json:
        say_json(
            {
                "recipe": recipe.name or arguments.recipe,
                **({"out": arguments.out} if arguments.out else {"svg": picture}),
            }
        )
    elif arguments.out is None:
        # where the output has no letters for it, XML has its own way of writing it
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(picture.encode(encoding, "xmlcharrefreplace").decode(encoding))
    else:
        say(f"wrote {arguments.out}")
    return 0


def draw(recipe: recipes.Recipe, name: str) -> str:
    """The recipe's picture as SVG text."""
    layers = survey_layers(recipe)
    parameters = sum(parameter.numel() for parameter in assemble(recipe).parameters())
    counts = Counter(recipe.expand())
    state = sum(layers[layer].state_bytes * times for layer, times in counts.items())
    grows = any(part.grows for part in layers.values())
    lasting = "when fresh; grows with every token" if grows else "however long the sequence"
    notes = [
        f"{count(parameters)} parameters  ·  {recipe.depth} layers  ·  dim {recipe.dim}",
        f"state of a row: {in_bytes(state)}, {lasting}",
    ]
    if recipe.vocab is None:
        above, below = [box("vectors", colour="ends", small=True)], [box("norm", colour="norm", small=True)]
        below.append(box("vectors", colour="ends", small=True))
    else:
        head = "head, tied to the embedding" if recipe.tie else "head"
        above = [box("tokens", colour="ends", small=True), box("embedding", [f"vocab {recipe.vocab:,}"], least=120)]
        below = [box("norm", colour="norm", small=True), box(head, least=120), box("logits", colour="ends", small=True)]
    return draw_stack(recipe.stack, layers, _memories(), name, notes, above, below)


def survey_layers(recipe: recipes.Recipe) -> dict[str, Part]:
    """What each named layer is made of. Only one of each is built, and neither embedding nor head."""
    names = list(dict.fromkeys(recipe.expand()))
    model = with_shapes(dataclasses.replace(recipe, stack=names, vocab=None, tie=False))
    return {name: survey_layer(layer, name, recipe) for name, layer in zip(names, model.layers)}


def _memories() -> frozenset[str]:
    """Blocks that can be read and written."""
    found = set()
    for name in list_blocks():
        try:
            cls = lookup(name).cls
        except RecipeError:
            continue  # an installed block that cannot be imported is in no recipe that was accepted
        if all(callable(getattr(cls, method, None)) for method in ("read", "write")):
            found.add(name)
    return frozenset(found)

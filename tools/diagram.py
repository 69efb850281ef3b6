"""``titans-build diagram``: a picture of what a recipe stacks, as SVG."""

from __future__ import annotations

import argparse
import dataclasses
import string
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import recipes
from ..recipes.atomic_write import atomic_write
from ..recipes.build import assemble
from ..registry import RecipeError, lookup
from .commands.model_summary import Part, on_meta, summarize_layer
from .options import add_recipe, load
from .svg import (
    FAINT,
    Shape,
    box,
    branches,
    column,
    container,
    document,
    repeated,
    residual,
    text_width,
    with_state,
)
from .terminal import UsageError, count, in_bytes, say, say_json

SUMMARY = "Draw the stack of a recipe: blocks, branches, repeats, the flow of data and the state, as SVG."
EXAMPLES = ("titans-build diagram mac --out mac.svg", "titans-build diagram my.yaml > my.svg")

SETTINGS = ("heads", "kv_heads", "window", "depth", "expansion", "chunk", "retrieve", "reset", "query", "kind",
            "hidden")  # fmt: skip
"""Fields of a block that are shown."""
LEGEND = {
    "memory": "memory",
    "attention": "attention",
    "mixer": "other, with state",
    "plain": "without state",
    "gate": "gate",
    "state": "state of one row",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and the file."""
    add_recipe(parser)
    parser.add_argument("--out", metavar="FILE.svg", help="write here instead of to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Draw the recipe to the file or to standard output."""
    recipe = load(arguments.recipe, arguments)
    if arguments.out is not None and not arguments.out.endswith(".svg"):
        raise UsageError(f"--out {arguments.out}: the picture is SVG; expected a name that ends in .svg")
    # a file name may hold characters that XML does not allow
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in arguments.recipe)
    picture = draw(recipe, recipe.name or name)
    if arguments.out is not None:
        try:
            with atomic_write(Path(arguments.out)) as temporary:
                temporary.write_text(picture, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--out {arguments.out}: {getattr(error, 'strerror', None) or error}") from None
    if arguments.json:
        result = {"out": arguments.out} if arguments.out else {"svg": picture}
        say_json({"recipe": recipe.name or arguments.recipe, **result})
    elif arguments.out is None:
        # characters outside of the output's encoding become XML references
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(picture.encode(encoding, "xmlcharrefreplace").decode(encoding))
    else:
        say(f"wrote {arguments.out}")
    return 0


def draw(recipe: recipes.Recipe, title: str) -> str:
    """The recipe's picture as SVG text."""
    layers = _summarize_layers(recipe)
    parameters = sum(parameter.numel() for parameter in assemble(recipe).parameters())
    state = sum(layers[layer].state_bytes * times for layer, times in Counter(recipe.expand()).items())
    grows = any(part.grows for part in layers.values())
    growth = "when fresh; grows with every token" if grows else "however long the sequence"
    notes = [
        f"{count(parameters)} parameters  ·  {recipe.depth} layers  ·  dim {recipe.dim}",
        f"state of a row: {in_bytes(state)}, {growth}",
    ]
    stack, norm = _stack(recipe.stack, layers, set()), box("norm", color="norm", small=True)
    vectors, tokens, logits = (box(name, color="ends", small=True) for name in ("vectors", "tokens", "logits"))
    if recipe.vocab is None:
        body = column([vectors, stack, norm, vectors])
    else:
        embedding = box("embedding", [f"vocab {recipe.vocab:,}"], least=120)
        head = box("head, tied to the embedding" if recipe.tie else "head", least=120)
        body = column([tokens, embedding, stack, norm, head, logits])

    legend = [box(text, color=color, small=True) for color, text in LEGEND.items()]
    heading = max(text_width(title, 20, True), *(text_width(note, 12) for note in notes))
    width = max(body.left + body.right, heading, sum(2 * entry.right + 10 for entry in legend))
    margin, top = 28, 64 + 18 * len(notes)
    picture = Shape(0, width + 2 * margin, top + body.height + 64)
    picture.text(margin, 34, title, size=20, bold=True, text_anchor="start")
    for index, note in enumerate(notes):
        picture.text(margin, 60 + 18 * index, note, size=12, fill=FAINT, text_anchor="start")
    picture.place(body, margin + (width - body.left - body.right) / 2 + body.left, top)
    x = float(margin)
    for entry in legend:
        picture.place(entry, x + entry.left, picture.height - 40)
        x += entry.left + entry.right + 10
    return document(picture, title)


def _summarize_layers(recipe: recipes.Recipe) -> dict[str, Part]:
    """The parts of each named layer. One layer of each name is built, without embedding and head."""
    names = list(dict.fromkeys(recipe.expand()))
    model = on_meta(dataclasses.replace(recipe, stack=names, vocab=None, tie=False))
    return {name: summarize_layer(layer, name, recipe) for name, layer in zip(names, model.layers)}


def _stack(stack: Sequence[Any], layers: dict[str, Part], drawn: set[str]) -> Shape:
    """``stack`` is as in the recipe; a layer that is in ``drawn`` is not drawn again."""
    shapes = []
    for item, same in groupby(stack):
        times = len(list(same))
        if not isinstance(item, str):
            shape = _stack(item["of"], layers, drawn)
            times *= item["repeat"]
        elif item in drawn:
            shape = box(item, ["as above"], "norm", least=160)
        else:
            drawn.add(item)
            shape = _layer(layers[item])
        shapes.append(repeated(shape, times))
    return column(shapes)


def _layer(part: Part) -> Shape:
    """A named layer: its blocks, each pre-normed and residual."""
    norm = box("norm", color="norm", small=True)
    body = column([residual(column([norm, _block(block)], 16)) for block in part.parts], 0)
    return container(body, part.label, f"{count(part.parameters)} parameters", fill="#f8fafc")


def _block(part: Part) -> Shape:
    """A block with everything inside it."""
    if not part.parts:
        shape = box(part.type, _settings(part), _color(part), least=120)
        if not part.state_bytes and not part.grows:
            return shape
        return with_state(
            [shape], ["grows", "with every token"] if part.grows else [_size(part), "constant"], {0: True}
        )
    if part.type == "context":
        return _context(part)
    inner = [_block(child) for child in part.parts]
    if part.type == "chain":
        return column(inner)
    if part.type == "residual":
        return container(residual(inner[0]), "residual")
    if part.type == "persistent":
        note = f"{part.fields.get('tokens')} learned tokens, read before the first"
        return container(inner[0], "persistent", note, dashed=True)
    if part.type == "gate":
        join = box("gate", [_formula(part, *string.ascii_lowercase[: len(inner)])], "gate", least=120)
        count = "two" if len(inner) == 2 else str(len(inner))
        return container(branches(inner, join), "gate", f"{count} branches")
    # a user's combinator: the order of its blocks is not known here, so no arrows are drawn
    labeled = [container(shape, child.label, flow=False) for shape, child in zip(inner, part.parts)]
    return container(column(labeled, 10, flow=False), part.type, ", ".join(_settings(part)), flow=False)


def _context(part: Part) -> Shape:
    inside = {child.label: child for child in part.parts}
    memory, persistent = inside["memory"], part.fields.get("persistent")
    written, output = ("x", "M(x)") if part.fields.get("write") == "inputs" else ("y", "M(y)")
    read = box("1  read", ["h = M(x), the memory as it", "stood at the segment's start"], "memory")
    order = f"causal, over {persistent} learned tokens, h and x" if persistent else "causal, over h and x"
    attend = container(_block(inside["attend"]), "2  attend", order)
    write = box("3  write", [f"{written} into the memory,", f"then read back {output}"], "memory")
    kept = [memory.type, *_settings(memory), f"{count(memory.parameters)} parameters", f"state {_size(memory)}"]
    if "snapshot" in part.state:
        kept.append(f"snapshot {in_bytes(part.state['snapshot'])}")
    gate = box("4  gate", [_formula(part, "y", output)], "gate", least=150)
    upper = with_state(
        [read, attend, write], kept, {0: False, 2: True}, ["h and x", "y" if written == "y" else "x and y"]
    )
    body = column([upper, gate], labels=[f"y and {output}"])
    return container(body, "context", f"segments of {part.fields.get('segment')} tokens")


def _color(part: Part) -> str:
    try:
        cls = lookup(part.type).cls
    except RecipeError:
        cls = None  # not registered: a layer, or a class of a user's combinator
    if all(callable(getattr(cls, method, None)) for method in ("read", "write")):
        return "memory"
    if part.type == "attention":
        return "attention"
    if part.type.endswith("norm"):
        return "norm"
    return "mixer" if part.state_bytes or part.grows else "plain"


def _settings(part: Part) -> list[str]:
    """The most important settings, two to a line."""
    given = [(key, part.fields.get(key)) for key in SETTINGS]
    # a memory's window of one token is none, and reading after a token is written is usual
    usual = (("window", 1), ("retrieve", "after"))
    shown = [(key, value) for key, value in given if value is not None and (key, value) not in usual]
    settings = [f"{key.replace('_', ' ')} {value}" for key, value in shown]
    return [" · ".join(settings[index : index + 2]) for index in range(0, len(settings), 2)]


def _size(part: Part) -> str:
    return in_bytes(part.state_bytes) + (" +" if part.grows else "")


def _formula(part: Part, a: str, *others: str) -> str:
    form = {"silu": "silu(norm({}))", "sum": "norm({})"}.get(str(part.fields.get("form")), "σ(norm({}))")
    between = " + " if part.fields.get("form") == "sum" else " · "
    return between.join([f"norm({a})", *(form.format(b) for b in others)])

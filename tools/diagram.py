"""``titans-build diagram``: a picture of what a recipe stacks, as SVG."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import recipes
from ..recipes.atomic_write import atomic_write
from ..recipes.build import assemble
from ..registry import RecipeError, lookup
from .commands.model_summary import Part, on_meta, summarize_layer
from .options import add_recipe, load
from .svg import (
    COLOURS,
    FAINT,
    FLOW,
    INK,
    Canvas,
    Shape,
    box,
    column,
    container,
    pre_normed,
    repeated,
    residual,
    squares,
    store,
    text_width,
    with_state,
)
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
        say_json(
            {
                "recipe": recipe.name or arguments.recipe,
                **({"out": arguments.out} if arguments.out else {"svg": picture}),
            }
        )
    elif arguments.out is None:
        # characters outside of the output's encoding become XML references
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(picture.encode(encoding, "xmlcharrefreplace").decode(encoding))
    else:
        say(f"wrote {arguments.out}")
    return 0


def draw(recipe: recipes.Recipe, name: str) -> str:
    """The recipe's picture as SVG text."""
    layers = summarize_layers(recipe)
    parameters = sum(parameter.numel() for parameter in assemble(recipe).parameters())
    counts = Counter(recipe.expand())
    state = sum(layers[layer].state_bytes * times for layer, times in counts.items())
    grows = any(part.grows for part in layers.values())
    growth = "when fresh; grows with every token" if grows else "however long the sequence"
    notes = [
        f"{count(parameters)} parameters  ·  {recipe.depth} layers  ·  dim {recipe.dim}",
        f"state of a row: {in_bytes(state)}, {growth}",
    ]
    if recipe.vocab is None:
        above, below = [box("vectors", colour="ends", small=True)], [box("norm", colour="norm", small=True)]
        below.append(box("vectors", colour="ends", small=True))
    else:
        head = "head, tied to the embedding" if recipe.tie else "head"
        above = [box("tokens", colour="ends", small=True), box("embedding", [f"vocab {recipe.vocab:,}"], least=120)]
        below = [box("norm", colour="norm", small=True), box(head, least=120), box("logits", colour="ends", small=True)]
    return draw_stack(recipe.stack, layers, name, notes, above, below)


def summarize_layers(recipe: recipes.Recipe) -> dict[str, Part]:
    """The parts of each named layer. One layer of each name is built, without embedding and head."""
    names = list(dict.fromkeys(recipe.expand()))
    model = on_meta(dataclasses.replace(recipe, stack=names, vocab=None, tie=False))
    return {name: summarize_layer(layer, name, recipe) for name, layer in zip(names, model.layers)}


def _block(part: Part) -> Shape:
    """The shape of a block with everything inside it."""
    drawn = _COMBINATORS.get(part.type)
    if drawn is not None and part.parts:
        return drawn(part)
    if part.parts:
        return _unknown_combinator(part)
    shape = box(part.type, _lines(part), _colour(part), least=120)
    return with_state(shape, store(_state_lines(part))) if part.state_bytes or part.grows else shape


def _layer(part: Part) -> Shape:
    """A named layer: its blocks, each pre-normed and residual."""
    body = column([residual(pre_normed(_block(block))) for block in part.parts], 0)
    return container(body, part.label, f"{count(part.parameters)} parameters", fill="#f8fafc")


def _chain(part: Part) -> Shape:
    return column([_block(child) for child in part.parts])


def _residual(part: Part) -> Shape:
    return container(residual(_block(part.parts[0])), "residual")


def _unknown_combinator(part: Part) -> Shape:
    # the order of the inner blocks is not known here, so no arrows are drawn
    inner = [container(_block(child), child.label, through=False) for child in part.parts]

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for shape in inner:
            shape.draw(canvas, x, y)
            y += shape.height + 10

    height = sum(shape.height for shape in inner) + 10 * (len(inner) - 1)
    body = Shape(max(s.left for s in inner), max(s.right for s in inner), height, draw)
    return container(body, part.type, ", ".join(_lines(part)), through=False)


def _persistent(part: Part) -> Shape:
    inner = _block(part.parts[0])
    tokens = part.fields.get("tokens")
    letters = ["P", "P", "P", "…"]
    strip, ahead = 20 * len(letters) + 4, 36

    def draw(canvas: Canvas, x: float, y: float) -> None:
        canvas.line([(x, y), (x, y + ahead)], stroke=FLOW, arrow=not inner.open)
        left = x - 26 - strip
        squares(canvas, left, y + 10, letters)
        canvas.line([(left + strip, y + 10), (x - 2, y + 10)], stroke=FLOW, arrow=True)
        canvas.text(x + 10, y + 10, "P was read before the first token", size=11, colour=FAINT, anchor="start")
        inner.draw(canvas, x, y + ahead)

    right = 14 + text_width("P was read before the first token", 11)
    body = Shape(max(inner.left, 30 + strip), max(inner.right, right), inner.height + ahead, draw, open=True)
    return container(body, "persistent", f"{tokens} learned tokens", dashed=True)


def _gate(part: Part) -> Shape:
    a, b = (_block(branch) for branch in part.parts)
    join = box("gate", [_formula(part, "a", "b")], "gate", least=120)
    ahead, after = 30, 34
    # both branches are as close to the axis as they fit
    to_a, to_b = a.right + 14, b.left + 14
    height = ahead + max(a.height, b.height) + after + join.height

    def draw(canvas: Canvas, x: float, y: float) -> None:
        below = y + ahead + max(a.height, b.height)
        canvas.line([(x, y), (x, y + 10)], stroke=FLOW)
        for name, branch, at in (("a", a, x - to_a), ("b", b, x + to_b)):
            canvas.line([(x, y + 8), (at, y + 8), (at, y + ahead)], stroke=FLOW, arrow=not branch.open)
            branch.draw(canvas, at, y + ahead)
            inlet = x + (-1 if name == "a" else 1) * min(abs(at - x), join.left - 16)
            canvas.line(
                [(at, y + ahead + branch.height), (at, below + 12), (inlet, below + 12), (inlet, below + after)],
                stroke=FLOW,
                arrow=True,
            )
            canvas.text(inlet + (-11 if name == "a" else 11), below + after - 10, name, size=12, italic=True)
        join.draw(canvas, x, below + after)

    body = Shape(max(a.left + to_a, join.left), max(b.right + to_b, join.right), height, draw, open=True)
    return container(body, "gate", "two branches")


def _context(part: Part) -> Shape:
    inside = {child.label: child for child in part.parts}
    memory, attend = inside["memory"], _block(inside["attend"])
    of_inputs = part.fields.get("write") == "inputs"
    persistent, segment = part.fields.get("persistent") or 0, part.fields.get("segment")

    written, answer = ("x", "M(x)") if of_inputs else ("y", "M(y)")
    read = box("1  read", ["h = M(x), the memory as it", "stood at the segment's start"], "memory")
    write = box("3  write", [f"{written} into the memory,", f"then read back {answer}"], "memory", least=read.width)
    gate = box("4  gate", [_formula(part, "y", answer)], "gate", least=150)
    kept = [memory.type, *_lines(memory), count(memory.parameters) + " parameters", "state " + _size(memory)]
    if "snapshot" in part.state:
        kept.append("snapshot " + in_bytes(part.state["snapshot"]))
    store_half = max(text_width(line, 10.5, True) for line in kept) / 2 + 12
    letters = [*(["P", "P", "…", "|"] if persistent else []), "h", "x", "h", "x", "…", "h", "x"]
    strip = 20 * len(letters) + 12

    # y of each row, from the top
    read_at = 30
    strip_at = read_at + read.height + 24
    attend_at = strip_at + 30 + 34
    after_attend = attend_at + attend.height
    write_at = after_attend + 30
    gate_at = write_at + write.height + 14
    height = gate_at + gate.height
    # x of the memory's boxes and of its state, left of the axis
    boxes = max(attend.left, strip / 2, gate.left) + 40 + read.left
    store_x = boxes + read.left + 34 + store_half

    def draw(canvas: Canvas, x: float, y: float) -> None:
        at, centre = x - boxes, x - store_x
        # the memory, beside its two uses
        fill, edge = COLOURS["state"]
        top, tall = y + read_at - 6, write_at + write.height - read_at + 12
        canvas.cylinder(centre - store_half, top, 2 * store_half, tall, fill=fill, stroke=edge)
        first = top + tall / 2 - 8 * (len(kept) - 1)
        for index, line in enumerate(kept):
            canvas.text(
                centre,
                first + 16 * index,
                line,
                size=12 if index == 0 else 10.5,
                bold=index == 0,
                colour=INK if index == 0 else FAINT,
            )
        for box_y, towards_box in ((read_at + read.height / 2, True), (write_at + write.height / 2, False)):
            ends = [(centre + store_half, y + box_y), (at - read.left, y + box_y)]
            canvas.line(ends if towards_box else ends[::-1], stroke=edge, arrow=True, both=not towards_box)
        # 1. read
        canvas.line([(x, y), (x, y + strip_at)], stroke=FLOW, arrow=True)
        canvas.line([(x, y + 10), (at, y + 10), (at, y + read_at)], stroke=FLOW, arrow=True)
        canvas.text(x + 9, y + strip_at - 16, "x", size=12, italic=True)
        read.draw(canvas, at, y + read_at)
        # 2. attend
        middle = y + strip_at + 15
        canvas.line([(at, y + read_at + read.height), (at, middle), (x - strip / 2, middle)], stroke=FLOW, arrow=True)
        canvas.text(at + 10, middle - 10, "h", size=12, italic=True)
        canvas.rectangle(x - strip / 2, y + strip_at, strip, 30, fill="#ffffff", stroke="#cbd5e1", radius=6)
        squares(canvas, x - strip / 2 + 7.5, middle, letters)
        if persistent:
            canvas.text(
                x + strip / 2 + 10, middle, f"P: {persistent} learned tokens", size=11, colour=FAINT, anchor="start"
            )
        canvas.line([(x, y + strip_at + 30), (x, y + attend_at)], stroke=FLOW, arrow=not attend.open)
        canvas.text(x - 10, y + attend_at - 16, "2  attend", size=11.5, bold=True, anchor="end")
        canvas.text(x + 10, y + attend_at - 16, "causal, within the segment", size=11, colour=FAINT, anchor="start")
        attend.draw(canvas, x, y + attend_at)
        # 3. write
        canvas.line([(x, y + after_attend), (x, y + gate_at)], stroke=FLOW, arrow=True)
        canvas.text(x + 9, y + gate_at - 18, "y", size=12, italic=True)
        into = y + write_at + write.height / 2
        if of_inputs:
            lane = at + read.left + 18
            canvas.line([(x, y + 10), (lane, y + 10), (lane, into), (at + write.right, into)], stroke=FLOW, arrow=True)
            canvas.text(lane + 10, into, "x", size=12, italic=True)
        else:
            canvas.line([(x, into), (at + write.right, into)], stroke=FLOW, arrow=True)
        write.draw(canvas, at, y + write_at)
        # 4. gate
        into = y + gate_at + gate.height / 2
        canvas.line([(at, y + write_at + write.height), (at, into), (x - gate.left, into)], stroke=FLOW, arrow=True)
        canvas.text(x - gate.left - 12, into - 10, answer, size=12, italic=True, anchor="end")
        gate.draw(canvas, x, y + gate_at)

    note = text_width(f"P: {persistent} learned tokens", 11) + 14 if persistent else 0
    right = max(attend.right, strip / 2 + note, gate.right, text_width("causal, within the segment", 11) + 14)
    body = Shape(store_x + store_half, right, height, draw, open=True)
    return container(body, "context", f"segments of {segment} tokens")


_COMBINATORS: dict[str, Callable[[Part], Shape]] = {
    "chain": _chain,
    "persistent": _persistent,
    "residual": _residual,
    "gate": _gate,
    "context": _context,
}

# -- the whole stack ---------------------------------------------------------------------------------------------------


def draw_stack(
    stack: Sequence[Any],
    layers: dict[str, Part],
    title: str,
    notes: Sequence[str],
    ends: Sequence[Shape],
    out: Sequence[Shape],
) -> str:
    """The finished SVG. ``ends`` stand above the stack, ``out`` below it; ``stack`` is as in the recipe."""
    body = column([*ends, _stack(stack, layers, set()), *out])
    canvas = Canvas()
    margin, top = 28, 52 + 18 * len(notes)
    heading = max(text_width(title, 20, True), *(text_width(note, 12) for note in notes))
    legend = _legend()
    width = max(body.width, heading, legend.width) + 2 * margin
    canvas.text(margin, 34, title, size=20, bold=True, anchor="start")
    for index, note in enumerate(notes):
        canvas.text(margin, 60 + 18 * index, note, size=12, colour=FAINT, anchor="start")
    body.draw(canvas, margin + (width - 2 * margin - body.width) / 2 + body.left, top + 12)
    bottom = top + 12 + body.height + 24
    legend.draw(canvas, margin, bottom)
    return canvas.document(width, bottom + legend.height + 16, title, FLOW)


def _stack(stack: Sequence[Any], layers: dict[str, Part], drawn: set[str]) -> Shape:
    shapes = []
    for item, times in _runs(stack):
        if isinstance(item, str):
            if item in drawn:
                shape = box(item, ["as above"], "norm", least=160)
            else:
                drawn.add(item)
                shape = _layer(layers[item])
        else:
            shape = _stack(item["of"], layers, drawn)
            times *= item["repeat"]
        shapes.append(repeated(shape, times))
    return column(shapes)


def _runs(stack: Sequence[Any]) -> list[tuple[Any, int]]:
    """Repetitions of an item as the item and their number."""
    runs: list[tuple[Any, int]] = []
    for item in stack:
        if runs and runs[-1][0] == item:
            runs[-1] = (item, runs[-1][1] + 1)
        else:
            runs.append((item, 1))
    return runs


def _legend() -> Shape:
    entries = [
        ("memory", "memory"),
        ("attention", "attention"),
        ("mixer", "other, with state"),
        ("plain", "without state"),
        ("gate", "gate"),
        ("state", "state of one row, carried from token to token"),
    ]
    widths = [22 + text_width(text, 11) + 16 for _, text in entries]

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for (colour, text), width in zip(entries, widths):
            fill, edge = COLOURS[colour]
            if colour == "state":
                canvas.cylinder(x, y, 15, 18, fill=fill, stroke=edge)
            else:
                canvas.rectangle(x, y + 2, 15, 14, fill=fill, stroke=edge, radius=3)
            canvas.text(x + 22, y + 9, text, size=11, colour=FAINT, anchor="start")
            x += width

    return Shape(0, sum(widths), 18, draw)


def _is_memory(type: str) -> bool:
    """Whether blocks of this type can be read and written."""
    try:
        cls = lookup(type).cls
    except RecipeError:
        return False  # not registered: a layer, or a class of a user's combinator
    return all(callable(getattr(cls, method, None)) for method in ("read", "write"))


def _colour(part: Part) -> str:
    if _is_memory(part.type):
        return "memory"
    if part.type == "attention":
        return "attention"
    if part.type.endswith("norm"):
        return "norm"
    return "mixer" if part.state_bytes or part.grows else "plain"


_SETTINGS = ("heads", "kv_heads", "window", "depth", "expansion", "chunk", "kind", "hidden")


def _lines(part: Part) -> list[str]:
    """The most important settings, two to a line."""
    settings = [f"{key.replace('_', ' ')} {part.fields[key]}" for key in _SETTINGS if part.fields.get(key) is not None]
    return [" · ".join(settings[index : index + 2]) for index in range(0, len(settings), 2)]


def _state_lines(part: Part) -> list[str]:
    return ["grows", "with every token"] if part.grows else [_size(part), "constant"]


def _size(part: Part) -> str:
    return in_bytes(part.state_bytes) + (" +" if part.grows else "")


def _formula(part: Part, a: str, b: str) -> str:
    form = part.fields.get("form")
    return {"silu": f"norm({a}) · silu(norm({b}))", "sum": f"norm({a}) + norm({b})"}.get(
        str(form), f"norm({a}) · σ(norm({b}))"
    )

"""The picture of a stack: every block a shape, drawn where data flows through it, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..survey import Part
from ..terminal import count, in_bytes
from .shapes import (
    COLOURS,
    FAINT,
    FLOW,
    INK,
    Shape,
    box,
    column,
    container,
    drum,
    pre_normed,
    repeated,
    residual,
    squares,
    with_state,
)
from .svg import Canvas, text_width


def part_shape(part: Part, memories: frozenset[str]) -> Shape:
    """The shape of a block with everything inside it. ``memories``: types that can be read and written."""
    drawn = _COMBINATORS.get(part.type)
    if drawn is not None and part.parts:
        return drawn(part, memories)
    if part.parts:
        return _unknown_combinator(part, memories)
    shape = box(part.type, _lines(part), _colour(part, memories), least=120)
    return with_state(shape, drum(_state_lines(part))) if part.state_bytes or part.grows else shape


def layer_shape(part: Part, memories: frozenset[str]) -> Shape:
    """A named layer: its blocks, each pre-normed and residual."""
    body = column([residual(pre_normed(part_shape(block, memories))) for block in part.parts], 0)
    return container(body, part.label, f"{count(part.parameters)} parameters", fill="#f8fafc")


def _chain(part: Part, memories: frozenset[str]) -> Shape:
    return column([part_shape(child, memories) for child in part.parts])


def _residual(part: Part, memories: frozenset[str]) -> Shape:
    return container(residual(part_shape(part.parts[0], memories)), "residual")


def _unknown_combinator(part: Part, memories: frozenset[str]) -> Shape:
    # how data runs between the blocks inside is known to the block alone: no arrows are invented
    inner = [container(part_shape(child, memories), child.label, through=False) for child in part.parts]

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for shape in inner:
            shape.draw(canvas, x, y)
            y += shape.height + 10

    height = sum(shape.height for shape in inner) + 10 * (len(inner) - 1)
    body = Shape(max(s.left for s in inner), max(s.right for s in inner), height, draw)
    return container(body, part.type, ", ".join(_lines(part)), through=False)


def _persistent(part: Part, memories: frozenset[str]) -> Shape:
    inner = part_shape(part.parts[0], memories)
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


def _gate(part: Part, memories: frozenset[str]) -> Shape:
    a, b = (part_shape(branch, memories) for branch in part.parts)
    join = box("gate", [_formula(part, "a", "b")], "gate", least=120)
    ahead, after = 30, 34
    # both branches hang beside the spine, as close to it as they fit
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


def _context(part: Part, memories: frozenset[str]) -> Shape:
    inside = {child.label: child for child in part.parts}
    memory, attend = inside["memory"], part_shape(inside["attend"], memories)
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
    # x of the memory's boxes and of its drum, left of the spine
    boxes = max(attend.left, strip / 2, gate.left) + 40 + read.left
    store = boxes + read.left + 34 + store_half

    def draw(canvas: Canvas, x: float, y: float) -> None:
        at, drum_x = x - boxes, x - store
        # the memory, beside its two uses
        fill, edge = COLOURS["state"]
        top, tall = y + read_at - 6, write_at + write.height - read_at + 12
        canvas.cylinder(drum_x - store_half, top, 2 * store_half, tall, fill=fill, stroke=edge)
        first = top + tall / 2 - 8 * (len(kept) - 1)
        for index, line in enumerate(kept):
            canvas.text(
                drum_x,
                first + 16 * index,
                line,
                size=12 if index == 0 else 10.5,
                bold=index == 0,
                colour=INK if index == 0 else FAINT,
            )
        for box_y, towards_box in ((read_at + read.height / 2, True), (write_at + write.height / 2, False)):
            ends = [(drum_x + store_half, y + box_y), (at - read.left, y + box_y)]
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
    body = Shape(store + store_half, right, height, draw, open=True)
    return container(body, "context", f"segments of {segment} tokens")


_COMBINATORS: dict[str, Callable[[Part, frozenset[str]], Shape]] = {
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
    memories: frozenset[str],
    title: str,
    notes: Sequence[str],
    ends: Sequence[Shape],
    out: Sequence[Shape],
) -> str:
    """The finished SVG. ``ends`` stand above the stack, ``out`` below it; ``stack`` is as in the recipe."""
    body = column([*ends, _stack(stack, layers, memories, set()), *out])
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


def _stack(stack: Sequence[Any], layers: dict[str, Part], memories: frozenset[str], drawn: set[str]) -> Shape:
    shapes = []
    for item, times in _runs(stack):
        if isinstance(item, str):
            if item in drawn:
                shape = box(item, ["as above"], "norm", least=160)
            else:
                drawn.add(item)
                shape = layer_shape(layers[item], memories)
        else:
            shape = _stack(item["of"], layers, memories, drawn)
            times *= item["repeat"]
        shapes.append(repeated(shape, times))
    return column(shapes)


def _runs(stack: Sequence[Any]) -> list[tuple[Any, int]]:
    """The same item several times in a row, once and counted."""
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


def _colour(part: Part, memories: frozenset[str]) -> str:
    if part.type in memories:
        return "memory"
    if part.type == "attention":
        return "attention"
    if part.type.endswith("norm"):
        return "norm"
    return "mixer" if part.state_bytes or part.grows else "plain"


_TELLING = ("heads", "kv_heads", "window", "depth", "expansion", "chunk", "kind", "hidden")


def _lines(part: Part) -> list[str]:
    """The settings that matter most, two to a line."""
    telling = [f"{key.replace('_', ' ')} {part.fields[key]}" for key in _TELLING if part.fields.get(key) is not None]
    return [" · ".join(telling[index : index + 2]) for index in range(0, len(telling), 2)]


def _state_lines(part: Part) -> list[str]:
    return ["grows", "with every token"] if part.grows else [_size(part), "constant"]


def _size(part: Part) -> str:
    return in_bytes(part.state_bytes) + (" +" if part.grows else "")


def _formula(part: Part, a: str, b: str) -> str:
    form = part.fields.get("form")
    return {"silu": f"norm({a}) · silu(norm({b}))", "sum": f"norm({a}) + norm({b})"}.get(
        str(form), f"norm({a}) · σ(norm({b}))"
    )

"""The shapes that pictures are made of: boxes, drums and frames, and how they stand together.

A shape hangs on a vertical line, its spine: data enters at the top of the spine and leaves at its bottom. Shapes
are measured when they are made and drawn when their place is known, so a container only adds up what is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .svg import Canvas, text_width

INK, FAINT, FLOW = "#1f2937", "#6b7280", "#475569"
GAP = 24
"""Between one shape and the next below it."""

COLOURS = {  # fill, edge
    "memory": ("#fef3c7", "#d97706"),
    "attention": ("#dbeafe", "#3b82f6"),
    "mixer": ("#ede9fe", "#8b5cf6"),
    "plain": ("#dcfce7", "#22a05a"),
    "norm": ("#f3f4f6", "#9ca3af"),
    "gate": ("#fce7f3", "#db2777"),
    "state": ("#fff7ed", "#ea580c"),
    "ends": ("#ffffff", "#94a3b8"),
}


@dataclass(frozen=True)
class Shape:
    """``left`` and ``right`` of the spine, ``height`` down; ``draw(canvas, x of the spine, y of the top)``."""

    left: float
    right: float
    height: float
    draw: Callable[[Canvas, float, float], None]
    open: bool = False
    """It begins with a line rather than an edge: what leads to it needs no arrowhead."""

    @property
    def width(self) -> float:
        """From the left edge to the right one."""
        return self.left + self.right


def column(shapes: Sequence[Shape], gap: float = GAP) -> Shape:
    """One after the other, an arrow from each to the next."""

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for index, shape in enumerate(shapes):
            if index and gap:
                canvas.line([(x, y - gap), (x, y)], stroke=FLOW, arrow=not shape.open)
            shape.draw(canvas, x, y)
            y += shape.height + gap

    height = sum(shape.height for shape in shapes) + gap * (len(shapes) - 1)
    return Shape(max(s.left for s in shapes), max(s.right for s in shapes), height, draw, shapes[0].open)


def box(title: str, lines: Sequence[str] = (), colour: str = "plain", least: float = 0, small: bool = False) -> Shape:
    """A block with nothing inside."""
    size, padding = (11, 10) if small else (13, 14)
    width = max([text_width(title, size, True), *(text_width(line, 11) for line in lines)]) + 2 * padding
    half = max(width, least) / 2
    height = (22 if small else 32) + 15 * len(lines)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        fill, edge = COLOURS[colour]
        canvas.rectangle(x - half, y, 2 * half, height, fill=fill, stroke=edge, radius=11 if small else 8)
        canvas.text(x, y + (11 if small else 17), title, size=size, bold=True)
        for index, line in enumerate(lines):
            canvas.text(x, y + (26 if small else 34) + 15 * index, line, size=11, colour=FAINT)

    return Shape(half, half, height, draw)


def drum(lines: Sequence[str], least: float = 0) -> Shape:
    """State that is carried from token to token."""
    half = max(max(text_width(line, 10.5, index == 0) for index, line in enumerate(lines)) + 20, least) / 2
    height = 24 + 14 * len(lines)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        fill, edge = COLOURS["state"]
        canvas.cylinder(x - half, y, 2 * half, height, fill=fill, stroke=edge)
        for index, line in enumerate(lines):
            canvas.text(x, y + 24 + 14 * index, line, size=10.5, colour=INK if index == 0 else FAINT, bold=index == 0)

    return Shape(half, half, height, draw)


def with_state(shape: Shape, store: Shape, reach: float = 26) -> Shape:
    """A block and, at its right, the state it reads and writes."""
    height = max(shape.height, store.height)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        if shape.height < height:  # data flows past the space above and below a block lower than its state
            canvas.line([(x, y), (x, y + (height - shape.height) / 2)], stroke=FLOW, arrow=True)
            canvas.line([(x, y + height / 2), (x, y + height)], stroke=FLOW)
        top, middle = y + (height - shape.height) / 2, y + height / 2
        shape.draw(canvas, x, top)
        canvas.line([(x + shape.right, middle), (x + shape.right + reach, middle)], stroke=FLOW, both=True)
        store.draw(canvas, x + shape.right + reach + store.left, y + (height - store.height) / 2)

    return Shape(shape.left, shape.right + reach + store.width, height, draw, open=shape.height < height)


def container(
    inner: Shape, label: str, note: str = "", *, dashed: bool = False, fill: str = "#ffffff", through: bool = True
) -> Shape:
    """A frame around what belongs together. ``through``: data enters and leaves along the spine."""
    padding, top, bottom = 16, 40, 18
    wanted = text_width(label, 12, True) + text_width(note, 11) + 24
    # the label stands left of the line that comes in, or it would be crossed by it
    left = max(inner.left + padding, text_width(label, 12, True) + text_width(note, 11) + 30 if through else 0)
    right = max(inner.right + padding, wanted - left, 24)
    height = inner.height + top + bottom

    def draw(canvas: Canvas, x: float, y: float) -> None:
        canvas.rectangle(x - left, y, left + right, height, fill=fill, stroke="#cbd5e1", radius=12, dashed=dashed)
        canvas.text(x - left + 14, y + 17, label, size=12, bold=True, anchor="start")
        canvas.text(x - left + 22 + text_width(label, 12, True), y + 17, note, size=11, colour=FAINT, anchor="start")
        if through:
            canvas.line([(x, y), (x, y + top)], stroke=FLOW, arrow=not inner.open)
            canvas.line([(x, y + height - bottom), (x, y + height)], stroke=FLOW)
        inner.draw(canvas, x, y + top)

    return Shape(left, right, height, draw)


def pre_normed(inner: Shape) -> Shape:
    """Behind a norm."""
    return column([box("norm", colour="norm", small=True), inner], 16)


def residual(body: Shape) -> Shape:
    """Around the block, data also goes straight to the sum below it."""
    ahead, after, radius = 26, 16, 8
    lane = body.left + 18
    height = ahead + body.height + after + 2 * radius

    def draw(canvas: Canvas, x: float, y: float) -> None:
        bottom = y + height - radius
        canvas.line([(x, y), (x, y + ahead)], stroke=FLOW, arrow=not body.open)
        canvas.line([(x, y + 6), (x - lane, y + 6), (x - lane, bottom), (x - radius, bottom)], stroke=FLOW, arrow=True)
        body.draw(canvas, x, y + ahead)
        canvas.line([(x, bottom - radius - after), (x, bottom - radius)], stroke=FLOW, arrow=True)
        canvas.circle(x, bottom, radius, fill="#ffffff", stroke=FLOW)
        canvas.line([(x - 4.5, bottom), (x + 4.5, bottom)], stroke=FLOW)
        canvas.line([(x, bottom - 4.5), (x, bottom + 4.5)], stroke=FLOW)

    return Shape(lane + 4, body.right, height, draw, open=True)


def repeated(inner: Shape, times: int) -> Shape:
    """A bracket at the right: what is left of it stands ``times`` times."""
    if times == 1:
        return inner
    label = f"×{times}"

    def draw(canvas: Canvas, x: float, y: float) -> None:
        inner.draw(canvas, x, y)
        edge = x + inner.right + 20
        points = [(edge - 9, y + 2), (edge, y + 2), (edge, y + inner.height - 2), (edge - 9, y + inner.height - 2)]
        canvas.line(points, stroke="#9333ea", thickness=2.5, bend=5)
        canvas.text(edge + 9, y + inner.height / 2, label, size=18, bold=True, colour="#9333ea", anchor="start")

    return Shape(inner.left, inner.right + 34 + text_width(label, 18, True), inner.height, draw, inner.open)


def squares(canvas: Canvas, x: float, y: float, letters: Sequence[str], size: float = 17) -> None:
    """Tokens in a row, each a square with a letter, from ``x`` on; ``y`` is their middle."""
    tints = {"P": COLOURS["mixer"], "h": COLOURS["memory"], "x": COLOURS["ends"]}
    for index, letter in enumerate(letters):
        left = x + index * (size + 3)
        if letter in tints:
            fill, edge = tints[letter]
            canvas.rectangle(left, y - size / 2, size, size, fill=fill, stroke=edge, radius=3, thickness=1)
        canvas.text(left + size / 2, y, letter, size=10.5, italic=letter != "P", colour=INK)

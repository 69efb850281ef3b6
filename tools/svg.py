"""SVG drawings of block diagrams: a canvas of marks, and shapes that stack along a vertical line.

A shape is attached to a vertical line, its axis: data enters at the top of the axis and leaves at its bottom. A shape
is measured when it is made and drawn when its place is known, so a container only adds up its contents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

INK, FAINT, FLOW = "#1f2937", "#6b7280", "#475569"
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
GAP = 24
"""Pixels between one shape and the next below it."""
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"

_NARROW, _WIDE = frozenset("ijltfrI.,:;|'!()[]{} ·/-"), frozenset("mwMW@%×→Σ")


def text_width(text: str, size: float, bold: bool = False) -> float:
    """An upper estimate of the width of ``text`` in any of the fonts of ``FONT``."""
    units = sum(0.36 if c in _NARROW else 0.92 if c in _WIDE else 0.72 if c.isupper() else 0.6 for c in text)
    return units * size * (1.06 if bold else 1.0)


class Canvas:
    """Collects marks, in the order they are painted. Lengths are pixels, the origin is top left."""

    def __init__(self) -> None:
        self.marks: list[str] = []

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str,
        stroke: str = "none",
        radius: float = 8,
        dashed: bool = False,
        thickness: float = 1.25,
    ) -> None:
        """A rectangle with round corners; ``x`` and ``y`` are its upper left corner."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{thickness}"{dash}/>'
        )

    def circle(self, x: float, y: float, radius: float, *, fill: str, stroke: str) -> None:
        """A circle; ``x`` and ``y`` are its centre."""
        self.marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.25"/>'
        )

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        stroke: str,
        arrow: bool = False,
        both: bool = False,
        thickness: float = 1.5,
        bend: float = 7,
    ) -> None:
        """A path through ``points`` with rounded corners, and an arrowhead at its end (or at both ends)."""
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for before, corner, after in zip(points, points[1:], points[2:]):
            a, b = _towards(corner, before, bend), _towards(corner, after, bend)
            path += f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        path += f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"
        ends = (' marker-end="url(#arrow)"' if arrow or both else "") + (' marker-start="url(#arrow)"' if both else "")
        self.marks.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{thickness}"{ends}/>')

    def cylinder(self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str) -> None:
        """A cylinder, the sign of a store; ``height`` includes its lids."""
        lid = min(7.0, height / 5)
        wall, half = height - 2 * lid, width / 2
        sides = f"M{x:.1f} {y + lid:.1f}v{wall:.1f}a{half:.1f} {lid:.1f} 0 0 0 {width:.1f} 0v{-wall:.1f}"
        self.marks.append(f'<path d="{sides}" fill="{fill}" stroke="{stroke}" stroke-width="1.25"/>')
        self.marks.append(
            f'<ellipse cx="{x + half:.1f}" cy="{y + lid:.1f}" rx="{half:.1f}" ry="{lid:.1f}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.25"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        colour: str = "#1f2937",
        bold: bool = False,
        anchor: str = "middle",
        italic: bool = False,
    ) -> None:
        """``y`` is the middle of the line."""
        weight = ' font-weight="600"' if bold else ""
        style = ' font-style="italic"' if italic else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y + size * 0.35:.1f}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}{style}>{escape(text)}</text>'
        )

    def document(self, width: float, height: float, title: str, arrow: str) -> str:
        """The finished file; ``arrow`` is the colour of arrowheads."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family={quoteattr(FONT)} role="img">'
            f"<title>{escape(title)}</title>"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
            f'orient="auto-start-reverse"><path d="M0 0.6L8 4L0 7.4z" fill="{arrow}"/></marker></defs>'
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
        )
        return "\n".join([head, *self.marks, "</svg>"]) + "\n"


def _towards(corner: tuple[float, float], other: tuple[float, float], distance: float) -> tuple[float, float]:
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = (dx * dx + dy * dy) ** 0.5
    share = min(distance, length / 2) / length if length else 0.0
    return corner[0] + dx * share, corner[1] + dy * share


@dataclass(frozen=True)
class Shape:
    """Extends ``left`` and ``right`` of its axis; drawn by ``draw(canvas, x of the axis, y of the top)``."""

    left: float
    right: float
    height: float
    draw: Callable[[Canvas, float, float], None]
    open: bool = False
    """It begins with a line, not with an edge: a line that leads to it has no arrowhead."""

    @property
    def width(self) -> float:
        """Pixels from the left edge to the right one."""
        return self.left + self.right


def column(shapes: Sequence[Shape], gap: float = GAP) -> Shape:
    """Shapes below each other, with an arrow from each to the next."""

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for index, shape in enumerate(shapes):
            if index and gap:
                canvas.line([(x, y - gap), (x, y)], stroke=FLOW, arrow=not shape.open)
            shape.draw(canvas, x, y)
            y += shape.height + gap

    height = sum(shape.height for shape in shapes) + gap * (len(shapes) - 1)
    return Shape(max(s.left for s in shapes), max(s.right for s in shapes), height, draw, shapes[0].open)


def box(title: str, lines: Sequence[str] = (), colour: str = "plain", least: float = 0, small: bool = False) -> Shape:
    """A block without inner blocks."""
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


def store(lines: Sequence[str]) -> Shape:
    """The state of a block."""
    half = (max(text_width(line, 10.5, index == 0) for index, line in enumerate(lines)) + 20) / 2
    height = 24 + 14 * len(lines)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        fill, edge = COLOURS["state"]
        canvas.cylinder(x - half, y, 2 * half, height, fill=fill, stroke=edge)
        for index, line in enumerate(lines):
            canvas.text(x, y + 24 + 14 * index, line, size=10.5, colour=INK if index == 0 else FAINT, bold=index == 0)

    return Shape(half, half, height, draw)


def with_state(shape: Shape, state: Shape, reach: float = 26) -> Shape:
    """A block and, to its right, the state that it reads and writes."""
    height = max(shape.height, state.height)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        if shape.height < height:  # the axis continues above and below a block that is lower than its state
            canvas.line([(x, y), (x, y + (height - shape.height) / 2)], stroke=FLOW, arrow=True)
            canvas.line([(x, y + height / 2), (x, y + height)], stroke=FLOW)
        top, middle = y + (height - shape.height) / 2, y + height / 2
        shape.draw(canvas, x, top)
        canvas.line([(x + shape.right, middle), (x + shape.right + reach, middle)], stroke=FLOW, both=True)
        state.draw(canvas, x + shape.right + reach + state.left, y + (height - state.height) / 2)

    return Shape(shape.left, shape.right + reach + state.width, height, draw, open=shape.height < height)


def container(
    inner: Shape, label: str, note: str = "", *, dashed: bool = False, fill: str = "#ffffff", through: bool = True
) -> Shape:
    """A labelled frame. ``through``: data enters and leaves along the axis."""
    padding, top, bottom = 16, 40, 18
    label_width = text_width(label, 12, True) + text_width(note, 11) + 24
    # the label stands left of the incoming line, which would cross it
    left = max(inner.left + padding, text_width(label, 12, True) + text_width(note, 11) + 30 if through else 0)
    right = max(inner.right + padding, label_width - left, 24)
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
    """A norm and then ``inner``."""
    return column([box("norm", colour="norm", small=True), inner], 16)


def residual(body: Shape) -> Shape:
    """A residual connection around ``body``, with the sum below it."""
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
    """A bracket at the right that says that ``inner`` is repeated ``times`` times."""
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
    """A row of tokens, each a square with a letter, that starts at ``x``; ``y`` is its middle."""
    tints = {"P": COLOURS["mixer"], "h": COLOURS["memory"], "x": COLOURS["ends"]}
    for index, letter in enumerate(letters):
        left = x + index * (size + 3)
        if letter in tints:
            fill, edge = tints[letter]
            canvas.rectangle(left, y - size / 2, size, size, fill=fill, stroke=edge, radius=3, thickness=1)
        canvas.text(left + size / 2, y, letter, size=10.5, italic=letter != "P", colour=INK)

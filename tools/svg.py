"""SVG drawings of block diagrams: a canvas of marks, and shapes that stack along a vertical line.

A shape is attached to a vertical line, its axis: data enters at the top of the axis and leaves at its bottom. A shape
is measured when it is made and drawn when its place is known, so a container only adds up its contents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import escape

INK, FAINT, FLOW, FRAME = "#1f2937", "#6b7280", "#475569", "#cbd5e1"
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
        self.marks: list[ElementTree.Element] = []

    def mark(self, tag: str, **attributes: object) -> ElementTree.Element:
        """Add an element; ``stroke_width=2`` is the attribute ``stroke-width="2"``."""
        shown = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
        self.marks.append(ElementTree.Element(tag, {name.replace("_", "-"): value for name, value in shown.items()}))
        return self.marks[-1]

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: float = 8
    ) -> ElementTree.Element:
        """A rectangle with round corners; ``x`` and ``y`` are its upper left corner."""
        return self.mark(
            "rect", x=x, y=y, width=width, height=height, rx=radius, fill=fill, stroke=stroke, stroke_width=1.25
        )

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        start: bool = False,
        end: bool = False,
        stroke: str = FLOW,
        stroke_width: float = 1.5,
    ) -> None:
        """A path through ``points`` with rounded corners. ``start``, ``end``: whether it has an arrowhead there."""
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for before, corner, after in zip(points, points[1:], points[2:]):
            a, b = _towards(corner, before), _towards(corner, after)
            path += f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        path += f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"
        heads = {name: "url(#arrow)" for name, has in (("marker_start", start), ("marker_end", end)) if has}
        self.mark("path", d=path, fill="none", stroke=stroke, stroke_width=stroke_width, **heads)

    def cylinder(self, x: float, y: float, width: float, height: float) -> None:
        """A cylinder, the sign of a state; ``height`` includes its lids."""
        fill, edge = COLOURS["state"]
        lid, half = min(7.0, height / 5), width / 2
        wall = height - 2 * lid
        sides = f"M{x:.1f} {y + lid:.1f}v{wall:.1f}a{half:.1f} {lid:.1f} 0 0 0 {width:.1f} 0v{-wall:.1f}"
        self.mark("path", d=sides, fill=fill, stroke=edge, stroke_width=1.25)
        self.mark("ellipse", cx=x + half, cy=y + lid, rx=half, ry=lid, fill=fill, stroke=edge, stroke_width=1.25)

    def text(
        self, x: float, y: float, text: str, *, size: float = 11, colour: str = INK, bold: bool = False,
        anchor: str = "middle",
    ) -> None:  # fmt: skip
        """``y`` is the middle of the line."""
        weight = {"font_weight": 600} if bold else {}
        mark = self.mark("text", x=x, y=y + size * 0.35, font_size=size, fill=colour, text_anchor=anchor, **weight)
        mark.text = text

    def document(self, width: float, height: float, title: str) -> str:
        """The finished file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{FONT}" role="img">\n<title>{escape(title)}</title>\n'
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
            f'orient="auto-start-reverse"><path d="M0 0.6L8 4L0 7.4z" fill="{FLOW}"/></marker></defs>\n'
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
        )
        marks = (ElementTree.tostring(mark, encoding="unicode") for mark in self.marks)
        return "\n".join([head, *marks, "</svg>\n"])


def _towards(corner: tuple[float, float], other: tuple[float, float], distance: float = 7) -> tuple[float, float]:
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


def column(shapes: Sequence[Shape], gap: float = GAP, *, labels: Sequence[str] = (), flow: bool = True) -> Shape:
    """Shapes below each other. ``flow``: with an arrow from each to the next; ``labels`` are those of the arrows."""

    def draw(canvas: Canvas, x: float, y: float) -> None:
        for index, shape in enumerate(shapes):
            if index and gap and flow:
                canvas.line([(x, y - gap), (x, y)], end=not shape.open)
            if 0 < index <= len(labels):
                canvas.text(x + 9, y - gap / 2, labels[index - 1], anchor="start")
            shape.draw(canvas, x, y)
            y += shape.height + gap

    height = sum(shape.height for shape in shapes) + gap * (len(shapes) - 1)
    return Shape(max(s.left for s in shapes), max(s.right for s in shapes), height, draw, shapes[0].open)


def box(
    title: str, lines: Sequence[str] = (), colour: str = "plain", *, least: float = 0, small: bool = False
) -> Shape:
    """A block without inner blocks, ``least`` pixels wide."""
    size, padding, head = (11, 10, 22) if small else (13, 14, 32)
    half = max(text_width(title, size, True) + 2 * padding, _width(lines) + 2 * padding, least) / 2
    height = head + 15 * len(lines)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        canvas.rectangle(x - half, y, 2 * half, height, *COLOURS[colour], radius=11 if small else 8)
        canvas.text(x, y + head / 2, title, size=size, bold=True)
        for index, line in enumerate(lines):
            canvas.text(x, y + head + 2 + 15 * index, line, colour=FAINT)

    return Shape(half, half, height, draw)


def _width(lines: Sequence[str], bold: bool = False) -> float:
    return max((text_width(line, 11, bold) for line in lines), default=0.0)


def with_state(
    shapes: Sequence[Shape], lines: Sequence[str], writes: Mapping[int, bool], labels: Sequence[str] = ()
) -> Shape:
    """Shapes below each other and, to their right, the state that some of them read; ``lines`` stand in it.

    ``writes``: the indices of the shapes that read the state, and whether they write it, too.
    """
    inner = column(shapes, labels=labels)
    reach, width = 26, _width(lines, bold=True) + 20
    tall = max(inner.height, 24 + 14 * len(lines))  # it may stand out above and below a low shape

    def draw(canvas: Canvas, x: float, y: float) -> None:
        left, middle = x + inner.right + reach, y + inner.height / 2
        canvas.cylinder(left, middle - tall / 2, width, tall)
        for index, line in enumerate(lines):
            at = middle + 5 + 14 * (index - (len(lines) - 1) / 2)
            canvas.text(left + width / 2, at, line, bold=index == 0, colour=FAINT if index else INK)
        inner.draw(canvas, x, y)
        for index, shape in enumerate(shapes):
            if index in writes:
                at = y + shape.height / 2
                canvas.line([(x + shape.right, at), (left, at)], start=True, end=writes[index])
            y += shape.height + GAP

    return Shape(inner.left, inner.right + reach + width, inner.height, draw, inner.open)


def container(
    inner: Shape, label: str, note: str = "", *, dashed: bool = False, fill: str = "#ffffff", flow: bool = True
) -> Shape:
    """A labelled frame. ``flow``: data enters and leaves along the axis."""
    padding, top, bottom = 16, 40, 18
    label_width = text_width(label, 12, True) + text_width(note, 11) + 30
    # the label stands left of the incoming line, which would cross it
    left = max(inner.left + padding, label_width if flow else 0)
    right = max(inner.right + padding, label_width - left, 24)
    height = inner.height + top + bottom

    def draw(canvas: Canvas, x: float, y: float) -> None:
        frame = canvas.rectangle(x - left, y, left + right, height, fill, FRAME, radius=12)
        if dashed:
            frame.set("stroke-dasharray", "5 4")
        canvas.text(x - left + 14, y + 17, label, size=12, bold=True, anchor="start")
        canvas.text(x - left + 22 + text_width(label, 12, True), y + 17, note, colour=FAINT, anchor="start")
        if flow:
            canvas.line([(x, y), (x, y + top)], end=not inner.open)
            canvas.line([(x, y + height - bottom), (x, y + height)])
        inner.draw(canvas, x, y + top)

    return Shape(left, right, height, draw)


def residual(body: Shape) -> Shape:
    """A residual connection around ``body``, with the sum below it."""
    ahead, after, radius = 26, 16, 8
    lane = body.left + 18
    height = ahead + body.height + after + 2 * radius

    def draw(canvas: Canvas, x: float, y: float) -> None:
        sum_at = y + height - radius
        canvas.line([(x, y), (x, y + ahead)], end=not body.open)
        canvas.line([(x, y + 6), (x - lane, y + 6), (x - lane, sum_at), (x - radius, sum_at)], end=True)
        body.draw(canvas, x, y + ahead)
        canvas.line([(x, sum_at - radius - after), (x, sum_at - radius)], end=True)
        canvas.mark("circle", cx=x, cy=sum_at, r=radius, fill="#ffffff", stroke=FLOW, stroke_width=1.25)
        canvas.text(x, sum_at, "+", size=16, colour=FLOW)

    return Shape(lane + 4, body.right, height, draw, open=True)


def branches(a: Shape, b: Shape, join: Shape) -> Shape:
    """Two shapes beside each other, named ``a`` and ``b``, whose outputs meet in ``join``."""
    ahead, after = 30, 34
    # both branches are as close to the axis as they fit
    to_a, to_b = a.right + 14, b.left + 14
    tall = ahead + max(a.height, b.height)

    def draw(canvas: Canvas, x: float, y: float) -> None:
        below = y + tall
        for name, branch, side, distance in (("a", a, -1, to_a), ("b", b, 1, to_b)):
            at, inlet = x + side * distance, x + side * min(distance, join.left - 16)
            canvas.line([(x, y), (x, y + 8), (at, y + 8), (at, y + ahead)], end=not branch.open)
            branch.draw(canvas, at, y + ahead)
            outlet = [(at, y + ahead + branch.height), (at, below + 12), (inlet, below + 12), (inlet, below + after)]
            canvas.line(outlet, end=True)
            canvas.text(inlet + side * 11, below + after - 10, name)
        join.draw(canvas, x, below + after)

    return Shape(
        max(a.left + to_a, join.left), max(b.right + to_b, join.right), tall + after + join.height, draw, open=True
    )


def repeated(inner: Shape, times: int) -> Shape:
    """A bracket at the right that says that ``inner`` is repeated ``times`` times."""
    if times == 1:
        return inner
    label, colour = f"×{times}", "#9333ea"

    def draw(canvas: Canvas, x: float, y: float) -> None:
        inner.draw(canvas, x, y)
        edge, bottom = x + inner.right + 20, y + inner.height
        canvas.line([(edge - 9, y), (edge, y), (edge, bottom), (edge - 9, bottom)], stroke=colour, stroke_width=2.5)
        canvas.text(edge + 9, (y + bottom) / 2, label, size=18, bold=True, colour=colour, anchor="start")

    return Shape(inner.left, inner.right + 34 + text_width(label, 18, True), inner.height, draw, inner.open)

"""SVG drawings of block diagrams, made of shapes that stack along a vertical line.

A shape is attached to a vertical line, its axis: data enters at the top of the axis and leaves at its bottom.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree
from xml.sax.saxutils import escape

INK, FAINT, FLOW, FRAME = "#1f2937", "#6b7280", "#475569", "#cbd5e1"
COLORS = {  # fill, edge
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


def _towards(corner: tuple[float, float], other: tuple[float, float], distance: float = 7) -> tuple[float, float]:
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = (dx * dx + dy * dy) ** 0.5
    share = min(distance, length / 2) / length if length else 0.0
    return corner[0] + dx * share, corner[1] + dy * share


class Shape:
    """Marks in the order they are painted. Lengths are pixels; the origin is where the axis enters.

    ``left`` and ``right`` are what it extends to either side of the axis. ``open``: it begins with a line, not with an
    edge, so a line that leads to it has no arrowhead.
    """

    def __init__(self, left: float, right: float, height: float, *, open: bool = False) -> None:
        self.left, self.right, self.height, self.open = left, right, height, open
        self.group = ElementTree.Element("g")

    def place(self, shape: Shape, x: float, y: float) -> None:
        """Paint a shape with its axis entering at ``x``, ``y``."""
        group = copy.deepcopy(shape.group)
        group.set("transform", f"translate({x:.1f} {y:.1f})")
        self.group.append(group)

    def mark(self, tag: str, **attributes: object) -> ElementTree.Element:
        """Add an element; ``stroke_width=2`` is the attribute ``stroke-width="2"``."""
        element = ElementTree.SubElement(self.group, tag)
        for name, value in attributes.items():
            element.set(name.replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else str(value))
        return element

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: float = 8
    ) -> ElementTree.Element:
        """A rectangle with round corners; ``x`` and ``y`` are its upper left corner."""
        look = {"fill": fill, "stroke": stroke, "stroke_width": 1.25}
        return self.mark("rect", x=x, y=y, width=width, height=height, rx=radius, **look)

    def line(self, *points: tuple[float, float], start: bool = False, end: bool = False, **look: object) -> None:
        """A path with rounded corners. ``start``, ``end``: whether it has an arrowhead there."""
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for before, corner, after in zip(points, points[1:], points[2:]):
            a, b = _towards(corner, before), _towards(corner, after)
            path += f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        path += f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"
        heads = {name: "url(#arrow)" for name, has in (("marker_start", start), ("marker_end", end)) if has}
        self.mark("path", d=path, **{"fill": "none", "stroke": FLOW, "stroke_width": 1.5, **look, **heads})

    def text(self, x: float, y: float, text: str, *, size: float = 11, bold: bool = False, **look: object) -> None:
        """``y`` is the middle of the line."""
        weight = {"font_weight": 600} if bold else {}
        usual = {"fill": INK, "text_anchor": "middle", **weight}
        self.mark("text", x=x, y=y + size * 0.35, font_size=size, **{**usual, **look}).text = text


def document(shape: Shape, title: str) -> str:
    """The file of a shape, whose axis is its left edge."""
    width, height = f"{shape.right:.0f}", f"{shape.height:.0f}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="{FONT}" role="img">\n<title>{escape(title)}</title>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" '
        f'orient="auto-start-reverse"><path d="M0 0.6L8 4L0 7.4z" fill="{FLOW}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
    )
    ElementTree.indent(shape.group, "")
    return head + ElementTree.tostring(shape.group, encoding="unicode") + "\n</svg>\n"


def column(shapes: Sequence[Shape], gap: float = GAP, *, labels: Sequence[str] = (), flow: bool = True) -> Shape:
    """Shapes below each other. ``flow``: with an arrow from each to the next; ``labels`` are those of the arrows."""
    height = sum(shape.height for shape in shapes) + gap * (len(shapes) - 1)
    found = Shape(max(s.left for s in shapes), max(s.right for s in shapes), height, open=shapes[0].open)
    y = 0.0
    for index, shape in enumerate(shapes):
        if index and gap and flow:
            found.line((0, y - gap), (0, y), end=not shape.open)
        if 0 < index <= len(labels):
            found.text(9, y - gap / 2, labels[index - 1], text_anchor="start")
        found.place(shape, 0, y)
        y += shape.height + gap
    return found


def box(title: str, lines: Sequence[str] = (), color: str = "plain", *, least: float = 0, small: bool = False) -> Shape:
    """A block without inner blocks, at least ``least`` pixels wide."""
    size, padding, head = (11, 10, 22) if small else (13, 14, 32)
    half = max(text_width(title, size, True) + 2 * padding, _width(lines) + 2 * padding, least) / 2
    found = Shape(half, half, head + 15 * len(lines))
    found.rectangle(-half, 0, 2 * half, found.height, *COLORS[color], radius=11 if small else 8)
    found.text(0, head / 2, title, size=size, bold=True)
    for index, line in enumerate(lines):
        found.text(0, head + 2 + 15 * index, line, fill=FAINT)
    return found


def _width(lines: Sequence[str], bold: bool = False) -> float:
    return max((text_width(line, 11, bold) for line in lines), default=0.0)


def with_state(
    shapes: Sequence[Shape], lines: Sequence[str], writes: Mapping[int, bool], labels: Sequence[str] = ()
) -> Shape:
    """Shapes below each other and, to their right, a cylinder: the state that some of them read.

    ``lines`` describe the state. ``writes``: the indices of the shapes that read it, and whether they write it, too.
    """
    inner = column(shapes, labels=labels)
    left, width = inner.right + 26, _width(lines, bold=True) + 20
    found = Shape(inner.left, left + width, inner.height, open=inner.open)
    tall = max(inner.height, 24 + 14 * len(lines))  # it may stand out above and below a low shape
    lid, half, top = min(7.0, tall / 5), width / 2, (inner.height - tall) / 2
    fill, edge = COLORS["state"]
    look = {"fill": fill, "stroke": edge, "stroke_width": 1.25}
    wall = f"v{tall - 2 * lid:.1f}a{half:.1f} {lid:.1f} 0 0 0 {width:.1f} 0v{2 * lid - tall:.1f}"
    found.mark("path", d=f"M{left:.1f} {top + lid:.1f}{wall}", **look)
    found.mark("ellipse", cx=left + half, cy=top + lid, rx=half, ry=lid, **look)
    for index, line in enumerate(lines):
        y = inner.height / 2 + 5 + 14 * (index - (len(lines) - 1) / 2)
        found.text(left + half, y, line, bold=index == 0, fill=FAINT if index else INK)
    found.place(inner, 0, 0)
    y = 0.0
    for index, shape in enumerate(shapes):
        if index in writes:
            middle = y + shape.height / 2
            found.line((shape.right, middle), (left, middle), start=True, end=writes[index])
        y += shape.height + GAP
    return found


def container(
    inner: Shape, label: str, note: str = "", *, dashed: bool = False, fill: str = "#ffffff", flow: bool = True
) -> Shape:
    """A labeled frame. ``flow``: data enters and leaves along the axis."""
    padding, top, bottom = 16, 40, 18
    label_width = text_width(label, 12, True) + text_width(note, 11) + 30
    # the label stands left of the incoming line, which would cross it
    left = max(inner.left + padding, label_width if flow else 0)
    found = Shape(left, max(inner.right + padding, label_width - left, 24), inner.height + top + bottom)
    frame = found.rectangle(-left, 0, left + found.right, found.height, fill, FRAME, radius=12)
    if dashed:
        frame.set("stroke-dasharray", "5 4")
    found.text(14 - left, 17, label, size=12, bold=True, text_anchor="start")
    found.text(22 - left + text_width(label, 12, True), 17, note, fill=FAINT, text_anchor="start")
    if flow:
        found.line((0, 0), (0, top), end=not inner.open)
        found.line((0, found.height - bottom), (0, found.height))
    found.place(inner, 0, top)
    return found


def residual(body: Shape) -> Shape:
    """A residual connection around ``body``, with the sum below it."""
    ahead, after, radius = 26, 16, 8
    lane = body.left + 18
    found = Shape(lane + 4, body.right, ahead + body.height + after + 2 * radius, open=True)
    sum_at = found.height - radius
    found.line((0, 0), (0, ahead), end=not body.open)
    found.line((0, 6), (-lane, 6), (-lane, sum_at), (-radius, sum_at), end=True)
    found.place(body, 0, ahead)
    found.line((0, ahead + body.height), (0, sum_at - radius), end=True)
    found.mark("circle", cx=0, cy=sum_at, r=radius, fill="#ffffff", stroke=FLOW, stroke_width=1.25)
    found.text(0, sum_at, "+", size=16, fill=FLOW)
    return found


def branches(shapes: Sequence[Shape], join: Shape) -> Shape:
    """Shapes beside each other, named ``a``, ``b``, ..., whose outputs meet in ``join``."""
    ahead, after = 30, 34
    below = ahead + max(shape.height for shape in shapes)
    # all branches are as close to the axis as they fit, half of them at each side
    half = len(shapes) // 2
    placed: list[tuple[float, int, int]] = []  # horizontal position, side, number at this side
    for side, row in ((-1, shapes[:half][::-1]), (1, shapes[half:])):
        edge = 14.0
        for number, shape in enumerate(row):
            placed.append((side * (edge + (shape.right if side < 0 else shape.left)), side, number))
            edge += shape.left + shape.right + 28
    placed[:half] = placed[:half][::-1]
    found = Shape(
        max(shapes[0].left - placed[0][0], join.left),
        max(shapes[-1].right + placed[-1][0], join.right),
        below + after + join.height,
        open=True,
    )
    for name, shape, (at, side, number) in zip(string.ascii_lowercase, shapes, placed):
        count = half if side < 0 else len(shapes) - half
        inlet = side * min(abs(at), (join.left - 16) * (number + 1) / count)
        turn = below + 12 + 10 * number / count
        found.line((0, 0), (0, 8), (at, 8), (at, ahead), end=not shape.open)
        found.place(shape, at, ahead)
        found.line((at, ahead + shape.height), (at, turn), (inlet, turn), (inlet, below + after), end=True)
        found.text(inlet + 11 * side, below + after - 10, name)
    found.place(join, 0, below + after)
    return found


def repeated(inner: Shape, times: int) -> Shape:
    """A bracket at the right that says that ``inner`` is repeated ``times`` times."""
    if times == 1:
        return inner
    label, color, edge = f"×{times}", "#9333ea", inner.right + 20
    found = Shape(inner.left, edge + 14 + text_width(label, 18, True), inner.height, open=inner.open)
    found.place(inner, 0, 0)
    corners = (edge - 9, 0.0), (edge, 0.0), (edge, inner.height), (edge - 9, inner.height)
    found.line(*corners, stroke=color, stroke_width=2.5)
    found.text(edge + 9, inner.height / 2, label, size=18, bold=True, fill=color, text_anchor="start")
    return found

"""A small SVG writer: just the marks that the diagram is drawn with, and how wide text is."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

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
        """A rectangle from its upper left corner, with round corners."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{thickness}"{dash}/>'
        )

    def circle(self, x: float, y: float, radius: float, *, fill: str, stroke: str) -> None:
        """A circle around ``x``, ``y``."""
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
        dashed: bool = False,
        bend: float = 7,
    ) -> None:
        """A path through ``points`` with rounded corners, and an arrowhead at its end (or at both ends)."""
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for before, corner, after in zip(points, points[1:], points[2:]):
            a, b = _towards(corner, before, bend), _towards(corner, after, bend)
            path += f"L{a[0]:.1f} {a[1]:.1f}Q{corner[0]:.1f} {corner[1]:.1f} {b[0]:.1f} {b[1]:.1f}"
        path += f"L{points[-1][0]:.1f} {points[-1][1]:.1f}"
        ends = (' marker-end="url(#arrow)"' if arrow or both else "") + (' marker-start="url(#arrow)"' if both else "")
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.marks.append(f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{thickness}"{dash}{ends}/>')

    def cylinder(self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str) -> None:
        """What is stored: a drum, ``height`` tall with its lids."""
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

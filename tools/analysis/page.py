"""The page of an analysis: one HTML file with Plotly and the data inside, which loads nothing."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import from_extra
from .figures import MAX_LINES, TEXTS, Figure, Line, branch_norms, figures, first_rows, is_wide
from .recording import QUANTITIES

COUNTED = "Layers and heads are counted from 0, the layer after the input."
DASHES = ("solid", "dash", "dot", "dashdot")
SHADES = 16
"""Colors of the text."""
AROUND = 12
"""Tokens shown before and after the one under the cursor."""
FONT = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
AXIS = {"gridcolor": "#e5e7eb", "zeroline": False, "zerolinecolor": "#9ca3af", "automargin": True}
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    # by default a figure, and the text with it, can be uploaded to a server of Plotly
    "showSendToCloud": False,
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""Forbids the page to load anything."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 1180px; margin: 0 auto;
  padding: 0 1.25rem 4rem; }
h1 { margin: 1.5rem 0 0; } h2 { margin: 0 0 .25rem; } p { max-width: 95ch; margin: .4rem 0; }
section { padding-top: 3.5rem; } a { color: #0072b2; }
nav { position: sticky; top: 0; z-index: 2; background: #fff; padding: .5rem 0; border-bottom: 1px solid #e5e7eb; }
nav a { margin-right: 1rem; white-space: nowrap; }
.verdict { list-style: none; padding: 0; font-weight: 600; }
.good::before { content: "✓ "; color: #00795a; } .bad::before { content: "✗ "; color: #b84a00; }
.open::before { content: "– "; }
table { border-collapse: collapse; margin: .75rem 0; }
th, td { padding: .25rem 1.5rem .25rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; border-top: 1px solid #e5e7eb; }
.reading { font: 13px/1.7 ui-monospace, monospace; max-height: 17rem; overflow: auto; border: 1px solid #e5e7eb;
  padding: .5rem; }
.reading, code { white-space: pre-wrap; overflow-wrap: anywhere; }
.reading span:target { outline: 3px solid #d55e00; scroll-margin: 5rem; } li b { background: #fde68a; }
"""
LINKED_ZOOM = """
const plots = [...document.querySelectorAll(".along-text .plotly-graph-div")];
let busy = false;
for (const plot of plots) plot.on("plotly_relayout", async (change) => {
  if (busy || !Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
  busy = true;
  const { range, autorange } = plot.layout.xaxis;
  const shown = autorange ? { "xaxis.autorange": true } : { "xaxis.range": [...range] };
  for (const other of plots) if (other !== plot) await Plotly.relayout(other, shown);
  busy = false;
});
"""
"""Zooming in one of the figures along the text zooms them all."""


def need_plotly() -> None:
    """Raise ``UsageError`` that names the extra where Plotly is missing."""
    from_extra("plotly.graph_objects", "analyze", "--out writes a page, which")


def render(analysis: dict[str, Any]) -> str:
    """The page of an analysis, as ``analyse`` returns it with ``model`` added."""
    from plotly.colors import sample_colorscale
    from plotly.offline import get_plotlyjs

    title = html.escape(f"Memory of {analysis['model']['name']} on {analysis['text']['name']}")
    shades = "".join(
        f".s{index} {{ background: {color}; color: {'#fff' if index < SHADES * 0.6 else '#000'}; }}\n"
        for index, color in enumerate(sample_colorscale("Viridis", SHADES))
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN|Mean of empty slice")  # what is missing stays missing
        sections = {"verdict": ("Verdict", _verdict(analysis)), **dict(_figure_sections(analysis))}
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, (heading, _) in sections.items() if heading)
    body = "\n".join(f'<section id="{name}">{content}</section>' for name, (_, content) in sections.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}{shades}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>What did the memory do?</h1>
<p>{html.escape(_subject(analysis))}. Drag in a figure to zoom, double-click to see all of it again; a click on a line's
name hides the line, a double-click shows it alone. {COUNTED} All numbers are in <code>analysis.json</code>.</p>
<nav>{links}</nav>
{body}
<script>{LINKED_ZOOM}</script>
</body>
</html>
"""


def _subject(analysis: dict[str, Any]) -> str:
    model, text = analysis["model"], analysis["text"]
    first = "the first " if text["goes_on"] else ""
    rows = f", first of {text['rows']} rows" if text["rows"] > 1 else ""
    name = text["name"].replace("\\", "/").rpartition("/")[2]
    size = f"{model['parameters']:,} parameters"
    where = "" if Path(model["source"]).name == model["name"] else f" in {model['source']}"
    return f"{model['name']}{where}, {size}, on {first}{text['tokens']:,} {text['unit']}s of {name}{rows}"


# -- sections ----------------------------------------------------------------------------------------------------------


def _figure_sections(analysis: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names of sections, with their heading in the navigation, which may be empty, and their content."""
    headings = {"loss": "Loss", "recall-kept": "Recall", "drift-distance": "Weights", "gates": "Gates"}
    shown = [*figures(analysis), *([branch_norms(analysis)] if analysis["gates"] else [])]
    for figure in shown:
        heading = TEXTS[figure.name][0] if figure.is_heat_map else headings.get(figure.name, "")
        content = (
            f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.caption)}</p>"
            f'<div class="{"" if figure.log_x else "along-text"}">{_plot(analysis, figure)}</div>'
        )
        if figure.is_heat_map:
            content += (
                f"<details{' open' if figure.name == QUANTITIES[0] else ''}><summary>The text, colored by its "
                f"{heading.lower()} (mean of all heads, from low, dark, to high, bright)</summary>"
                f'<div class="reading">{_colored_text(analysis, figure.name)}</div></details>'
            )
        yield figure.name, (heading, content)
        if figure.name == QUANTITIES[-1] and analysis["peaks"]:
            yield "peaks", ("Most surprising", _peaks(analysis))


def _verdict(analysis: dict[str, Any]) -> str:
    check = analysis["check"]

    def judged(difference: dict[str, float]) -> str:
        certain = abs(difference["mean"]) > 2 * difference["error"]
        return "open" if not certain else "good" if difference["mean"] > 0 else "bad"

    marks = ["good" if check["changes"] else "bad", judged(check["writing"]), judged(check["reaching_back"])]
    items = "".join(f'<li class="{mark}">{html.escape(line)}</li>' for mark, line in zip(marks, check["verdict"]))
    rows = f"<tr><td>live</td><td>{check['live']:.4f}</td><td></td></tr>"
    for name, loss, gain in (
        ("frozen", check["frozen"], check["writing"]),
        (f"reset every {check['reset_every']:,} tokens", check["reset"], check["reaching_back"]),
    ):
        rows += f"<tr><td>{name}</td><td>{loss:.4f}</td><td>{gain['mean']:+.4f} ± {gain['error']:.4f}</td></tr>"
    return (
        f'<h2>Does it learn while reading, and does that help?</h2><ul class="verdict">{items}</ul>'
        f"<table><tr><th>memory</th><th>loss ({check['unit']})</th><th>minus live</th></tr>{rows}</table>"
        "<p>The text is read three times from the initial state: with the memory live; frozen at its initial weights; "
        "and reset to these every so many tokens. Everything else is the same. Above zero in the last column, the live "
        "memory is better. A difference counts from two standard errors, taken over stretches of the text.</p>"
    )


def _colored_text(analysis: dict[str, Any], quantity: str) -> str:
    """Each bin in the color of its rank between the 2nd and the 98th percentile; a link leads to its position."""
    text = analysis["text"]
    values = np.nanmean(np.concatenate(analysis["tokens"][quantity]["mean"]), axis=0)
    if is_wide(quantity, values):
        values = np.log(np.where(values > 0, values, np.nan))
    low, high = np.nanpercentile(values, [2, 98]) if np.isfinite(values).any() else (0, 0)
    share = np.clip((values - low) / (high - low), 0, 1) if high > low else np.full(len(values), 0.5)
    shades = np.nan_to_num(share * (SHADES - 1)).round().astype(int)
    spans = []
    for index, (excerpt, shade) in enumerate(zip(text["excerpts"], shades)):
        anchor = f' id="t{index * text["bin"]}"' if quantity == QUANTITIES[0] else ""
        spans.append(f'<span{anchor} class="s{shade}">{_visible(excerpt, "↵" + chr(10)) or "·"}</span>')
    return "".join(spans)


def _peaks(analysis: dict[str, Any]) -> str:
    width = analysis["text"]["bin"]
    items = "".join(
        f'<li><a href="#t{peak["position"] // width * width}">{peak["position"]:,}</a>, surprise '
        f"{peak['surprise']:.3g}: <code>{_visible(peak['before'])}<b>{_visible(peak['token']) or '·'}</b>"
        f"{_visible(peak['after'])}</code></li>"
        for peak in analysis["peaks"]
    )
    about = "<p>Position and mean surprise over all memories and heads.</p>"
    return f"<h2>The most surprising tokens</h2>{about}<ol>{items}</ol>"


def _visible(text: str, newline: str = "↵") -> str:
    """``text`` as HTML, with pictures for control characters."""
    text = text.replace("\n", "\0").replace("\t", "⇥")
    shown = "".join(letter if letter.isprintable() or letter == "\0" else "·" for letter in text)
    return html.escape(shown).replace("\0", newline)


# -- figures -----------------------------------------------------------------------------------------------------------


def _plot(analysis: dict[str, Any], figure: Figure) -> str:
    """The lines of a figure, and above them its heat map, if it has one, as HTML."""
    from plotly.graph_objects import Figure as Plot

    many = len(figure.lines) > MAX_LINES
    plot = Plot(
        layout={
            "template": "none",
            "font": {"family": FONT, "size": 13, "color": "#374151"},
            "margin": {"l": 70, "r": 20, "t": 40, "b": 50},
            "height": 360 + 22 * (min(len(figure.lines), MAX_LINES) // 4),
            "hovermode": "x unified",
            "hoversubplots": "axis",
            "hoverlabel": {"namelength": -1},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
            "showlegend": True,
            "xaxis": {**AXIS, "title": figure.x_label, "hoverformat": ",.0f"},
            "yaxis": {**AXIS, "title": figure.y_label, "zeroline": figure.zero_line, "range": figure.y_range}
            | {"type": "log" if figure.log_y else "linear", "nticks": 8},
        }
    )
    if figure.log_x:  # distances that double are as far apart as categories
        plot.update_xaxes(type="category")
    else:
        plot.update_xaxes(range=[-0.5, analysis["text"]["shown"] - 0.5])
        if len(figure.lines[0].x) == len(analysis["text"]["excerpts"]):
            plot.add_trace(_text_trace(analysis, figure.lines))
    for line in figure.lines:
        _add_line(plot, line, np.array([f"{at - 1:,}" for at in line.x]) if figure.log_x else line.x, band=not many)
    _add_memory_menu(analysis, figure, plot)
    if figure.is_heat_map:
        _add_heat_map(analysis, figure, plot)
    found: str = plot.to_html(CONFIG, include_plotlyjs=False, full_html=False, div_id=f"{figure.name}-figure")
    return found


def _add_line(plot: Any, line: Line, x: np.ndarray, *, band: bool) -> None:
    from plotly.graph_objects import Scatter

    owner = {"name": line.label, "legendgroup": line.label, "meta": line.memory, "mode": "lines"}
    hidden = {"showlegend": False, "hoverinfo": "skip"}
    style: dict[str, Any] = {"hovertemplate": "%{y:.3g}"}
    if line.reference:
        style = {"line_width": 1, "opacity": 0.45, **hidden}
    elif line.error is not None:
        style = {"customdata": line.error, "hovertemplate": "%{y:.3g} ± %{customdata:.2g}"}
    elif line.maximum is not None:
        style = {"customdata": line.maximum, "hovertemplate": "%{y:.3g}, maximum %{customdata:.3g}"}
    if line.error is not None and band:
        real = np.isfinite(line.y) & np.isfinite(line.error)
        high, low = (line.y + line.error)[real], (line.y - line.error)[real]
        edges = {"x": np.concatenate([x[real], x[real][::-1]]), "y": np.concatenate([high, low[::-1]])}
        fill = {"fill": "toself", "line_width": 0, "fillcolor": line.color, "opacity": 0.18}
        plot.add_trace(Scatter(**edges, **fill, **owner, **hidden))
    dash = DASHES[line.dash]
    plot.add_trace(Scatter(**_points(x, line.y), line_color=line.color, line_dash=dash, **owner, **style))


def _points(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The points of a line, as small as they can be written."""
    y = np.asarray(y, np.float32)
    if x.dtype.kind == "U" or len(x) < 2 or np.ptp(np.diff(x)) > 0:
        return {"x": x, "y": y}
    return {"x0": x[0], "dx": x[1] - x[0], "y": y}


def _text_trace(analysis: dict[str, Any], lines: list[Line]) -> Any:
    """An invisible line whose values under the cursor are the text."""
    from plotly.graph_objects import Scatter

    text = analysis["text"]
    parts = [_visible(excerpt) or "·" for excerpt in text["excerpts"]]
    around, gap = (AROUND, "") if text["bin"] == 1 else (1, " ")
    contexts = [
        f"{gap.join(parts[max(at - around, 0) : at])}<b> {part} </b>{gap.join(parts[at + 1 : at + 1 + around])}"
        for at, part in enumerate(parts)
    ]
    y = np.nanmean(np.stack([line.y for line in lines]), axis=0)
    return Scatter(
        **_points(lines[0].x, y), mode="lines", opacity=0, name="text", showlegend=False, customdata=contexts,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _add_heat_map(analysis: dict[str, Any], figure: Figure, plot: Any) -> None:
    """The heat map above the lines, over one axis, and beside the lines the distribution of their values."""
    from plotly.graph_objects import Bar, Heatmap

    table, starts = figure.table.astype(float), first_rows(analysis)
    if figure.log_y:
        table = np.log10(np.where(table > 0, table, np.nan))
    rows = min(len(table), 32)
    bottom = 1 - min(0.25 + 0.02 * rows, 0.6)
    bar = {"x": 0.88, "y": bottom + 0.04, "yanchor": "bottom", "len": 1 - bottom - 0.04, "thickness": 14}
    if figure.log_y and np.isfinite(table).any():
        powers = np.arange(np.floor(np.nanmin(table)), np.ceil(np.nanmax(table)) + 1)
        bar |= {"tickvals": powers, "ticktext": [f"{10.0**power:g}" for power in powers]}
    x = figure.lines[0].x
    # the lines below have the values under the cursor
    trace = partial(
        Heatmap, x0=x[0], dx=x[1] - x[0], yaxis="y2", colorscale="Viridis", hoverinfo="skip", name="all heads"
    )
    scales = len(plot.data), len(plot.data) + 1
    plot.add_trace(trace(z=table.astype(np.float32), colorbar=bar))
    if len(table) > 1:
        low, high = np.nanmin(table, 1, keepdims=True), np.nanmax(table, 1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = ((table - low) / (high - low)).astype(np.float32)
        own = {**bar, "tickvals": [0, 1], "ticktext": ["lowest", "highest"]}
        plot.add_trace(trace(z=shares, zmin=0, zmax=1, colorbar=own, visible=False))
        choices = [("one scale", [True, False]), ("one scale per head", [False, True])]
        _add_menu(plot, [(label, [{"visible": visible}, {}, scales]) for label, visible in choices], x=1)
    values = np.concatenate([line.y for line in figure.lines])
    values = values[np.isfinite(values) & ((values > 0) | (not figure.log_y))]
    least, most = (values.min(), values.max()) if len(values) else (1.0, 2.0)
    space = np.geomspace if figure.log_y else np.linspace
    edges = space(least, most if most > least else least + (abs(least) or 1), 41)
    shares = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
    plot.add_trace(
        Bar(
            x=shares, y=(edges[1:] + edges[:-1]) / 2, width=np.diff(edges), base=0, orientation="h", xaxis="x2",
            marker_color="#6b7280", hoverinfo="skip", showlegend=False,
        )
    )  # fmt: skip
    plot.update_layout(
        height=plot.layout.height + 110 + 16 * rows,
        xaxis={"domain": [0, 0.87], "anchor": "y"},
        xaxis2={**AXIS, "domain": [0.885, 1], "anchor": "y", "title": "share"}
        | {"tickvals": [max(shares)], "ticktext": [f"{max(shares):.2g}%"]},
        yaxis={"domain": [0, bottom]},
        yaxis2={**AXIS, "domain": [bottom + 0.04, 1], "range": [len(table) - 0.5, -0.5]}
        | {"tickvals": (starts[1:] + starts[:-1] - 1) / 2}
        | {"ticktext": [memory["label"] for memory in analysis["memories"]]},
    )
    for start in starts[1:-1]:
        plot.add_hline(start - 0.5, yref="y2", line={"color": "white", "width": 2})


def _add_memory_menu(analysis: dict[str, Any], figure: Figure, plot: Any) -> None:
    """Choose the memory whose lines are shown."""
    owned = [index for index, trace in enumerate(plot.data) if trace.meta is not None]
    if len({plot.data[index].meta for index in owned}) < 2:
        return
    many, starts = len({line.label for line in figure.lines}) > MAX_LINES, first_rows(analysis)
    buttons = []
    for chosen, label in enumerate(["all memories", *(memory["label"] for memory in analysis["memories"])]):
        listed = not many or chosen > 0
        layout: dict[str, Any] = {"hovermode": "x unified" if listed else "closest", "showlegend": listed}
        if figure.is_heat_map:
            first, last = (starts[chosen - 1], starts[chosen]) if chosen else (0, starts[-1])
            layout["yaxis2.range"] = [last - 0.5, first - 0.5]
        visible = [chosen in (0, plot.data[index].meta + 1) for index in owned]
        buttons.append((label, [{"visible": visible}, layout, owned]))
    _add_menu(plot, buttons, x=0)
    if many:
        plot.update_layout(hovermode="closest", showlegend=False)


def _add_menu(plot: Any, buttons: list[tuple[str, list[Any]]], x: float) -> None:
    menu = {
        "buttons": [{"label": label, "method": "update", "args": args} for label, args in buttons],
        "x": x, "xanchor": "left" if x == 0 else "right", "y": 1, "yanchor": "bottom", "pad": {"b": 6},
    }  # fmt: skip
    plot.update_layout(updatemenus=[*plot.layout.updatemenus, menu], margin_t=60)

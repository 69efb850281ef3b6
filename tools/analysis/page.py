"""The page of an analysis: one HTML file with Plotly and the data inside, which loads nothing."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..extras import from_extra
from .figures import (
    QUANTITY,
    HeatMap,
    Line,
    LineChart,
    branch_norms,
    figures,
    is_wide,
    positions,
    quantity_lines,
)
from .recording import QUANTITIES

DASHES = ("solid", "dash", "dot", "dashdot")
SHADES = 16
"""Colours of the text."""
AROUND = 12
"""Tokens shown before and after the one under the cursor."""
MAX_LINES = 24
"""Lines at most that have a legend and bands, and whose values are listed together under the cursor."""
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
        f".s{index} {{ background: {colour}; color: {'#fff' if index < SHADES * 0.6 else '#000'}; }}\n"
        for index, colour in enumerate(sample_colorscale("Viridis", SHADES))
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
name hides the line, a double-click shows it alone. All numbers are in <code>analysis.json</code>.</p>
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
    return f"{model['name']}, {size}, on {first}{text['tokens']:,} {text['unit']}s of {name}{rows}"


# -- sections ----------------------------------------------------------------------------------------------------------


def _figure_sections(analysis: dict[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names of sections, with their heading in the navigation, which may be empty, and their content."""
    headings = {"loss": "Loss", "recall-kept": "Recall", "drift-distance": "Weights", "gates": "Gates"}
    for figure in figures(analysis):
        if isinstance(figure, HeatMap):
            yield figure.name, (QUANTITY[figure.name].title, _quantity(analysis, figure))
            if figure.name == QUANTITIES[-1] and analysis["peaks"]:
                yield "peaks", ("Most surprising", _peaks(analysis))
        else:
            yield figure.name, (headings.get(figure.name, ""), _section(analysis, figure))
    if analysis["gates"]:
        norms = branch_norms(analysis)
        yield norms.name, ("", _section(analysis, norms))


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


def _section(analysis: dict[str, Any], chart: LineChart) -> str:
    caption = chart.caption
    if chart.name == "recall-kept":
        caption += _half_lives(analysis)
    if chart.name.startswith("recall"):
        caption += f" Means and standard errors (bands) are over {analysis['recall']['planted']} pairs."
    kind = "along-text" if chart.along_text else ""
    return (
        f"<h2>{html.escape(chart.title)}</h2><p>{html.escape(caption)}</p>"
        f'<div class="{kind}">{_html(_line_figure(analysis, chart), f"{chart.name}-figure")}</div>'
    )


def _half_lives(analysis: dict[str, Any]) -> str:
    lives = []
    for memory, recall in zip(analysis["memories"], analysis["recall"]["memories"]):
        for head, life in enumerate(recall["half_life"]):
            tokens = f"over {recall['distances'][-1]:,}" if life is None else f"{life:,.0f}"
            lives.append(f"{tokens} tokens ({memory['label']}, head {head})")
    return f" Half-lives: {', '.join(lives)}." if len(lives) <= MAX_LINES else ""


def _quantity(analysis: dict[str, Any], heat_map: HeatMap) -> str:
    name, text, quantity = heat_map.name, analysis["text"], QUANTITY[heat_map.name]
    values = np.concatenate(analysis["tokens"][name]["mean"])
    pooled = (
        f" A column stands for {text['bin']} tokens: its colour is their maximum, the line their mean."
        if text["bin"] > 1
        else ""
    )
    spread = f"mean {np.nanmean(values):.4g}, from {np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
    is_open = " open" if name == QUANTITIES[0] else ""
    return (
        f"<h2>{html.escape(heat_map.title)}</h2><p>{html.escape(quantity.caption + pooled)} Over all heads: {spread}; "
        "the bars at the right are the distribution of the values. The text under the cursor stands above the values."
        f'</p><div class="along-text">{_html(_quantity_figure(analysis, heat_map), f"{name}-figure")}</div>'
        f"<details{is_open}><summary>The text, coloured by its {quantity.title.lower()} (mean of all heads, from low, "
        f'dark, to high, bright)</summary><div class="reading">{_coloured_text(analysis, name)}</div></details>'
    )


def _coloured_text(analysis: dict[str, Any], quantity: str) -> str:
    """Each bin in the colour of its rank between the 2nd and the 98th percentile; a link leads to its position."""
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


def _html(figure: Any, name: str) -> str:
    from plotly.io import to_html

    found: str = to_html(figure, CONFIG, include_plotlyjs=False, full_html=False, div_id=name)
    return found


def _figure(**layout: Any) -> Any:
    from plotly.graph_objects import Figure

    return Figure(
        layout={
            "template": "none",
            "font": {"family": FONT, "size": 13, "color": "#374151"},
            "margin": {"l": 70, "r": 20, "t": 40, "b": 50},
            "hovermode": "x unified",
            "hoverlabel": {"namelength": -1},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
            **layout,
        }
    )


def _line_figure(analysis: dict[str, Any], chart: LineChart) -> Any:
    figure = _figure(height=360 + _legend_height(chart.lines), showlegend=True)
    lines = chart.lines
    if chart.along_text and len(lines[0].x) == len(analysis["text"]["excerpts"]):
        figure.add_trace(_text_trace(analysis, lines))
    if chart.log_x:  # distances that double are as far apart as categories
        lines = [line._replace(x=np.array([f"{at - 1:,}" for at in line.x])) for line in lines]
        figure.update_xaxes(type="category")
    for line in lines:
        if line.error is not None and len(chart.lines) <= MAX_LINES:
            figure.add_trace(_band(line))
        figure.add_trace(_line_trace(line))
    figure.update_xaxes(AXIS, title=chart.x_label, hoverformat=",.0f")
    if chart.along_text:
        figure.update_xaxes(range=_range(analysis))
    figure.update_yaxes(AXIS, title=chart.y_label, zeroline=chart.zero_line, range=chart.y_range)
    if chart.log_y:
        figure.update_yaxes(type="log")
    _add_memory_menu(analysis, figure)
    return figure


def _quantity_figure(analysis: dict[str, Any], heat_map: HeatMap) -> Any:
    """The heat map above the lines of the same heads, over one axis; beside the lines the distribution of values."""
    lines = quantity_lines(analysis, heat_map.name)
    rows = min(len(heat_map.table), 32)
    figure = _figure(height=470 + 16 * rows + _legend_height(lines), hoversubplots="axis")
    height = min(0.25 + 0.02 * rows, 0.6)
    figure.add_traces(list(_heat_traces(heat_map, 1 - height)))
    figure.add_trace(_text_trace(analysis, lines).update(yaxis="y2"))
    figure.add_traces([_line_trace(line).update(yaxis="y2") for line in lines])
    bars = _histogram(np.concatenate([line.y for line in lines]), heat_map.log)
    figure.add_trace(bars)
    top = max(bars.x)
    starts = np.cumsum([0, *heat_map.sizes])
    labels = [memory["label"] for memory in analysis["memories"]]
    figure.update_layout(
        xaxis={"domain": [0, 0.87], "anchor": "y2", "title": heat_map.x_label, "hoverformat": ",.0f"}
        | {"range": _range(analysis)},
        xaxis2={"domain": [0.885, 1], "anchor": "y2", "title": "share"}
        | {"tickvals": [top], "ticktext": [f"{top:.2g}%"]},
        yaxis={
            "domain": [1 - height + 0.04, 1],
            "range": [len(heat_map.table) - 0.5, -0.5],
            "tickvals": (starts[1:] + starts[:-1] - 1) / 2,
            "ticktext": labels,
        },
        yaxis2={
            "domain": [0, 1 - height],
            "title": heat_map.colour_label,
            "type": "log" if heat_map.log else "linear",
            "nticks": 8,
        },
        shapes=[
            {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": start - 0.5, "y1": start - 0.5}
            | {"line": {"color": "white", "width": 2}}
            for start in starts[1:-1]
        ],
    )
    figure.update_xaxes(AXIS)
    figure.update_yaxes(AXIS)
    _add_memory_menu(analysis, figure, starts.tolist())
    if len(heat_map.table) > 1:
        scales = [("one scale", [True, False]), ("one scale per head", [False, True])]
        _add_menu(figure, [(label, [{"visible": visible}, {}, [0, 1]]) for label, visible in scales], x=1)
    return figure


def _histogram(values: np.ndarray, log: bool) -> Any:
    """Horizontal bars of the shares of the values, in percent."""
    from plotly.graph_objects import Bar

    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 2.0)
    space = np.geomspace if log else np.linspace
    edges = space(low, high if high > low else low + (abs(low) or 1), 41)
    return Bar(
        x=100 * np.histogram(values, edges)[0] / max(len(values), 1), y=(edges[1:] + edges[:-1]) / 2,
        width=np.diff(edges), base=0, orientation="h", xaxis="x2", yaxis="y2", marker_color="#6b7280",
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def _heat_traces(heat_map: HeatMap, bottom: float) -> Iterator[Any]:
    """The table in one scale of colours, and in a scale for each row, which a menu chooses."""
    from plotly.graph_objects import Heatmap

    table = heat_map.table.astype(float)
    if heat_map.log:
        table = np.log10(np.where(table > 0, table, np.nan))
    width = heat_map.time / table.shape[1]
    # the lines below have the values under the cursor
    trace = partial(Heatmap, x0=(width - 1) / 2, dx=width, colorscale="Viridis", hoverinfo="skip", name="all heads")
    bar = {"x": 0.88, "y": bottom + 0.04, "yanchor": "bottom", "len": 1 - bottom - 0.04, "thickness": 14}
    if heat_map.log and np.isfinite(table).any():
        powers = np.arange(np.floor(np.nanmin(table)), np.ceil(np.nanmax(table)) + 1)
        bar |= {"tickvals": powers, "ticktext": [f"{10.0**power:g}" for power in powers]}
    yield trace(z=table.astype(np.float32), colorbar=bar)
    if len(table) > 1:
        low, high = np.nanmin(table, 1, keepdims=True), np.nanmax(table, 1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = ((table - low) / (high - low)).astype(np.float32)
        own = {**bar, "tickvals": [0, 1], "ticktext": ["lowest", "highest"]}
        yield trace(z=shares, zmin=0, zmax=1, colorbar=own, visible=False)


def _line_trace(line: Line) -> Any:
    from plotly.graph_objects import Scatter

    thin = {"opacity": 0.45, "showlegend": False, "hoverinfo": "skip"} if line.reference else {}
    maximum = {} if line.maximum is None else {"customdata": line.maximum}
    error = {} if line.error is None else {"customdata": line.error}
    suffix = " ± %{customdata:.2g}" if error else ", maximum %{customdata:.3g}" if maximum else ""
    return Scatter(
        **_points(line.x, line.y), mode="lines", name=line.label, legendgroup=line.label, meta=line.memory,
        line={"color": line.colour, "dash": DASHES[line.dash], "width": 1 if line.reference else 1.7},
        hovertemplate=None if thin else f"%{{y:.3g}}{suffix}", **thin, **maximum, **error,
    )  # fmt: skip


def _points(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The points of a line, as small as they can be written."""
    y = np.asarray(y, np.float32)
    if x.dtype.kind == "U" or len(x) < 2 or np.ptp(np.diff(x)) > 0:
        return {"x": x, "y": y}
    return {"x0": x[0], "dx": x[1] - x[0], "y": y}


def _legend_height(lines: list[Line]) -> int:
    return 22 * (min(len(lines), MAX_LINES) // 4)


def _range(analysis: dict[str, Any]) -> list[float]:
    return [-0.5, analysis["text"]["shown"] - 0.5]


def _band(line: Line) -> Any:
    from plotly.graph_objects import Scatter

    assert line.error is not None
    real = np.isfinite(line.y) & np.isfinite(line.error)
    x, low, high = line.x[real], (line.y - line.error)[real], (line.y + line.error)[real]
    return Scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself", mode="lines",
        line={"width": 0}, fillcolor=line.colour, opacity=0.18, name=line.label, legendgroup=line.label,
        meta=line.memory, showlegend=False, hoverinfo="skip",
    )  # fmt: skip


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
        **_points(positions(analysis), y), mode="lines", opacity=0, name="text", showlegend=False, customdata=contexts,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _add_memory_menu(analysis: dict[str, Any], figure: Any, starts: list[int] | None = None) -> None:
    """Choose the memory whose lines are shown. ``starts``: the first row of each memory in a heat map."""
    owned = [index for index, trace in enumerate(figure.data) if trace.meta is not None]
    memories = [figure.data[index].meta for index in owned]
    if len(set(memories)) < 2:
        return
    many = len({figure.data[index].name for index in owned}) > MAX_LINES
    buttons = []
    for chosen, label in [
        (None, "all memories"),
        *((i, memory["label"]) for i, memory in enumerate(analysis["memories"])),
    ]:
        listed = not many or chosen is not None
        layout: dict[str, Any] = {"hovermode": "x unified" if listed else "closest", "showlegend": listed}
        if starts is not None:
            first, last = (0, starts[-1]) if chosen is None else (starts[chosen], starts[chosen + 1])
            layout["yaxis.range"] = [last - 0.5, first - 0.5]
        shown = [chosen is None or memory == chosen for memory in memories]
        buttons.append((label, [{"visible": shown}, layout, owned]))
    _add_menu(figure, buttons, x=0)
    if many:
        figure.update_layout(hovermode="closest", showlegend=False)


def _add_menu(figure: Any, buttons: list[tuple[str, list[Any]]], x: float) -> None:
    menu = {
        "buttons": [{"label": label, "method": "update", "args": args} for label, args in buttons],
        "x": x, "xanchor": "left" if x == 0 else "right", "y": 1, "yanchor": "bottom", "pad": {"b": 6},
    }  # fmt: skip
    figure.update_layout(updatemenus=[*figure.layout.updatemenus, menu], margin_t=60)

"""The page in a real browser: it draws the data of the analysis, loads nothing, and shows the text as text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titans_build as tb
from titans_build.tools.analysis import recording
from titans_build.tools.analysis.analysis import Plan, analyse
from titans_build.tools.analysis.page import render
from titans_build.tools.analysis.sample import from_file
from titans_build.tools.inference.tokenizer import ByteTokenizer

RECIPE = """
version: 1
dim: 24
vocab: 256
layers:
  mag: [{type: gate, branches: [{type: attention, window: 8}, {type: memory, heads: 3, expansion: 2, chunk: 4}]}, ffn]
  mac: [{type: context, segment: 32, persistent: 2, memory: {type: memory, heads: 2, chunk: 8}}, ffn]
stack: [mag, mac]
"""
TEXT = 'a "memory" that <b>learns</b> é & reads </script><script>alert(1)</script><!-- \\u2028 \u2028 and goes on\n' * 9
LENGTH = 350
FIGURES = [
    "loss", "saved", "surprise", "error", "step", "momentum", "forgetting", "recall-kept", "recall-cosine",
    "recall-relative_error", "drift-distance", "drift-norm", "gates", "branches", "norms",
]  # fmt: skip


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Any]]:
    model = tb.build(tb.load_recipe(RECIPE), seed=0)
    path = tmp_path_factory.mktemp("text") / "hostile <name>.txt"
    path.write_text(TEXT, encoding="utf-8")
    sample = from_file(str(path), ByteTokenizer(), 256, LENGTH)

    def make() -> dict[str, Any]:
        found = analyse(model, sample, Plan(model, sample, 64), pairs=2)
        return {"model": {"name": "small & <b>", "source": "runs/<i>", "parameters": 1234, "layers": 2}, **found}

    return make


@pytest.fixture(scope="module")
def numbers(analysis: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return analysis()


@pytest.fixture(scope="module")
def page(numbers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render(numbers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(browser: Any, page: Path) -> Any:
    browser.window(1200, 900)
    browser.open(page)
    return browser


def traces(opened: Any, figure: str, kind: str) -> dict[str, list[float]]:
    """Values of the visible traces by name, as the browser has decoded them."""
    found: dict[str, list[float]] = opened.run(
        f"Object.fromEntries(document.getElementById('{figure}-figure')._fullData"
        ".filter(trace => trace.visible === true && trace.hoverinfo !== 'skip' && trace.name !== 'text')"
        f".map(trace => [trace.name, Array.from(trace.{kind})]))"
    )
    return found


def heat_map(opened: Any) -> np.ndarray:
    """The table of the heat map that is shown for the surprise."""
    script = (
        "document.getElementById('surprise-figure')._fullData"
        ".filter(trace => trace.type === 'heatmap' && trace.visible).map(trace => Array.from(trace.z, row => [...row]))"
    )
    (table,) = opened.run(script)
    return np.array(table)


def test_every_figure_is_drawn_without_errors_and_requests(opened: Any, tmp_path: Path) -> None:
    assert opened.run("[...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.id)") == [
        f"{name}-figure" for name in FIGURES
    ]
    assert opened.errors == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.run("location.href")]
    titles = opened.run(
        "[...document.querySelectorAll('.js-plotly-plot')].map(plot => "
        "[plot.querySelector('.xtitle'), plot.querySelector('.ytitle, .y2title')].every(title => title.textContent))"
    )
    assert titles == [True] * len(FIGURES)
    assert opened.run("document.querySelectorAll('h2').length") == len(FIGURES) + 2  # the verdict and the peaks
    # a figure of a private text has no button that uploads it
    buttons = opened.run("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
    assert "Zoom" in buttons and not any("hare" in button or "loud" in button for button in buttons)
    assert opened.screenshot(tmp_path / "page.png")[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_figures_show_the_data_of_the_analysis(opened: Any, numbers: dict[str, Any]) -> None:
    heads = ["layer 0, head 0", "layer 0, head 1", "layer 0, head 2", "layer 1, head 0", "layer 1, head 1"]
    expected = {
        "loss": list(numbers["check"]["losses"].values()),
        "surprise": np.concatenate(numbers["tokens"]["surprise"]["mean"]),
        "forgetting": np.concatenate(numbers["tokens"]["forgetting"]["mean"]),
        "recall-cosine": np.concatenate([recall["cosine"] for recall in numbers["recall"]["memories"]]),
        "drift-norm": np.concatenate([drift["norm"] for drift in numbers["drift"]]),
        "gates": [gate["gate"] for gate in numbers["gates"]],
        "branches": [gate["share"] for gate in numbers["gates"]],
    }
    for figure, lines in expected.items():
        shown = traces(opened, figure, "y")
        assert len(shown) == len(lines), figure
        for drawn, line in zip(shown.values(), lines):
            np.testing.assert_allclose(drawn, line, rtol=1e-5, err_msg=figure)
        if len(lines) == 5:
            assert list(shown) == heads
    np.testing.assert_allclose(10.0 ** heat_map(opened), expected["surprise"], rtol=1e-4)


def test_the_text_is_shown_and_never_run(opened: Any) -> None:
    assert "hostile <name>.txt" in opened.run("document.querySelector('h1 + p').textContent")
    panels = opened.run("[...document.querySelectorAll('.reading')].map(panel => panel.textContent)")
    assert len(panels) == 5 and len(set(panels)) == 1
    assert panels[0].replace("·", "").startswith(TEXT[:70].replace("\u2028", ""))
    assert opened.run("document.querySelectorAll('.reading b, .reading script').length") == 0
    # each peak is a link to its token
    assert opened.run("[...document.querySelectorAll('li a')].every(a => document.querySelector(a.hash))")


def test_the_cursor_shows_the_text_and_the_values(opened: Any, numbers: dict[str, Any]) -> None:
    x, y, width, _ = opened.box("#surprise-figure .xy2 .nsewdrag, #surprise-figure [data-subplot=xy2]")
    for step in (0, 5):  # the pointer has to move
        opened.mouse("Moved", x + width / 2 + step, y + 20)
    opened.wait("document.querySelector('#surprise-figure .hoverlayer .legend') !== null")
    texts = opened.run(
        "[...document.querySelectorAll('#surprise-figure .hoverlayer .legend text')].map(text => text.textContent)"
    )
    position = int(texts[0])
    assert LENGTH * 0.45 < position < LENGTH * 0.55
    around = TEXT.encode()[position - 5 : position]
    assert around.decode("ascii", errors="ignore").strip() in texts[1]
    shown = [float(text.partition(" : ")[2]) for text in texts[2:]]
    measured = np.concatenate(numbers["tokens"]["surprise"]["mean"])[:, position]
    np.testing.assert_allclose(shown, measured, rtol=0.01)


def test_zooming_one_figure_zooms_all_along_the_text(opened: Any) -> None:
    ranges = "[...document.querySelectorAll('.along-text .js-plotly-plot')].map(plot => plot.layout.xaxis.range)"
    opened.run("Plotly.relayout('loss-figure', {'xaxis.range': [40, 90]}).then(() => null)")
    opened.wait(f"{ranges}.every(range => range[0] === 40 && range[1] === 90)")
    assert opened.run(f"{ranges}.length") == len(FIGURES) - 3  # all but the recall
    assert opened.run("document.getElementById('recall-kept-figure').layout.xaxis.range[1]") != 90
    opened.run("Plotly.relayout('gates-figure', {'xaxis.autorange': true}).then(() => null)")
    opened.wait(f"{ranges}.every(range => range[0] < 40 && range[1] > 90)")


def test_menus_choose_the_memory_and_the_scale(opened: Any) -> None:
    def choose(figure: str, menu: int, button: int) -> None:
        opened.run(
            f"(() => {{ const plot = document.getElementById('{figure}-figure'),"
            f" [data, layout, indices] = plot.layout.updatemenus[{menu}].buttons[{button}].args;"
            " return Plotly.update(plot, data, layout, indices).then(() => null); })()"
        )

    for figure in ("surprise", "recall-kept", "drift-norm"):
        choose(figure, 0, 2)
        assert list(traces(opened, figure, "y")) == ["layer 1, head 0", "layer 1, head 1"]
    assert opened.run("document.getElementById('surprise-figure').layout.yaxis2.range") == [4.5, 2.5]
    choose("surprise", 0, 0)
    assert len(traces(opened, "surprise", "y")) == 5
    choose("surprise", 1, 1)
    assert heat_map(opened).min(1).tolist() == [0] * 5 and heat_map(opened).max(1).tolist() == [1] * 5
    assert opened.errors == []


def test_the_page_fits_a_narrow_window(opened: Any) -> None:
    opened.window(400, 800)
    opened.wait("document.documentElement.scrollWidth <= 400")
    assert 200 < opened.run("document.querySelector('#gates-figure .main-svg').clientWidth") < 400
    opened.window(1200, 900)
    assert opened.errors == []


def test_missing_values_and_zeros_are_left_out(numbers: dict[str, Any]) -> None:
    tables = [table.copy() for table in numbers["tokens"]["forgetting"]["mean"]]
    tables[0][0], tables[0][1], tables[1][:, 5] = 0.0, np.nan, np.nan
    nothing = [np.full_like(table, np.nan) for table in tables]
    zeros = [np.zeros_like(table) for table in tables]
    changed = {"forgetting": {"mean": tables}, "momentum": {"mean": zeros}, "step": {"mean": nothing}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render({**numbers, "tokens": {**numbers["tokens"], **changed}})
    assert page.count("plotly-graph-div") > len(FIGURES)


def test_a_long_text_is_pooled(analysis: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CELLS", 0)
    monkeypatch.setattr(recording, "MIN_BINS", 50)
    pooled = analysis()
    assert pooled["text"]["bin"] == 7 and len(pooled["text"]["excerpts"]) == 50
    page = render(pooled)
    assert "maximum of 7 tokens" in page and "A column stands for 7 tokens" in page
    assert 'id="t343"' in page and 'id="t344"' not in page


def test_the_same_text_gives_the_same_page(
    analysis: Callable[[], dict[str, Any]], numbers: dict[str, Any], page: Path
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert render(analysis()) == page.read_text(encoding="utf-8")
    assert torch.equal(before, torch.get_rng_state())


def test_many_heads_have_no_legend_and_no_common_cursor(browser: Any, numbers: dict[str, Any], tmp_path: Path) -> None:
    wide = {**numbers, "memories": [{**memory, "heads": 20} for memory in numbers["memories"]]}
    wide["tokens"] = {
        quantity: {kind: [np.repeat(table[:1], 20, 0) for table in tables] for kind, tables in kinds.items()}
        for quantity, kinds in numbers["tokens"].items()
    }
    spread = lambda part: {k: np.repeat(v[:1], 20, 0) if isinstance(v, np.ndarray) else v for k, v in part.items()}  # noqa: E731
    wide["drift"] = [spread(drift) for drift in numbers["drift"]]
    recalls = [{**spread(recall), "half_life": [None] * 20} for recall in numbers["recall"]["memories"]]
    wide["recall"] = {**numbers["recall"], "memories": recalls}
    path = tmp_path / "wide.html"
    path.write_text(render(wide), encoding="utf-8")
    browser.open(path)
    assert "Half-lives" not in browser.run("document.body.textContent")
    for figure in ("surprise", "recall-kept", "drift-norm"):
        layout = f"document.getElementById('{figure}-figure')._fullLayout"
        assert browser.run(f"[{layout}.hovermode, {layout}.showlegend]") == ["closest", False]
    assert browser.errors == []

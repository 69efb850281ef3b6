"""The page in a real browser: it draws, answers to what is chosen, fits a phone, and asks nobody for anything."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titans_build as tb
from titans_build.tools.analysis import pooling
from titans_build.tools.analysis.analysis import Plan, analyse
from titans_build.tools.analysis.material import from_file
from titans_build.tools.analysis.page import pack, render
from titans_build.tools.inference.tokenizer import ByteTokenizer as Bytes

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
FIGURES = ["loss", "gain", "heat", "lines", "spread", "recall", "drift", "gates", "share"]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Any]]:
    model = tb.build(tb.load_recipe(RECIPE), seed=0)
    path = tmp_path_factory.mktemp("text") / "hostile <name>.txt"
    path.write_text(TEXT, encoding="utf-8")
    material = from_file(str(path), Bytes(), 256, 700)

    def make() -> dict[str, Any]:
        found = analyse(model, material, Plan(model, material, 64), pairs=2)
        return {"model": {"name": "small & <b>", "parameters": 1234, "layers": 2}, **found}

    return make


@pytest.fixture(scope="module")
def numbers(analysis: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return analysis()


@pytest.fixture(scope="module")
def page(numbers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(render(numbers), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.window(1200, 900)
    browser.open(page)
    yield browser
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]


def lines(browser: Any, figure: str) -> int:
    found: int = browser.run(f"document.querySelectorAll('#{figure}-plot path.line').length")
    return found


def picture(browser: Any) -> str:
    found: str = browser.run("document.querySelector('#heat-plot canvas').toDataURL()")
    return found


def choose(browser: Any, name: str, value: object) -> None:
    browser.run(
        f"(() => {{ const s = document.querySelector('select#{name}, select#{name}-choice'); s.value = '{value}';"
        " s.dispatchEvent(new Event('change')); return s.value; })()"
    )


def test_everything_is_drawn_and_nothing_goes_wrong(opened: Any, tmp_path: Path) -> None:
    drawn = opened.run("[...document.querySelectorAll('figure')].map(f => f.id)")
    assert [name for name in drawn if name != "peaks"] == FIGURES
    for name in FIGURES:
        marks = opened.run(f"document.querySelectorAll('#{name}-plot .line').length")
        assert marks > 0 or name == "heat", name
        title = opened.run(f"[...document.querySelectorAll('#{name}-plot text.title')].map(t => t.textContent)")
        assert title and all(title), name  # every axis is named
        assert opened.run(f"document.querySelector('#{name} figcaption').textContent.length") > 40
    assert opened.run("document.querySelectorAll('.verdict li').length") == 3
    assert lines(opened, "loss") == 3 and lines(opened, "lines") == 5
    colours = opened.run(
        "(() => { const c = document.querySelector('#heat-plot canvas'), s = new Set();"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);"
        " return [c.height, s.size]; })()"
    )
    assert colours[0] == 5 and colours[1] > 20  # a row for each head, in many colours
    shot = opened.screenshot(tmp_path / "page.png")
    assert shot[:8] == b"\x89PNG\r\n\x1a\n" and len(shot) > 50_000


def test_the_text_is_shown_and_never_run(opened: Any) -> None:
    assert "hostile <name>.txt" in opened.run("document.getElementById('subject').textContent")
    read = opened.run("document.querySelector('.reading').textContent")
    assert "<b>learns</b> é & reads </script><script>alert(1)</script><!-- \\u2028" in read.replace("·", "")
    assert opened.run("document.querySelectorAll('.reading b, .reading script').length") == 0


def test_choosing_a_memory_and_a_head(opened: Any) -> None:
    before = picture(opened)
    choose(opened, "memory", 0)
    assert lines(opened, "lines") == lines(opened, "drift") == lines(opened, "recall") == 3
    assert opened.run("document.querySelector('#heat-plot canvas').height") == 3
    assert picture(opened) != before
    choose(opened, "head", 2)
    assert lines(opened, "lines") == 1
    assert opened.run("document.querySelector('#lines .legend').textContent") == "head 2"
    choose(opened, "memory", 1)  # which has no head 2: all of them are shown
    assert opened.run("document.getElementById('head').value") == "-1"
    assert lines(opened, "lines") == 2


def test_choosing_what_is_shown(opened: Any) -> None:
    pictures = set()
    for quantity in ("surprise", "error", "step", "momentum", "forgetting"):
        choose(opened, "quantity", quantity)
        pictures.add(picture(opened))
        assert quantity.split()[0] in opened.run("document.querySelector('.scale').textContent")
    assert len(pictures) == 5
    shared = picture(opened)
    choose(opened, "scale", "row")
    assert picture(opened) != shared
    told = lines(opened, "recall")
    choose(opened, "metric", "cosine")
    assert lines(opened, "recall") == 2 * told  # beside each the memory that was never told
    choose(opened, "drift", "norm")
    assert "|W|" in opened.run("document.querySelector('#drift-plot text.title').textContent")
    choose(opened, "gate", 1)
    assert "layer 1" in opened.run("document.querySelector('#gates figcaption').textContent")


def test_pointing_at_a_token(opened: Any, numbers: dict[str, Any]) -> None:
    x, y, width, _ = opened.box("#heat-plot")
    opened.mouse("Moved", x + width / 2, y + 20)
    tip = opened.run("document.querySelector('#heat-plot .tip').textContent")
    assert tip.startswith("position ") and "head 0" in tip
    (at,) = re.findall(r"^position (\d+)", tip)
    assert 300 < int(at) < 400
    # what is said is what was measured
    said = [float(value) for value in re.findall(r"head \d: ([\d.]+)(?=layer|$)", tip)]
    measured = np.concatenate(numbers["tokens"]["surprise"]["mean"])[:, int(at)]
    assert np.allclose(said, measured, rtol=0.03)
    # one cursor in all figures along the text, and the token marked in the text
    assert opened.run("document.querySelectorAll('.plot .cursor').length") == 7
    assert opened.run("document.querySelectorAll('.reading .here').length") == 1
    where = opened.run("document.getElementById('where').textContent")
    opened.mouse("Moved", x + width / 4, y + 20)
    assert opened.run("document.getElementById('where').textContent") != where
    opened.click(x + width / 2, y + 4 + 26 * 1.5)  # the second row
    assert opened.run("[document.getElementById('memory').value, document.getElementById('head').value]") == ["0", "1"]
    x, y, width, _ = opened.box("#recall-plot")
    opened.mouse("Moved", x + width / 2, y + 60)
    assert "tokens later" in opened.run("document.querySelector('#recall-plot .tip').textContent")


def test_zooming_and_keys(opened: Any) -> None:
    shown = lambda: opened.run("document.getElementById('where').textContent")  # noqa: E731
    assert shown().startswith("tokens 0 to 700")
    opened.run("document.getElementById('in').click()")
    assert shown().startswith("tokens 175 to 525")
    opened.run("document.getElementById('all').click()")
    assert shown().startswith("tokens 0 to 700")
    opened.run("document.getElementById('loss-plot').focus()")
    opened.key("ArrowRight")
    opened.key("ArrowRight")
    assert "at 2:" in shown()
    opened.key("+", "+")
    assert shown().startswith("tokens 1 to 351")  # around the cursor
    opened.key("0", "0")
    x, y, width, _ = opened.box("#lines-plot")
    opened.mouse("Moved", x + width * 0.4, y + 90)
    opened.mouse("Pressed", x + width * 0.4, y + 90, button="left", buttons=1, clickCount=1)
    opened.mouse("Moved", x + width * 0.5, y + 90, buttons=1)
    assert opened.run("document.querySelectorAll('.brush').length") == 1
    opened.mouse("Moved", x + width * 0.6, y + 90, buttons=1)
    opened.mouse("Released", x + width * 0.6, y + 90, button="left", clickCount=1)
    low, high = (int(word) for word in shown().split(" · ")[0].split() if word.isdigit())
    assert 240 < low < 290 and 390 < high < 440
    assert opened.run("document.querySelectorAll('.brush').length") == 0
    opened.run("document.querySelector('.peaks button').click()")
    assert opened.run("document.querySelectorAll('.reading .here').length") == 1


def test_light_and_dark_and_a_phone(browser: Any, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.window(1200, 900, dark=True)
    browser.open(page)
    dark = browser.run(ground)
    browser.run("document.getElementById('theme').click()")
    light = browser.run(ground)
    assert dark != light
    browser.window(390, 844, phone=True)
    browser.open(page)
    assert browser.run(ground) == light
    assert browser.run("document.documentElement.scrollWidth") <= 390
    narrow = browser.run("document.querySelector('#loss-plot svg').clientWidth")
    assert 200 < narrow < 380
    browser.window(1000, 800)
    browser.wait(f"document.querySelector('#loss-plot svg').clientWidth > {narrow}")  # it is drawn anew
    assert browser.errors == []


def test_a_long_text_is_pooled(
    browser: Any, analysis: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "CELLS", 0)
    monkeypatch.setattr(pooling, "FEWEST", 100)
    path = tmp_path / "pooled.html"
    path.write_text(render(analysis()), encoding="utf-8")
    browser.window(1200, 900)
    browser.open(path)
    assert "A column stands for 7 tokens" in browser.run("document.querySelector('#heat figcaption').textContent")
    most = picture(browser)
    choose(browser, "kind", "mean")
    assert picture(browser) != most
    x, y, width, _ = browser.box("#heat-plot")
    browser.mouse("Moved", x + width / 2, y + 20)
    tip = browser.run("document.querySelector('#heat-plot .tip').textContent")
    ((first, last),) = re.findall(r"^positions (\d+) to (\d+), mean", tip)
    assert int(first) % 7 == 0 and int(last) == int(first) + 6
    assert browser.errors == []


def test_a_packed_table_comes_back() -> None:
    random = np.random.default_rng(0)
    table = np.exp(random.normal(0, 3, (3, 50)))
    table[1, 4] = np.nan
    table[2] = 5.0
    packed = pack(table)
    steps = np.frombuffer(zlib.decompress(base64.b64decode(packed["bytes"])), np.uint8).reshape(3, 50)
    assert packed["log"] and steps[1, 4] == 255 and (steps[2] == 0).all()
    low, high = np.log(np.array(packed["ranges"])).T
    back = np.exp(low[:, None] + (high - low)[:, None] * steps / 254)
    assert np.nanmax(abs(np.log(back / table))[steps < 255]) <= (high - low).max() / 254
    linear = pack(np.array([[0.0, 0.5, 1.0], [np.nan] * 3]))
    assert not linear["log"] and linear["ranges"] == [[0.0, 1.0], [0.0, 0.0]]


def test_a_page_is_light(page: Path) -> None:
    assert page.stat().st_size < 120_000
    assert "http" not in page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_the_same_text_gives_the_same_page(
    analysis: Callable[[], dict[str, Any]], numbers: dict[str, Any], page: Path
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert render(analysis()) == page.read_text(encoding="utf-8")
    assert torch.equal(before, torch.get_rng_state())

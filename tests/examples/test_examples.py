"""The examples run, on a small part of their data, and print what they promise; their page quotes what they printed."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")
NAMES = [file.stem for file in sorted(EXAMPLES.glob("*.py"))]


def load(name: str) -> Any:
    """The example as a module of its own, which is not run by being imported."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_prints_a_row_for_each_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(name).main(["--quick"])
    out = capsys.readouterr().out
    assert len(found) >= 3
    for way, row in found.items():
        assert row and all(math.isfinite(figure) for figure in row)
        assert re.search(rf"^{re.escape(way)} .*\d$|^{re.escape(way)} .*%$", out, flags=re.M)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_command_and_its_output(name: str) -> None:
    assert f"python examples/{name}.py" in PAGE
    section = PAGE.partition(f"python examples/{name}.py")[2].partition("\n## ")[0]
    (shown,) = re.findall(r"^```text\n(.*?)^```$", section, flags=re.M | re.S)
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    ways = re.findall(r'^(?:        |    found|    forecasts)?\[?"([^"\n]+)"\]?(?::| =) ', source, flags=re.M)
    assert len(ways) >= 3
    assert all(re.search(rf"^{re.escape(way)}  ", shown, flags=re.M) for way in ways)


def test_forecasts_do_not_see_the_future() -> None:
    forecasting = load("forecasting")
    series = forecasting.read_series()
    assert series.steps.shape == (len(series.level), 1) and 400 < len(series.level) - series.held_out < 500
    wanted = forecasting.changes(series.level)
    assert torch.equal(wanted[10, 1], series.level[14] - series.level[10])
    assert wanted[-1].isnan().all() and not wanted[: -max(forecasting.AHEAD)].isnan().any()
    # what needs no model is right where it is known to be
    flat = series._replace(level=torch.full_like(series.level, 7.0))
    assert all(forecasting.errors(flat, guess) == [0.0] * 4 for guess in forecasting.without_a_model(flat).values())


def test_streaming_equals_reading_whole_digits() -> None:
    classifier = load("stream_classifier")
    _, digits = classifier.read_digits()
    digits = classifier.Digits(*(part[:13] for part in digits))
    model = classifier.Classifier()
    scores = classifier.read_streams(model, digits, streams=4)
    with torch.no_grad():
        assert torch.allclose(scores, model(digits.pictures)[0], atol=1e-4)


def test_each_life_has_its_own_names() -> None:
    online = load("online_learning")
    world = online.World(slice(online.HELD_OUT, None))
    lives = world.lives(200, torch.Generator().manual_seed(0))
    assert lives.pictures.shape[:2] == lives.names.shape == (200, online.EPISODES * online.SHOWN)
    digits = {picture.numpy().tobytes(): int(digit) for picture, digit in zip(world.pictures, world.digits)}
    seen = set()
    for pictures, names in zip(lives.pictures, lives.names):
        called = {(digits[picture.numpy().tobytes()], int(name)) for picture, name in zip(pictures, names)}
        # in a life each digit that was shown has one name, and no other digit has it
        assert len(called) == len({digit for digit, _ in called}) == len({name for _, name in called})
        seen |= called
    assert len(seen) == 100  # and in all of them, every one

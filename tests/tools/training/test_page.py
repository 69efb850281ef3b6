"""docs/train.md lists the settings, and its commands parse."""

import json
import shlex
from pathlib import Path

import pytest

import titans_build as tb
from titans_build.tools.train import PROGRAM
from titans_build.tools.training import as_settings
from titans_build.tools.training.search import choose, make_trial, read_space
from titans_build.tools.training.settings import Mesh, Settings, Stage
from titans_build.tools.training.trials import check_trial

PAGE = (Path(__file__).parents[3] / "docs" / "train.md").read_text(encoding="utf-8").splitlines()
LINES = [line for line in PAGE if line.startswith("titans-train ")]


@pytest.mark.parametrize("settings", [Settings, Stage, Mesh])
def test_every_setting_is_on_the_page(settings):
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert any(line.startswith(f"| `{name}` | {default} |") for line in PAGE), name


def parsed(line):
    return PROGRAM.parse(shlex.split(line, comments=True)[1:])


def test_commands_of_the_page_parse():
    assert len(LINES) >= 5
    for line in LINES:
        assert parsed(line).out.startswith("runs/")


def test_search_example_of_the_page(tmp_path):
    given = parsed(next(line for line in LINES if line.startswith("titans-train search ")))
    start = PAGE.index("```yaml", PAGE.index("## Comparison and search")) + 1
    (tmp_path / given.space).write_text("\n".join(PAGE[start : PAGE.index("```", start)]), encoding="utf-8")
    choices = choose(read_space(tmp_path / given.space), given.sampler, given.trials, 0, 1, [])
    assert len(choices) == given.trials
    recipe, settings = tb.load_recipe(given.recipe), as_settings()
    for choice in choices:
        check_trial(make_trial(recipe, given.data, settings, tmp_path / "out", False, choice, 0))

"""docs/train.md lists the settings that there are."""

import json
from pathlib import Path

import pytest

from titans_build.tools.training.settings import Settings, Stage

PAGE = (Path(__file__).parents[3] / "docs" / "train.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("settings", [Settings, Stage])
def test_every_setting_is_on_the_page(settings):
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert f"| `{name}` | {default} | {field.description} |" in PAGE

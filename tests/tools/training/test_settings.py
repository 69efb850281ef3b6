"""Settings: validation and round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.recipes.parse import write_yaml
from titans_build.tools.training.settings import Settings, as_settings, fields


def problems(given: Any) -> dict[str, str]:
    with pytest.raises(tb.RecipeError) as caught:
        as_settings(given)
    return {problem.path: problem.message for problem in caught.value.problems}


def test_every_setting_has_a_description_and_a_valid_default() -> None:
    assert as_settings() == as_settings({})
    for name, field in fields(Settings).items():
        assert field.description, name
        assert not field.required, name
        assert as_settings({name: as_settings().to_dict()[name]}) == as_settings()


def test_settings_round_trip(tmp_path: Path) -> None:
    settings = as_settings(
        {
            "carry": 3,
            "betas": [0.8, 0.99],
            "lr": 1,
            "mesh": {"data": 2, "context": 4},
            "stages": [{"steps": 4, "train": ["!@memory"]}, {"steps": 2, "train": ["@memory"], "lr": 1e-4}],
        }
    )
    assert settings.mesh is not None and (settings.mesh.data, settings.mesh.context, settings.mesh.tensor) == (2, 4, 1)
    assert settings.steps == 6 and settings.windows == 3 and settings.betas == (0.8, 0.99)
    (tmp_path / "s.yaml").write_text(write_yaml(settings.to_dict()), encoding="utf-8")
    (tmp_path / "s.json").write_text(settings.model_dump_json(), encoding="utf-8")
    assert as_settings(tmp_path / "s.yaml") == as_settings(str(tmp_path / "s.json")) == settings
    assert as_settings(settings.to_dict()) == settings


def test_all_problems_are_reported_with_the_nearest_name() -> None:
    found = problems(
        {
            "mesh": {"rows": 2, "tensor": 0},
            "stpes": 3,
            "lr": "fast",
            "carry": "no",
            "stages": [{"train": []}, {"stps": 1, "recipe": 3}],
            "clip": -1,
        }
    )
    assert "did you mean 'steps'" in found["stpes"]
    assert "unknown" in found["mesh.rows"] and found["mesh.tensor"] == "expected integer >= 1, got 0"
    assert found["lr"] == "expected number > 0, got 'fast'"
    assert found["carry"] == "expected 'off' | 'detach' or integer >= 1, got 'no'"
    assert found["clip"].startswith("expected number > 0 or null, got -1")
    assert "needs the field 'steps'" in found["stages.0"] and "at least 1 item" in found["stages.0.train"]
    assert found["stages.1.recipe"] == "expected an object, got 3"
    assert "did you mean 'steps'" in found["stages.1.stps"]


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        ({"batch": 4, "accumulate": 3}, "accumulate", "expected a divisor of batch = 4, got 3"),
        ({"betas": [0.9]}, "betas", "expected list of (number, number), got [0.9]"),
        ({"betas": [0.9, 0.9, 0.9]}, "betas", "expected list of (number, number), got [0.9, 0.9, 0.9]"),
        ({"betas": 0.9}, "betas", "expected list of (number, number), got 0.9"),
        ({"betas": [0.9, 1.0]}, "betas", "expected two numbers from 0 to under 1, got [0.9, 1.0]"),
        ({"steps": 3, "stages": [{"steps": 4, "train": ["*"]}]}, "steps", "the stages have 4 steps in total, got 3"),
        (
            {"compile": True, "write_cost": 0.1},
            "compile",
            "write_cost observes the memories, which a compiled model does not allow: use only one of them",
        ),
        ({"steps": True}, "steps", "expected integer >= 1, got true"),
        ({"lr": float("nan")}, "lr", "expected a finite number, got nan"),
        ({"carry": 0}, "carry", "expected 'off' | 'detach' or integer >= 1, got 0"),
        ({"stages": ["core"]}, "stages.0", "expected a mapping with steps, got 'core'"),
    ],
)
def test_invalid_settings(given: dict[str, Any], path: str, message: str) -> None:
    assert problems(given) == {path: message}


def test_settings_are_frozen() -> None:
    settings = as_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.steps = 3  # type: ignore[misc]


def test_invalid_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- a\n", encoding="utf-8")
    assert problems(path) == {"": "expected a mapping of settings, got ['a']"}
    assert problems(tmp_path / "none.yaml") == {"": "no such file"}

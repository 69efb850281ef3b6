"""docs/recipes.md is what the schemas say now."""

from __future__ import annotations

from typing import Any

import pytest

import titans_build as tb
from titans_build.recipes import packaged_names
from titans_build.registry import describe, lookup, scratch
from titans_build.tools.cli import main
from titans_build.tools.commands.recipe_reference import COMMAND, recipe_page

PAGE = "recipes.md"
BUILT_IN = [name for name in tb.list_blocks() if lookup(name).source == "titans_build"]


def test_the_page_is_current(page: Any) -> None:
    assert recipe_page(BUILT_IN) == page.text, f"the schemas have changed: {COMMAND} > docs/recipes.md"


def test_every_block_field_and_recipe_is_listed(page: Any) -> None:
    for name in BUILT_IN:
        section = page.text.partition(f"\n### {name}\n")[2].partition("\n###")[0]
        original = describe(name).variant_of and {field.name: field.default for field in describe("memory").fields}
        for field in describe(name).fields:
            assert f"| `{field.name}` |" in section or (original and original[field.name] == field.default)
    assert all(f"`{name}`" in page.text for name in packaged_names())
    # nothing of a docstring's marks is left
    assert "``" not in page.text and ":meth:" not in page.text and "§" not in page.text


def test_the_command_writes_the_page(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = COMMAND.split()[1:]
    assert main(words) == 0
    assert capsys.readouterr().out == page.text
    assert main([*words, "--json"]) == 0
    assert '"markdown": "# Recipes' in capsys.readouterr().out


def test_an_installed_block_is_in_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    with scratch():

        @tb.register("mine")
        class Mine(tb.Block):
            """A block of one's own, ``x``."""

            def __init__(self, dim: int, *, side: tb.Spec | None = None) -> None:
                super().__init__(dim)

        assert main(["schema", "--markdown", "mine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("### mine\n\nA block of one's own, `x`.\n\nFrom the package `")
    assert "| `side` | block or null | `null` |" in out

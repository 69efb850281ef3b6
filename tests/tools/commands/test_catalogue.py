"""The commands that print and check: ``list``, ``describe``, ``show``, ``check``, ``schema``, ``kernels``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build import recipes, registry
from titans_build.kernels import dispatch
from titans_build.recipes import packaged_names, recipe_schema
from titans_build.tools.commands.recipe_reference import summary

Run = Callable[..., Any]


def test_list_shows_every_block_with_its_defaults_and_every_recipe(titans_build: Run) -> None:
    result = titans_build("list")
    assert result.status == 0 and result.err == ""
    words = set(result.out.split())
    assert set(tb.list_blocks()) <= words
    assert {
        name
        for name in packaged_names()
        if "-170m" not in name and not name[-1].isdigit() and not name.endswith(("m", "b"))
    } <= words
    assert "chunk=16," in words and "170m" in words
    assert "``" not in result.out


def test_list_json(titans_build: Run) -> None:
    found = titans_build("list", "--json").json
    assert [block["name"] for block in found["blocks"]] == tb.list_blocks()
    assert [recipe["name"] for recipe in found["recipes"]] == packaged_names()
    assert all(entry["summary"] for kind in found.values() for entry in kind)
    (memory,) = (block for block in found["blocks"] if block["name"] == "memory")
    assert memory["fields"]["depth"] == {"type": "integer from 1 to 16", "required": False, "default": 2}


def test_list_pattern(titans_build: Run) -> None:
    found = titans_build("list", "*mem*", "--json").json
    assert [block["name"] for block in found["blocks"]] == tb.list_blocks("*mem*") != []
    assert "mac" not in [recipe["name"] for recipe in found["recipes"]]
    assert "mac-170m" in titans_build("list", "mac-1*").out


@pytest.mark.parametrize(("pattern", "near"), [("memroy", "memory"), ("*memm*", "memory"), ("mac-200m", "mac-170m")])
def test_list_with_no_match_fails_with_the_nearest_name(titans_build: Run, pattern: str, near: str) -> None:
    result = titans_build("list", pattern)
    assert (result.status, result.out) == (2, "")
    assert f"did you mean {near!r}?" in result.err


def test_list_shows_a_users_block_and_where_it_is_from(titans_build: Run) -> None:
    with registry.scratch():

        @tb.register("mine")
        class Mine(tb.Block):
            """A block of one's own."""

        out = titans_build("list", "mine").out
    assert "A block of one's own. (from " in out


def test_summaries_are_one_sentence() -> None:
    for name in packaged_names():
        assert 10 < len(summary(name)) < 200 and "\n" not in summary(name)
    assert summary("mac-170m") == f"{summary('mac')}; size 170m"


def test_parts_of_a_memory_are_listed_and_described(titans_build: Run) -> None:
    found = {(part["field"], part["name"]) for part in titans_build("list", "--json").json["parts"]}
    assert {("objective", "huber"), ("network", "gated_mlp"), ("retention", "kl"), ("optimizer", "muon")} <= found
    assert "huber" in titans_build("list", "hub*").out
    out = titans_build("describe", "huber").out
    assert "Usable as: the field objective of memory" in out and "delta" in out
    assert titans_build("describe", "muon", "--json").json["fields"][0]["name"] == "steps"


@pytest.mark.parametrize("name", tb.list_blocks())
def test_describe(name: str, titans_build: Run) -> None:
    described = registry.describe(name)
    result = titans_build("describe", name)
    assert result.status == 0
    assert all(field.name in result.out for field in described.fields)
    data = titans_build("describe", name, "--json").json
    assert data["name"] == name and [field["name"] for field in data["fields"]] == [
        field.name for field in described.fields
    ]


def test_check_reports_every_file(small: Path, tmp_path: Path, titans_build: Run) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        small.read_text(encoding="utf-8").replace("segment", "segmnt").replace("- ffn", "- fnn"), encoding="utf-8"
    )
    result = titans_build("check", small, wrong, "mac")
    assert result.status == 2
    assert f"{small}: fine (3 layers," in result.out and "mac: fine" in result.out
    assert "wrong.yaml: 3 problems" in result.err and "did you mean 'segment'?" in result.err
    report = titans_build("check", small, wrong, "--json").json
    assert report["ok"] is False
    assert [entry["ok"] for entry in report["recipes"]] == [True, False]
    assert len(report["recipes"][1]["problems"]) == 3


def test_check_of_a_block_whose_package_is_missing(titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is right, and what is lacking here is said; only building it is refused."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    words = ["lmm", "--set", "layers.lmm.0=mamba_ssm_mamba2"]
    result = titans_build("check", *words)
    assert (result.status, result.out) == (0, "lmm: fine (4 layers)\n")
    lacking = "mamba_ssm_mamba2: needs mamba-ssm, which is not installed: pip install 'mamba-ssm causal-conv1d'"
    assert f"warning: lmm: cannot be built here: {lacking}\n" in result.err
    (report,) = titans_build("check", *words, "--json").json["recipes"]
    assert report["ok"] and report["parameters"] is None and lacking in report["warning"]
    for command in (words, ["diagram", *words]):
        result = titans_build(*command)
        assert (result.status, result.out) == (2, "") and lacking in result.err and "Traceback" not in result.err
    assert titans_build("describe", "mamba_ssm_mamba2").status == 0


def test_check_allocates_no_weights(titans_build: Run) -> None:
    # 5 GB of weights, were they made
    report = titans_build("check", "mac-1.3b", "--json").json
    assert report["recipes"][0]["parameters"] == pytest.approx(1.3e9, rel=0.05)


def test_check_prints_the_size_of_the_state(small: Path, titans_build: Run) -> None:
    (report,) = titans_build("check", small, "--json").json["recipes"]
    assert report["state_bytes_per_row"] == tb.build(tb.load_recipe(small)).state_bytes()
    assert report["state_grows"] is False and report["warning"] is None
    assert "of state per row)" in titans_build("check", small).out
    words = ["check", "transformer", "--set", "layers.plain.0.window=null"]
    assert "of state per row, growing with every token)" in titans_build(*words).out
    assert titans_build(*words, "--json").json["recipes"][0]["state_grows"] is True


def test_check_warns_of_a_model_too_large_for_the_machine(titans_build: Run) -> None:
    words = ["check", "transformer", "--set", f"layers.plain.0.window={2**24}", "--set", "stack.0.repeat=1000"]
    result = titans_build(*words)
    assert result.status == 0 and "fine (1000 layers" in result.out
    assert "warning: transformer: the model needs" in result.err and "GiB for the state of one row" in result.err
    assert "this machine has" in titans_build(*words, "--json").json["recipes"][0]["warning"]


@pytest.mark.parametrize("name", packaged_names())
def test_every_packaged_recipe_is_fine(name: str, titans_build: Run) -> None:
    assert titans_build("check", name).status == 0


def test_show_prints_what_loads_as_the_same_recipe(small: Path, titans_build: Run) -> None:
    text = titans_build("show", "mac").out
    assert text == (Path(recipes.__file__).parent / "mac.yaml").read_text(encoding="utf-8")
    for words in (["mac"], ["mag-170m"], [small], ["mac", "--set", "layers.mac.0.segment=8"]):
        result = titans_build("show", *words)
        assert (result.status, result.err) == (0, "")
        overrides = {"layers.mac.0.segment": 8} if "--set" in words else {}
        expected = tb.load_recipe(words[0], overrides)
        assert tb.load_recipe(result.out).fingerprint == expected.fingerprint
        assert titans_build("show", *words, "--json").json == expected.to_dict()


def test_schema(titans_build: Run) -> None:
    assert titans_build("schema").json == recipe_schema()
    assert titans_build("schema", "memory").json == registry.block_schema("memory")


def test_kernels(titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    report = titans_build("kernels", "--json").json
    rows = report["operations"]
    assert {row["operation"] for row in rows} == set(dispatch.OPERATIONS)
    assert all(sum(row["chosen"] for row in rows if row["operation"] == name) == 1 for name in dispatch.OPERATIONS)
    assert all(row["available"] or row["reason"] for row in rows)
    out = titans_build("kernels").out
    assert out.startswith("on cpu in float32") and out.count("taken") == len(dispatch.OPERATIONS)


def test_kernels_shows_the_effect_of_the_environment(titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "attention=reference")
    result = titans_build("kernels")
    assert "with TITANS_BUILD_BACKEND=attention=reference" in result.out
    rows = titans_build("kernels", "--json").json["operations"]
    assert [row["backend"] for row in rows if row["operation"] == "attention" and row["chosen"]] == ["reference"]


def test_kernels_refuses_an_unknown_operation_in_the_environment(
    titans_build: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "atention=reference")
    result = titans_build("kernels")
    assert result.status == 2 and "atention" in result.err


@pytest.mark.parametrize("width", [None, "40", "60", "80", "120"])
@pytest.mark.parametrize(
    "words", ["list", "list m*", "describe memory", "describe chain", "kernels", "mac", "mag", "check mac lmm"]
)
def test_lines_fit_the_terminal_without_losing_words(
    words: str, width: str | None, titans_build: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = titans_build(*words.split()).out
    if width is not None:
        monkeypatch.setenv("COLUMNS", width)
    result = titans_build(*words.split())
    assert result.status == 0 and result.err == ""
    lines = result.out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    if width is not None and not words.startswith("check"):
        # a path or a command to copy may be longer than a line
        assert all(len(line) <= int(width) for line in lines)
    # no word is broken, and none is lost but headings of columns that there are no more
    headings = (
        "operation backend status why not field type default meaning block recipe description fields and defaults"
    )
    looked_for = {word for word in whole.split() if len(word) < 20 and word.isalpha()}
    assert not looked_for - {*headings.split(), "part", "parameters", "sizes"} - set(result.out.split())

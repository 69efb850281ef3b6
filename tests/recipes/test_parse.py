from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from titans_build.recipes.parse import plain, read_file, read_text, read_value, write_yaml
from titans_build.registry import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256", 256),
        ("-3", -3),
        ("+3", 3),
        ("0x10", 16),
        ("0o17", 15),
        ("1e-3", 1e-3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("2.", 2.0),
        ("-1E+2", -100.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("  ", None),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("007", 7),
        ("'12'", "12"),
        ('"true"', "true"),
        ("[a, 1, {b: null}]", ["a", 1, {"b": None}]),
        ('{"a": [1, 2.5]}', {"a": [1, 2.5]}),
        ("{a: b}", {"a": "b"}),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: Any):
    read = read_value(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "data",
    [
        {"a": [1, -2, 0.1, 1e-5, 1e300, True, None, "text"]},
        {
            "quoted": [
                "1e-3",
                "12",
                "true",
                "null",
                "~",
                "",
                "no",
                "on",
                "0o17",
                "0x1F",
                ".5",
                "1_000",
                "12:30",
                "<<",
                "&a",
                "- x",
            ]
        },
        {"nested": {"deep": [[], {}, [[1]], {"a": {"b": []}}]}},
        {"unicode": "Größe \u2028 \U0001f600", "lines": "a\nb\n", "spaces": "  a  ", "colon": "a: b # c"},
    ],
)
def test_written_yaml_reads_back(data: Any):
    assert read_text(write_yaml(data)) == data
    assert yaml.safe_load(write_yaml(data)) == data


def test_aliases_are_copies():
    data = read_text("a: &x [1, 2]\nb: *x\n")
    assert data == {"a": [1, 2], "b": [1, 2]}
    assert data["a"] is not data["b"]


def test_json_with_tabs_and_escapes():
    assert read_text('{\n\t"a": "\\u00e9\\/"\n}') == {"a": "é/"}


def test_a_byte_order_mark_is_ignored(tmp_path: Path):
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_file(tmp_path / "bom.yaml") == {"a": 1}


def test_files_that_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "missing.yaml", tmp_path, "/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(RecipeError, match=r"no such file|not a regular file|cannot be read"):
            read_file(path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match="not a regular file"):
        read_file(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, object(), {1}, b"bytes", 1 + 2j, {1: 2}])
def test_plain_data_only(value: Any):
    with pytest.raises(RecipeError, match=r"a\.0"):
        plain({"a": [value]})


def test_plain_data_is_copied():
    data = {"a": [{"b": (1, 2)}]}
    copied = plain(data)
    assert copied == {"a": [{"b": [1, 2]}]}
    copied["a"][0]["b"].append(3)
    assert data == {"a": [{"b": (1, 2)}]}

"""``titans-build RECIPE``: the table adds up, what is saved can be loaded, and a trial tells right from wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.registry import scratch

Run = Callable[..., Any]


@pytest.mark.parametrize("width", [None, "80"])
def test_the_table_shows_every_part_once(
    width: str | None, small: Path, titans_build: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", width)
    result = titans_build(small)
    assert result.status == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == "small: dim 32, vocab 256, 3 layers (cpu, float32, seed 0)"
    names = [re.split(r"(?<=\w) {2,}", line)[0].rstrip() for line in lines[3:-2]]
    assert names == [
        "embedding",
        "mag ×2",
        "├ persistent",
        "│ └ of: gate",
        "│   ├ branches.0: attention",
        "│   └ branches.1: memory",
        "└ ffn",
        "mac",
        "├ context",
        "│ ├ memory: memory",
        "│ └ attend: attention",
        "└ ffn",
        "norm: rms_norm",
        "head",
        "recipe",
        "total",
    ]
    figures = r"  [\d,.]+[MG]? +[\d,.]+[MG]? +(-|[\d.]+ (B|KiB|MiB)) *"
    assert all(re.search(figures + "$", line) for line in lines[3:-2])
    assert result.out.endswith("The state does not grow.\n")


def test_json_adds_up_to_what_the_model_says(small: Path, titans_build: Run) -> None:
    report = titans_build(small, "--json").json
    model = tb.build(tb.load_recipe(small))
    totals, parts = report["totals"], report["parts"]
    assert (
        totals["parameters"]
        == sum(p.numel() for p in model.parameters())
        == sum(p["parameters"] * p["count"] for p in parts)
    )
    assert (
        totals["state_bytes_per_row"]
        == model.state_bytes()
        == sum(p["state_bytes_per_row"] * p["count"] for p in parts)
    )
    assert totals["flops_per_token"] * totals["flops_length"] == pytest.approx(model.flops(totals["flops_length"]))
    assert totals["state_grows"] is False
    assert report["recipe"]["fingerprint"] == tb.load_recipe(small).fingerprint


def test_changed_values_are_shown_and_recorded(small: Path, tmp_path: Path, titans_build: Run) -> None:
    out = tmp_path / "model"
    words = ["--set", "layers.mac.0.segment=8", "--set", "tie=true", "--seed", "3", "--dtype", "bfloat16", "--out", out]
    result = titans_build(small, *words)
    assert result.status == 0
    assert "layers.mac.0.segment = 8" in result.out and "seed 3" in result.out and f"saved to {out}" in result.out
    model = tb.load(out)
    assert model.recipe.overrides == {"layers.mac.0.segment": 8, "tie": True}
    same = tb.build(tb.load_recipe(small, {"layers.mac.0.segment": 8, "tie": True}), dtype=torch.bfloat16, seed=3)
    ours = dict(same.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[name])
    # a saved model's folder is a recipe, too
    assert titans_build(out, "--json").json["recipe"]["fingerprint"] == model.recipe.fingerprint


def test_growing_state_is_marked(titans_build: Run) -> None:
    words = ["transformer", "--set", "dim=32", "--set", "layers.plain.0.window=null"]
    result = titans_build(*words)
    assert "State marked + grows" in result.out
    assert titans_build(*words, "--json").json["totals"]["state_grows"] is True


def test_a_model_of_vectors(titans_build: Run) -> None:
    result = titans_build("lmm", "--set", "dim=32", "--set", "vocab=null")
    assert result.status == 0
    assert "vectors in, vectors out" in result.out and "embedding" not in result.out


def test_trial_on_text(small: Path, text: Path, tmp_path: Path, titans_build: Run) -> None:
    out = tmp_path / "model"
    result = titans_build(small, "--try", text, "--out", out, "--json")
    assert result.status == 0, result.err
    trial = result.json["try"]
    assert trial["bits_after"] < trial["bits_before"] < 9
    assert trial["learns"] and trial["streams"] and trial["difference"] <= trial["allowed"]
    assert trial["difference_float64"] < 1e-6
    assert sum(trial["cuts"]) == 512 and 1 in trial["cuts"] and len(set(trial["cuts"])) > 3
    assert trial["prefill"] > 0 and trial["decode"] > 0 and trial["generated"]
    # what the trial trained is not what was saved
    fresh = dict(tb.build(tb.load_recipe(small)).named_parameters())
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in tb.load(out).named_parameters())


def test_trial_for_people(small: Path, text: Path, titans_build: Run) -> None:
    result = titans_build(small, "--try", text)
    assert result.status == 0 and result.err == ""
    found = {line.split()[0] for line in result.out.splitlines() if line}
    assert {"text", "learns", "streams", "speed", "says"} <= found
    assert "bits per byte after 8 steps" in result.out and result.out.count("  ok") == 2


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_trial_in_every_dtype(dtype: str, small: Path, text: Path, titans_build: Run) -> None:
    result = titans_build(small, "--try", text, "--dtype", dtype, "--json")
    assert result.status == 0, result.err
    assert result.json["try"]["learns"]


@pytest.mark.parametrize("size", [8, 9, 100])
def test_trial_on_short_text(size: int, small: Path, tmp_path: Path, titans_build: Run) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(range(200, 200 + min(size, 50))) * 2)
    path.write_bytes(path.read_bytes()[:size])
    result = titans_build(small, "--try", path, "--json")
    assert result.status == 0, result.err
    assert result.json["try"]["bytes_read"] == size


def test_trial_on_too_little_text(small: Path, tmp_path: Path, titans_build: Run) -> None:
    path = tmp_path / "tiny.txt"
    path.write_bytes(b"")
    result = titans_build(small, "--try", path)
    assert result.status == 2 and "0 bytes are too few" in result.err


def test_a_model_that_streams_wrongly_fails(small: Path, text: Path, titans_build: Run) -> None:
    with scratch():

        @tb.register("forgetful")
        class Forgetful(tb.Block):
            """A running mean that starts anew with every call: it has no state to carry."""

            def forward(self, x, state=None, *, mask=None):  # type: ignore[no-untyped-def]
                return x.cumsum(dim=1), None

        small.write_text(
            "version: 1\ndim: 32\nvocab: 256\nlayers: {a: [forgetful, ffn]}\nstack: [a]\n", encoding="utf-8"
        )
        result = titans_build(small, "--try", text)
        assert result.status == 1
        assert "streaming differs from one pass" in result.err and "WRONG" in result.out
        report = titans_build(small, "--try", text, "--json")
        assert report.status == 1
        assert report.json["try"]["streams"] is False


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    small: Path, tmp_path: Path, titans_build: Run
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    result = titans_build(small, "--out", tmp_path / "taken")
    assert result.status == 2 and result.out == ""
    assert "taken is a file, not a folder" in result.err

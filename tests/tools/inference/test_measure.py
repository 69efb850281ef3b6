"""``--perplexity``: the numbers of `tb.perplexity` as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.data.tokenizer import train_tokenizer
from titans_build.tools.inference import Bucket, Perplexity, perplexity
from titans_build.tools.inference.measure import ByteCounts, parse_edges, report_of, steps_of
from titans_build.tools.inference.reading import DOUBLING

SVG = "{http://www.w3.org/2000/svg}"
Infer = Callable[..., Any]
TEXT = b"what is read is remembered, \xff and what is not is not. " * 10


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def test_json_has_the_numbers_of_the_function(folder: Path, infer: Infer, text: Path, model: LanguageModel) -> None:
    found = infer(folder, "--perplexity", text, "--buckets", "64,256", "--compare-frozen", "--json").json
    tokens = torch.tensor([list(TEXT)])
    live = perplexity(model, tokens, edges=[64, 256])
    with model.freeze_memory():
        frozen = perplexity(model, tokens, edges=[64, 256])
    for said, meant in ((found, live), (found["frozen"], frozen)):
        assert said["tokens"] == len(TEXT) - 1
        assert said["loss"] == pytest.approx(meant.loss, abs=1e-4)
        assert said["perplexity"] == pytest.approx(meant.perplexity, rel=1e-4)
        assert said["bits_per_byte"] == pytest.approx(meant.loss / math.log(2), abs=1e-4)
        spans = [(bucket["start"], bucket["stop"], bucket["tokens"]) for bucket in said["buckets"]]
        assert spans == [(0, 64, 63), (64, 256, 192), (256, None, len(TEXT) - 256)]
    assert found["loss"] != found["frozen"]["loss"]
    assert found["bytes"] == len(TEXT) and found["state"] is None and found["position_before"] == 0


def test_bits_per_byte_count_the_bytes_of_each_token(infer: Infer, tmp_path: Path) -> None:
    text = "the cat sat on the mat, naïvely 🙂.\n" * 30
    tokenizer = train_tokenizer([text], 280)
    model = tb.build({"version": 1, "dim": 8, "vocab": 280, "layers": {"a": ["memory"]}, "stack": ["a"]})
    model.tokenizer = tokenizer.to_str()
    tb.save(model, tmp_path / "model")
    (tmp_path / "text").write_text(text, encoding="utf-8")
    found = infer(tmp_path / "model", "--perplexity", tmp_path / "text", "--buckets", "10,100", "--json").json
    # each line is tokenized on its own
    ids = [token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line).ids]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
        )
    start = len(tokenizer.decode(ids[:1]).encode())
    raw = len(text.encode()) - start
    assert found["tokens"] == len(ids) - 1 and found["bytes"] == len(text.encode())
    assert found["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / raw, rel=1e-4)
    first = found["buckets"][0]
    assert first["tokens"] == 9 and first["bits_per_byte"] == pytest.approx(
        float(losses[:9].sum()) / math.log(2) / (len(tokenizer.decode(ids[:10]).encode()) - start), rel=1e-4
    )


def test_the_table(folder: Path, infer: Infer, text: Path) -> None:
    result = infer(folder, "--perplexity", text, "--compare-frozen")
    assert result.status == 0 and result.err == ""
    heading, *rows = result.out.splitlines()
    assert heading.split()[:4] == ["position", "tokens", "loss", "bits/byte"] and "loss, frozen" in heading
    assert [row.split()[0] for row in rows[:4]] == ["0", "128", "256", "512"]
    assert rows[4].split()[:2] == ["all", f"{len(TEXT) - 1}"]


def test_measuring_continues_from_a_state_and_does_not_change_it(
    folder: Path, infer: Infer, text: Path, tmp_path: Path
) -> None:
    state, after = tmp_path / "a.state", tmp_path / "b.state"
    infer(folder, "--file", text, "--state", state, "--max-new-tokens", "0")
    before = state.read_bytes()
    found = infer(folder, "--perplexity", text, "--state", state, "--json").json
    assert state.read_bytes() == before and found["position_before"] == len(TEXT)
    assert found["loss"] != infer(folder, "--perplexity", text, "--json").json["loss"]
    infer(folder, "--perplexity", text, "--state", state, "--save", after)
    infer(folder, "--file", text, "--state", state, "--max-new-tokens", "0")
    model = tb.load(folder)
    twice = (tb.load_state(path, model) for path in (state, after))
    for (name, a), (_, b) in zip(*map(tb.state.named_tensors, twice)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


def test_no_write_is_the_frozen_memory(folder: Path, infer: Infer, text: Path) -> None:
    compared = infer(folder, "--perplexity", text, "--compare-frozen", "--json").json
    frozen = infer(folder, "--perplexity", text, "--no-write", "--json").json
    assert frozen["loss"] == compared["frozen"]["loss"] and frozen["memory_frozen"] is True


def test_standard_input_is_measured(folder: Path, infer: Infer, text: Path) -> None:
    piped = infer(folder, "--perplexity", "-", "--json", stdin=TEXT).json
    assert piped["loss"] == infer(folder, "--perplexity", text, "--json").json["loss"]


def test_ids_have_no_bytes(folder: Path, infer: Infer, text: Path) -> None:
    text.write_text("1 2 3 4", encoding="utf-8")
    result = infer(folder, "--perplexity", text, "--tokenizer", "ids", "--json").json
    assert result["tokens"] == 3 and result["bits_per_byte"] is None
    assert "bits/byte" not in infer(folder, "--perplexity", text, "--tokenizer", "ids").out


@pytest.mark.parametrize("content", [b"", b"x"])
def test_nothing_to_predict(content: bytes, folder: Path, infer: Infer, text: Path) -> None:
    text.write_bytes(content)
    result = infer(folder, "--perplexity", text)
    assert result.status == 2 and "there is nothing to predict" in result.err


def test_the_plot(folder: Path, infer: Infer, text: Path, tmp_path: Path) -> None:
    picture, odd = tmp_path / "p.svg", tmp_path / "$a$ \x01.txt"
    result = infer(folder, "--perplexity", text, "--compare-frozen", "--plot", picture)
    assert f"wrote {picture}" in result.out and result.err == ""
    words = {mark.text for mark in ElementTree.parse(picture).iter(f"{SVG}text")}
    assert {"text.txt: bits per byte", "position in the text (tokens)", "memory live", "memory frozen", "256"} <= words
    odd.write_bytes(TEXT)
    assert infer(folder, "--perplexity", odd, "--plot", picture).status == 0
    assert "$a$ \ufffd.txt: bits per byte" in {mark.text for mark in ElementTree.parse(picture).iter(f"{SVG}text")}
    result = infer(folder, "--perplexity", text, "--plot", "/dev/null/p.svg")
    assert result.status == 2 and "/dev/null/p.svg" in result.err


@pytest.mark.parametrize(
    "buckets",
    [
        [Bucket(0, 128, 127, 2.0), Bucket(128, 256, 128, 1.0), Bucket(256, None, 44, 1.5)],
        [Bucket(0, 128, 1, 7.0)],
        [Bucket(1, 2**21, 2**21 - 1, 0.0), Bucket(2**21, None, 2**39, 1e6)],
    ],
    ids=["three", "one token", "far apart"],
)
def test_the_steps_are_the_buckets(buckets: list[Bucket]) -> None:
    found = Perplexity(sum(bucket.tokens for bucket in buckets), 1.0, buckets, None)
    edges, values = steps_of(report_of(found, ByteCounts(DOUBLING)))
    assert values == [bucket.loss for bucket in buckets]
    assert edges[0] > 0 and all(a < b for a, b in pairwise(edges))
    assert edges[1:-1] == [bucket.stop for bucket in buckets[:-1]] and edges[-1] == found.tokens + 1
    counts = ByteCounts(DOUBLING)
    for bucket in buckets:
        counts.sums[torch.bucketize(torch.tensor(bucket.start), counts.edges, right=True)] = 2 * bucket.tokens
    in_bits = steps_of(report_of(found, counts))[1]
    assert in_bits == [pytest.approx(value / math.log(2) / 2) for value in values]


def test_a_nonfinite_loss_is_null() -> None:
    report = report_of(Perplexity(2, math.nan, [Bucket(0, 128, 2, math.inf)], None), ByteCounts((128,)))
    assert (report["loss"], report["perplexity"], report["bits_per_byte"]) == (None, None, None)
    assert json.loads(json.dumps(report, allow_nan=False))["buckets"][0]["loss"] is None
    assert math.isnan(steps_of(report)[1][0])


def test_the_plot_needs_the_extra(folder: Path, infer: Infer, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = infer(folder, "--perplexity", text, "--plot", text.with_suffix(".svg"))
    assert result.status == 2 and "pip install 'titans-build[analyze]'" in result.err


def test_edges() -> None:
    assert parse_edges("1, 2k,3M") == (1, 2048, 3 * 2**20)
    assert parse_edges(None)[:3] == (128, 256, 512)

from __future__ import annotations

from pathlib import Path

import pytest

from titans_build.registry import RecipeError
from titans_build.tools.data.documents import Bytes, fingerprint, spans_of
from titans_build.tools.data.files import TextFile
from titans_build.tools.data.source import SPLITS


def documents(*sizes: int, prefix: str = "d") -> Bytes:
    return Bytes([TextFile(Path(f"/{i}"), f"{prefix}{i}", size, 0) for i, size in enumerate(sizes)])


def test_whole_documents_of_many_are_held_out():
    many = documents(*range(2, 502))
    spans = {split: spans_of(split, many, 0.1, 0.05)[0] for split in SPLITS}
    chosen = [set(span.documents.tolist()) for span in spans.values()]
    assert set.union(*chosen) == set(range(500)) and sum(map(len, chosen)) == 500
    assert 30 < len(spans["valid"].documents) < 70 and 10 < len(spans["test"].documents) < 40
    for span in spans.values():
        assert (span.starts == 0).all() and (span.stops == many.lengths[span.documents]).all()
    # documents that come later change nothing for those that were there
    more = documents(*range(2, 602))
    later = set(spans_of("valid", more, 0.1, 0.05)[0].documents.tolist())
    assert {document for document in later if document < 500} == chosen[1]
    assert spans_of("valid", many, 0.1, 0.05)[1] == "documents by the hash of their names"


def test_ends_of_few_documents_are_held_out():
    few = documents(1000, 100, 10)
    bounds = {}
    for split in SPLITS:
        spans, held = spans_of(split, few, 0.1, 0.05)
        assert held == "the ends of documents"
        bounds[split] = list(zip(spans.documents.tolist(), spans.starts.tolist(), spans.stops.tolist()))
    assert bounds["train"] == [(0, 0, 850), (1, 0, 85), (2, 0, 9)]
    # one token of the smallest document is held out, which is too little to be asked for
    assert bounds["valid"] == [(0, 850, 950), (1, 85, 95)]
    assert bounds["test"] == [(0, 950, 1000), (1, 95, 100)]


def test_nothing_held_out():
    spans, held = spans_of("train", documents(5, 7, 1), 0, 0)
    assert held == "nothing" and spans.stops.tolist() == [5, 7]
    with pytest.raises(RecipeError, match="valid: a share of 0 of 13 tokens leaves no text for this split"):
        spans_of("valid", documents(5, 7, 1), 0, 0)
    with pytest.raises(RecipeError, match=r"test: a share of 0\.05 of 12 tokens leaves no text"):
        spans_of("test", documents(5, 7), 0.05, 0.05)


def test_fingerprint(tmp_path: Path):
    def written(*texts: str, prefix: str = "d") -> str:
        for number, text in enumerate(texts):
            (tmp_path / str(number)).write_text(text, encoding="utf-8")
        files = [TextFile(tmp_path / str(i), f"{prefix}{i}", len(text), 0) for i, text in enumerate(texts)]
        return fingerprint(Bytes(files))

    long = "a" * 5000
    texts = [("hello", "goodbye"), ("hello", "goodbyes"), ("hello",), ("hallo", "goodbye"), ("hello", "goodbyf")]
    texts += [(long,), (long[:2500] + "b" + long[2501:],)]
    prints = [written(*each) for each in texts]
    assert len({*prints, written(*texts[0], prefix="e")}) == len(texts) + 1
    assert written(*texts[0]) == prints[0]

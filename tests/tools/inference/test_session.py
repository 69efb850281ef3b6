"""A session reads blocks of any sizes in pieces that are worth a call of the model, and knows where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import titans_build as tb
from titans_build.blocks.generation import Sampler
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.inference.codec import Bytes
from titans_build.tools.inference.reading import PIECE
from titans_build.tools.inference.session import Session, check_target
from titans_build.tools.terminal import UsageError


@pytest.mark.parametrize("size", [1, 7, PIECE, PIECE + 1, 3000])
def test_pieces(model: LanguageModel, size: int) -> None:
    text = bytes(range(256)) * 12
    pieces = list(Session(model, Bytes()).pieces(text[at : at + size] for at in range(0, len(text), size)))
    assert bytes(torch.cat(pieces, dim=1)[0].tolist()) == text
    assert [piece.shape[1] for piece in pieces if piece.shape[1]] == [PIECE] * 3


def test_it_knows_where_it_stands(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, Bytes())
    told: list[int] = []
    assert session.read([b"x" * 1500], told.append) == 1500 and told == [PIECE, 1500]
    list(session.answer(5, Sampler()))
    assert session.position == session.at.tokens == 1505
    session.save(tmp_path / "a.state")
    later = Session(model, Bytes())
    later.load(tmp_path / "a.state")
    assert later.position == 1505 and later.read([b"yz"]) == 2
    assert later.position == 1507 and later.at.tokens == 2
    later.reset()
    assert later.position == 0


def test_nothing_read_is_nothing_to_go_on_from(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, Bytes())
    assert session.read([b""]) == 0
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(session.answer(1, Sampler()))
    session.save(tmp_path / "a.state")  # a fresh state is a state
    tb.load_state(tmp_path / "a.state", model)
    session.load(tmp_path / "a.state")
    with pytest.raises(UsageError, match=r"without what comes next: give it at least a line end, \$'\\n'"):
        next(session.answer(1, Sampler()))


def test_targets(tmp_path: Path, model: LanguageModel) -> None:
    tb.save_state(model.init_state(1), tmp_path / "a.state", model)
    check_target(tmp_path / "a.state", "--save")
    check_target(tmp_path / "new.state", "--save")
    tb.save(model, tmp_path / "model")
    weights = next((tmp_path / "model").glob("*.safetensors"))
    for path in (tmp_path, tmp_path / "no" / "a.state", weights, tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="--save"):
            check_target(path, "--save")

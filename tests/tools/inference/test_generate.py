"""A prompt and its answer: what is read, printed and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.blocks.generation import Sampler
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.inference import position
from titans_build.tools.inference.generate import before_stop, saving_state, without_control
from titans_build.tools.inference.session import Session
from titans_build.tools.inference.tokenizer import ByteTokenizer

Infer = Callable[..., Any]
PROMPT = "a prompt of some words"


def generated(model: LanguageModel, prompt: str, count: int, **settings: Any) -> list[int]:
    tokens = torch.tensor([list(prompt.encode())])
    return model.generate(tokens, count, **settings).tokens[0, tokens.shape[1] :].tolist()


def test_an_answer_is_that_of_generate(folder: Path, model: LanguageModel, infer: Infer) -> None:
    result = infer(folder, "a prompt", "of some words", "--max-new-tokens", "30")
    expected = generated(model, PROMPT, 30)
    assert result == (0, bytes(expected).decode(errors="replace"), "")
    settings = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.8", "--seed", "7"]
    found = infer(folder, PROMPT, "--max-new-tokens", "30", "--json", *settings).json
    assert found["tokens"] == generated(model, PROMPT, 30, temperature=0.9, top_k=50, top_p=0.8, seed=7)
    assert found["text"] == bytes(found["tokens"]).decode(errors="replace")


def test_json_of_an_answer(folder: Path, infer: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    found = infer(folder, PROMPT, "--state", state, "--max-new-tokens", "5", "--json").json
    assert found["model"] == str(folder) and found["state"] == str(state)
    assert found["read"]["tokens"] == len(PROMPT) and found["generated"]["tokens"] == 5 == len(found["tokens"])
    assert found["position"] == len(PROMPT) + 5 and found["memory_frozen"] is False
    assert found["read"]["tokens_per_second"] > 0 and found["generated"]["seconds"] > 0
    assert infer(folder, "x", "--state", state, "--fork", "--json").json["state"] is None
    error = infer(folder, "", "--json").json["error"]
    assert error["status"] == 2 and "the prompt is empty" in error["message"]


def test_several_questions_are_answered_apart_after_one_text(folder: Path, infer: Infer, tmp_path: Path) -> None:
    book, state = tmp_path / "book.txt", tmp_path / "book.state"
    book.write_text("a prompt ", encoding="utf-8")
    settings = ["--max-new-tokens", "9", "--temperature", "1", "--seed", "3"]
    questions = ["--question", "of some words", "--question", "Who?"]
    alone = [infer(folder, "--file", book, question, *settings).out for question in questions[1::2]]
    assert infer(folder, "--file", book, *questions, *settings).out == "".join(answer + "\n" for answer in alone)
    found = infer(folder, "--file", book, *questions, *settings, "--state", state, "--json").json
    assert [answer["text"] for answer in found["answers"]] == alone
    assert [answer["question"] for answer in found["answers"]] == questions[1::2]
    assert [answer["read"]["tokens"] for answer in found["answers"]] == [13, 4]
    assert found["read"]["tokens"] == found["position"] == 9  # the state is that after the text
    again = infer(folder, "--state", state, *questions, *settings, stdin=b"not read")
    assert again.out == "".join(answer + "\n" for answer in alone)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--chat"], "--question: answers and ends"),
        (["--max-new-tokens", "0"], "--question: has no answer"),
        (["--question", ""], "--question: expected a text"),
        (["--perplexity", "a.txt"], "it takes no --question"),
    ],
)
def test_questions_that_cannot_be_asked(folder: Path, infer: Infer, words: list[str], message: str) -> None:
    result = infer(folder, "--question", "Who?", *words)
    assert result.status == 2 and message in result.err


def test_files_and_standard_input_and_words(folder: Path, infer: Infer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a prompt ", encoding="utf-8")
    whole = infer(folder, PROMPT).out
    assert infer(folder, stdin=PROMPT.encode()).out == whole
    assert infer(folder, "--file", tmp_path / "a.txt", "of some words", stdin=b"not read").out == whole
    assert infer(folder, "--file", tmp_path / "a.txt", "--file", "-", stdin=b"of some words").out == whole


def test_two_sessions_with_a_state_are_one(folder: Path, infer: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    said = infer(folder, "a prompt ", "--state", state, "--max-new-tokens", "0")
    assert said.status == 0 and "9 tokens read, " in said.out and f"saved to {state}" in said.out
    assert infer(folder, "of some words", "--state", state).out == infer(folder, PROMPT).out
    # the state has read the answer
    found = infer(folder, "!", "--state", state, "--json", "--max-new-tokens", "0").json
    assert found["position"] == len(PROMPT) + 128 + 1


def test_a_fork_leaves_the_state_as_it_was(folder: Path, infer: Infer, tmp_path: Path) -> None:
    state, other = tmp_path / "a.state", tmp_path / "b.state"
    infer(folder, "a prompt ", "--state", state, "--max-new-tokens", "0")
    before = state.read_bytes()
    answers = {
        infer(folder, "of some words", "--state", state, *words).out for words in (["--fork"], ["--save", other])
    }
    assert answers == {infer(folder, PROMPT).out}
    assert state.read_bytes() == before
    model = tb.load(folder)
    assert position(model, tb.load_state(other, model)) == len(PROMPT) + 128
    infer(folder, "x", "--save", other)  # a state of no earlier session, over one that was saved
    assert position(model, tb.load_state(other, model)) == 1 + 128


def test_no_write_keeps_the_memory(folder: Path, infer: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    infer(folder, PROMPT, "--state", state, "--max-new-tokens", "0")
    model = tb.load(folder)

    def weights() -> list[torch.Tensor]:
        loaded = tb.load_state(state, model)
        return [
            tensor
            for name, tensor in tb.state.named_tensors(loaded)
            if ".memory.weights." in name and "snapshot" not in name
        ]

    before = weights()
    assert infer(folder, PROMPT, "--state", state, "--no-write", "--json").json["memory_frozen"] is True
    assert before and all(torch.equal(a, b) for a, b in zip(before, weights()))
    infer(folder, PROMPT, "--state", state)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights()))


def test_stop_ends_the_answer(folder: Path, infer: Infer) -> None:
    said = infer(folder, PROMPT, "--tokenizer", "bytes").out
    stop = said[20:23]
    result = infer(folder, PROMPT, "--stop", stop, "--json").json
    assert result["text"] == said[: said.index(stop)]
    assert result["generated"]["tokens"] < 128


def test_ids_in_and_out(folder: Path, infer: Infer, model: LanguageModel) -> None:
    result = infer(folder, "1 2 3", "--tokenizer", "ids", "--max-new-tokens", "4")
    assert [int(word) for word in result.out.split()] == generated(model, "\1\2\3", 4)


def session(model: LanguageModel, target: Path | None = None) -> Session:
    return Session(model, ByteTokenizer(), target)


def test_an_interruption_saves_complete_pieces(model: LanguageModel, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    reading = session(model, state)

    def interrupted() -> Iterator[bytes]:
        yield b"x" * 1500
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt, saving_state(reading):
        reading.read(interrupted())
    assert str(interrupt.value) == f"interrupted; the state after 1,024 tokens of this session is saved to {state}"
    assert position(model, tb.load_state(state, model)) == 1024


def test_an_interruption_before_anything_was_read_writes_nothing(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt, saving_state(session(model, tmp_path / "a.state")):
        raise KeyboardInterrupt
    assert str(interrupt.value) == "" and not list(tmp_path.iterdir())


def test_an_interrupted_answer_saves_complete_tokens(model: LanguageModel, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    reading = session(model, state)
    reading.read([PROMPT.encode()])
    with pytest.raises(KeyboardInterrupt), saving_state(reading):
        for index, _ in enumerate(reading.generate(1000, Sampler(1.0, seed=0))):
            if index == 5:
                raise KeyboardInterrupt
    count = position(model, tb.load_state(state, model))
    assert count == reading.position and count is not None and count > len(PROMPT)
    # and it is the state after exactly those tokens
    follow = session(model)
    follow.read([PROMPT.encode()])
    tokens: list[int] = []
    for _ in follow.generate(count - len(PROMPT), Sampler(1.0, seed=0), tokens.append):
        pass
    for (name, a), (_, b) in zip(
        tb.state.named_tensors(reading.reading.state), tb.state.named_tensors(follow.reading.state)
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("parts", [["a", "b", "E", "N", "D", "c"], ["abE", "NDc"], ["abENDc"], ["ab", "ENDc"]], ids=str)
def test_an_answer_ends_before_the_stop(parts: list[str]) -> None:
    assert "".join(before_stop(parts, ["END"])) == "ab"
    assert "".join(before_stop(parts, ["D", "bE"])) == "a"
    assert "".join(before_stop(parts, [])) == "abENDc"
    assert "".join(before_stop(parts, ["none"])) == "abENDc"


def test_the_first_stop_in_the_text_counts() -> None:
    assert "".join(before_stop(["abcdef"], ["ef", "cd"])) == "ab"


def test_the_beginning_of_a_stop_is_held_back_and_not_lost() -> None:
    texts = before_stop(iter(["xE", "N", "", "yEN"]), ["END"])
    assert next(texts) == "x"
    assert next(texts) == "ENy"
    assert list(texts) == ["EN"]


def test_generation_ends_at_the_stop() -> None:
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        while True:
            taken.append(1)
            yield "ab"

    assert "".join(before_stop(endless(), ["bab"])) == "a"
    assert len(taken) == 2


def test_control_characters_become_pictures() -> None:
    assert without_control("a\x1b[2J\r\x7f\x9b\té\n") == "a\u241b[2J\u240d\u2421\ufffd\té\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the same vocabulary."""
    place = tmp_path_factory.mktemp("drafts") / "small"
    tb.save(tb.build(tb.load_recipe("lmm", overrides={"dim": 8, "layers.lmm.0.heads": 1}), seed=1), place)
    return place


@pytest.mark.parametrize("draft", ["prompt", "model"])
def test_an_answer_with_a_draft_is_that_without(
    draft: str, folder: Path, small: Path, infer: Infer, tmp_path: Path
) -> None:
    words = [PROMPT * 4, "--max-new-tokens", "70", "--json"]
    plain = infer(folder, *words, "--state", tmp_path / "plain.state").json
    name = small if draft == "model" else draft
    found = infer(folder, *words, "--state", tmp_path / "draft.state", "--draft", name).json
    assert found["tokens"] == plain["tokens"] and found["position"] == plain["position"]
    assert found["drafted"]["calls"] > 0 and found["drafted"]["accepted"] <= found["drafted"]["proposed"]
    assert "drafted" not in plain
    # a stop inside of the tokens that are checked together
    stop = ["--stop", plain["text"][20:23]]
    plain = infer(folder, *words, *stop, "--save", tmp_path / "a.state").json
    found = infer(folder, *words, *stop, "--save", tmp_path / "b.state", "--draft", name).json
    assert [found["text"], found["tokens"], found["position"]] == [plain["text"], plain["tokens"], plain["position"]]
    model = tb.load(folder)
    states = [tb.load_state(tmp_path / file, model) for file in ("a.state", "b.state")]
    for (path, a), (_, b) in zip(*map(tb.state.named_tensors, states)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=path)


def test_questions_with_a_draft_are_answered_apart(folder: Path, infer: Infer) -> None:
    words = [PROMPT * 3, "--question", "Who?", "--question", "Where?", "--max-new-tokens", "40"]
    assert infer(folder, *words, "--draft", "prompt").out == infer(folder, *words).out


def test_a_draft_that_does_not_fit_is_refused(folder: Path, infer: Infer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tb.save(tb.build(tb.load_recipe("lmm", overrides={"dim": 8, "vocab": 300, "layers.lmm.0.heads": 1}), seed=0), other)
    result = infer(folder, PROMPT, "--draft", other)
    assert result.status == 2 and "--draft: a vocabulary of 300 tokens: expected 256" in result.err
    result = infer(folder, PROMPT, "--draft", tmp_path / "none")
    assert result.status == 2 and "none: no such folder" in result.err
    result = infer(folder, PROMPT, "--draft", "promt")
    assert (
        result.status == 2
        and "--draft: promt: no such folder" in result.err
        and "; did you mean 'prompt'?" in result.err
    )
    result = infer(folder, "--perplexity", "text", "--draft", "prompt")
    assert result.status == 2 and "it takes no --draft" in result.err

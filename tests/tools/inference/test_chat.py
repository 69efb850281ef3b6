"""Chatting through a pipe; ``test_infer`` chats on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.tools.inference import position
from titans_build.tools.inference.chat import unescaped

Infer = Callable[..., Any]


def read(folder: Path, state: Path) -> int | None:
    model = tb.load(folder)
    return position(model, tb.load_state(state, model))


@pytest.fixture
def chat(folder: Path, infer: Infer) -> Callable[..., Any]:
    def run(*lines: str, words: tuple[object, ...] = ()) -> Any:
        return infer(folder, "--chat", "--max-new-tokens", "6", *words, stdin="".join(f"{x}\n" for x in lines).encode())

    return run


def test_lines_and_answers_are_one_text(folder: Path, infer: Infer, chat: Infer, tmp_path: Path) -> None:
    state, same = tmp_path / "a.state", tmp_path / "b.state"
    result = chat("one", "two", words=("--state", state))
    answers = [infer(folder, f"{line}\n", "--state", same, "--max-new-tokens", "6").out for line in ("one", "two")]
    assert result == (0, "".join(answer if answer.endswith("\n") else f"{answer}\n" for answer in answers), "")
    assert read(folder, state) == read(folder, same) == 2 * (4 + 6)


def test_a_prompt_is_read_before_the_first_line(folder: Path, chat: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    assert chat(words=("a prompt", "--state", state)).out == ""
    assert read(folder, state) == 8


def test_template(folder: Path, chat: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    chat("one", words=("--state", state, "--template", r"Q: {line}\nA:"))
    assert read(folder, state) == len("Q: one\nA:") + 6
    chat("//one", words=("--save", state, "--template", "{line}"))
    assert read(folder, state) == len("/one") + 6


def test_commands(folder: Path, chat: Infer, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.state" for name in "abc")
    result = chat(
        "one",
        f"/save {second}",
        "/save",
        "two",
        f"/load {second}",
        f"/fork {third}",
        "/freeze",
        "/freeze",
        "three",
        "/thaw",
        "/help",
        "/quit",
        "not read",
        words=("--state", first),
    )
    assert result.status == 0 and result.err == ""
    for said in (
        f"(saved to {second})",
        f"(saved to {first})",
        f"(continues from {second}; the state is saved to {first} at the end)",
        f"(forked; the state is saved to {third} at the end)",
        "memories frozen)",
        "(no memory was left to freeze)",
        "(the memory learns again)",
        "/fork [FILE]",
    ):
        assert said in result.out
    assert (read(folder, first), read(folder, second)) == (10, 10)
    assert read(folder, third) == 10 + len("three\n") + 6


def test_a_fork_without_a_file_saves_nothing(chat: Infer, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    assert "(forked: nothing is saved at the end)" in chat("one", "/fork", words=("--state", state)).out
    assert not state.exists()


def test_reset(folder: Path, chat: Infer, tmp_path: Path) -> None:
    result = chat("one", "/reset", "two", words=("--state", tmp_path / "a.state"))
    assert result.out.partition("(the state is reset)\n")[2] == chat("two").out
    assert read(folder, tmp_path / "a.state") == 4 + 6


def test_an_error_is_reported_and_the_chat_continues(folder: Path, chat: Infer, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    state = tmp_path / "a.state"
    result = chat("/lod x", "/load", "/load none", f"/load {tmp_path / 'junk'}", f"/save {tmp_path / 'junk'}",
                  "/save", "one", f"/save {state}")  # fmt: skip
    assert result.status == 0
    errors = result.err.split("titans-infer: error: ")[1:]
    for error, fragment in zip(
        errors,
        (
            "there is no command /lod; did you mean 'load'?",
            "/load: expected the name of a file",
            "none: no such file",
            "junk",
            "no saved state, which would be replaced",
            "/save: expected the name of a file, since there is no --state",
        ),
    ):
        assert fragment in error
    assert len(errors) == 6
    assert read(folder, state) == 4 + 6 and (tmp_path / "junk").read_bytes() == b"junk"


def test_lines_may_be_invalid_text(chat: Infer, infer: Infer, folder: Path) -> None:
    result = infer(folder, "--chat", stdin=b"\xff\xfe\n")
    assert result.status == 0 and result.out != "" and result.err == ""


def test_escapes_in_a_template() -> None:
    assert unescaped(r"a\n\tb\\n") == "a\n\tb\\n"

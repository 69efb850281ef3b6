"""Answers end where they should, and no control character reaches a terminal."""

from __future__ import annotations

import pytest

from titans_build.tools.inference.speaking import shown, until


@pytest.mark.parametrize("parts", [["a", "b", "E", "N", "D", "c"], ["abE", "NDc"], ["abENDc"], ["ab", "ENDc"]], ids=str)
def test_an_answer_ends_before_the_stop(parts: list[str]) -> None:
    assert "".join(until(parts, ["END"])) == "ab"
    assert "".join(until(parts, ["D", "bE"])) == "a"
    assert "".join(until(parts, [])) == "abENDc"
    assert "".join(until(parts, ["none"])) == "abENDc"


def test_the_first_stop_in_the_text_counts() -> None:
    assert "".join(until(["abcdef"], ["ef", "cd"])) == "ab"


def test_what_may_begin_a_stop_is_held_back_and_not_lost() -> None:
    texts = until(iter(["xE", "N", "", "yEN"]), ["END"])
    assert next(texts) == "x"
    assert next(texts) == "ENy"
    assert list(texts) == ["EN"]


def test_nothing_is_taken_after_the_stop() -> None:
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        while True:
            taken.append(1)
            yield "ab"

    assert "".join(until(endless(), ["bab"])) == "a"
    assert len(taken) == 2


def test_control_characters_are_pictures() -> None:
    assert shown("a\x1b[2J\r\x7f\x9b\té\n") == "a\u241b[2J\u240d\u2421\ufffd\té\n"

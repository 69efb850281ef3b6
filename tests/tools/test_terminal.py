"""Numbers in short form, wrapped text, tables, and progress bars that only a terminal shows."""

from __future__ import annotations

import io
import sys

import pytest

from titans_build.tools import terminal


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (123456, "123,456"),
        (1e6, "1.00M"),
        (5_178_624, "5.18M"),
        (1.31e9, "1.31G"),
        (2.5e12, "2.50T"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert terminal.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(16, "16 B"), (1024, "1.0 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**31, "2.0 GiB"), (2**41, "2.0 TiB")],
)
def test_in_bytes(number: float, text: str) -> None:
    assert terminal.in_bytes(number) == text


def test_plain() -> None:
    assert terminal.plain("``x`` and :func:`~a.b` and :class:`C`") == "x and a.b and C"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, shown in ((Screen(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with terminal.progress("working", 2) as advance:
            advance()
            advance()
        assert ("working" in stream.getvalue()) is shown


def test_no_color_is_respected_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for setting, colored in ((None, True), ("1", False)):
        if setting is not None:
            monkeypatch.setenv("NO_COLOR", setting)
        stream = Screen()
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.complain("something")
        assert ("\x1b[1;31m" in stream.getvalue()) is colored
        assert "something" in stream.getvalue()


@pytest.mark.parametrize(
    ("said", "width"), [("40", 40), ("5", 24), ("0", None), ("", None), ("wide", None), ("-3", None), ("9" * 50, None)]
)
def test_the_width_is_that_of_columns(said: str, width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", said)
    assert terminal.terminal_width(io.StringIO()) == width
    if width is None:  # some width that the system knows
        assert terminal.terminal_width(Screen()) is not None


def test_wrap_breaks_between_words_and_indents() -> None:
    lines = terminal.wrap("one two three four five six seven", 20, "label: ", "  ")
    assert [line.plain for line in lines] == ["label: one two three", "  four five six", "  seven"]
    assert [line.plain for line in terminal.wrap("", 20, "label: ")] == ["label:"]
    folded = [line.plain for line in terminal.wrap("x" * 50, 24, "", "    ")]
    assert "".join(line.strip() for line in folded) == "x" * 50 and all(len(line) <= 24 for line in folded)


def rows() -> terminal.Columns:
    table = terminal.Columns("name", "meaning")
    table.add("short", "what takes many words to say, more than there is room for in a narrow terminal")
    table.add("", "another of the same")
    return table


def test_a_table_that_is_too_wide_is_stacked() -> None:
    assert [line.plain for line in rows().lines(50)][:2] == [
        "name   meaning",
        "short  what takes many words to say, more than",
    ]
    assert [line.plain for line in rows().lines(24)] == [
        "short",
        "  meaning: what takes",
        "    many words to say,",
        "    more than there is",
        "    room for in a narrow",
        "    terminal",
        "  meaning: another of",
        "    the same",
    ]
    for width in (24, 30, 40, 80):
        assert all(line.cell_len <= width and line.plain == line.plain.rstrip() for line in rows().lines(width))


def test_paragraphs_become_one_line_and_lists_keep_theirs() -> None:
    assert terminal.paragraphs("a b\nc\n\n- d\n- e\n\nf\ng") == ["a b c", "", "- d", "- e", "", "f g"]

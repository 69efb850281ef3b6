"""Numbers as people read them, and progress that only shows to a person."""

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


def test_progress_shows_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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
    for setting, coloured in ((None, True), ("1", False)):
        if setting is not None:
            monkeypatch.setenv("NO_COLOR", setting)
        stream = Screen()
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.complain("something")
        assert ("\x1b[1;31m" in stream.getvalue()) is coloured
        assert "something" in stream.getvalue()

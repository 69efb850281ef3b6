"""Reading a command line: ``argparse`` with errors that can be caught, and help that fits its terminal."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import Any, NoReturn

from ..registry import nearest
from .terminal import UsageError

MOST_HANGING = 40
"""Columns that a remark needs beside its command; in fewer it goes under it."""


class Layout(argparse.HelpFormatter):
    """Wraps everything to the terminal, between words alone; lines of an epilog stay lines."""

    def _format_usage(self, *arguments: Any) -> str:
        width, self._width = self._width, 10_000
        try:
            line = super()._format_usage(*arguments).strip()
        finally:
            self._width = width
        # options stand under each other where all have room there
        options = re.findall(r"\[[^\]]*\]|\S+", line)
        column = line.find(" [") + 1
        column = column if column + max(map(len, options)) <= width else 4
        together = " ".join(option.replace(" ", "\0") for option in options)
        wrapped = textwrap.wrap(
            together, width, subsequent_indent=" " * column, break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(wrapped).replace("\0", " ") + "\n\n"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(line for row in text.splitlines() for line in _fit(indent + row, width))


def _fit(line: str, width: int) -> list[str]:
    """``line`` in lines of ``width``: what goes on stands under the remark after the command, or further in."""
    if len(line) <= width:
        return [line]
    command, remark = line, ""
    margin = len(line) - len(line.lstrip())
    column = margin + 4 if margin else 0
    parted = re.fullmatch(r"( *\S.*?) {2,}(\S.*)", line)
    if parted and parted.start(2) + MOST_HANGING <= width:
        column, command, remark = parted.start(2), line[: parted.start(2)], parted[2]
    elif parted:
        command, remark = parted[1], parted[2]

    def wrap(text: str, first: str) -> list[str]:
        under = " " * column
        return textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=under, break_long_words=False, break_on_hyphens=False
        )

    if not remark:
        return wrap(line.lstrip(), " " * margin)
    if len(command) == column:
        return wrap(remark, command)
    return [*_fit(command, width), *wrap(remark, " " * column)]


class Parser(argparse.ArgumentParser):
    """Raises what ``argparse`` would print before leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError`` with the message and the usage."""
        raise UsageError(f"{message}{self._nearest(message)}\n{self.format_usage().strip()}\ntry: {self.prog} --help")

    def _nearest(self, message: str) -> str:
        unknown = re.fullmatch(r"unrecognized arguments: (--?[\w-]+).*", message, re.DOTALL)
        return nearest(unknown[1], list(self._option_string_actions)) if unknown else ""

"""Terminal output: text, tables, JSON and progress bars; and the errors that end a command."""

from __future__ import annotations

import contextlib
import contextvars
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160
"""Columns of a table when the output is a file or a pipe."""
NARROWEST = 24
"""The smallest width that output is wrapped to."""


class UsageError(Exception):
    """Bad use of a command: exit status 2. The message is printed as it is."""


class CommandFailed(Exception):
    """A command that was used correctly failed: exit status 1. The message is printed as it is."""


@contextlib.contextmanager
def first_process_first(errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Raise an error that all processes of ``torchrun`` find at once in the first process, and later in the others.

    ``torchrun`` ends them before, and shows one error. ``errors``: the types of such errors.
    """
    try:
        yield
    except errors:
        if os.environ.get("RANK", "0") != "0":
            from ..blocks.parallel import WAIT

            time.sleep(WAIT)
        raise


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error, where rich would end the process."""
        raise


def console(stream: TextIO | None = None) -> Console:
    """A console on ``stream`` (default: standard output). Colors need a terminal and no ``NO_COLOR``."""
    stream = stream if stream is not None else sys.stdout
    width = terminal_width(stream) or PIPED_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def terminal_width(stream: TextIO | None = None) -> int | None:
    """``$COLUMNS``, or the width of the terminal of ``stream`` (default: standard output); ``None`` in a pipe."""
    stream = stream if stream is not None else sys.stdout
    said = os.environ.get("COLUMNS", "")
    if said.isascii() and said.isdigit() and 0 < len(said) < 6 and int(said) > 0:
        return max(int(said), NARROWEST)
    return max(shutil.get_terminal_size().columns, NARROWEST) if stream.isatty() else None


def say(*lines: str | Text) -> None:
    """Print lines to standard output without wrapping them. Control characters are escaped."""
    with _heard():
        for line in lines:
            console().print(_printable(line, sys.stdout), soft_wrap=True)


_IN_ASCII = str.maketrans({"│": "|", "├": "|", "└": "`", "×": "x"})
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that may command a terminal or reorder its text, except for newlines and tabs."""


def escape_controls(text: str) -> str:
    """``text`` with an escape sequence such as ``\\x1b`` for each control character but newlines and tabs."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _printable(line: str | Text, stream: TextIO) -> Text:
    """``line`` without control characters and in the stream's encoding. What is printed may come from any file."""
    if isinstance(line, str):
        text = Text(escape_controls(line))
    else:
        edges = sorted({edge for match in _CONTROLS.finditer(line.plain) for edge in match.span()})
        pieces = line.divide(edges) if edges else [line]
        text = Text.assemble(*(Text(escape_controls(p.plain)) if _CONTROLS.match(p.plain) else p for p in pieces))
    if not _is_unicode(stream):
        text.plain = text.plain.translate(_IN_ASCII)
    return text


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Where a program does not need the reader of its output: if that has ended (``| head``), discard the output."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if _needs_reader.get():
            raise
        discard_output()


def discard_output() -> None:
    """Discard what is written to standard output from now on, and what is in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unicode(stream: TextIO) -> bool:
    return (stream.encoding or "utf-8").lower().replace("-", "").startswith("utf")


def prepare_streams() -> None:
    """Make standard output accept any text: characters outside of its encoding are escaped.

    If a stream is closed, what is written to it is discarded.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process runs
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say_prose(*paragraphs: str | Text) -> None:
    """Print text to standard output, wrapped to the terminal's width."""
    width = terminal_width()
    for paragraph in paragraphs:
        say(*([paragraph] if width is None else wrap(paragraph, width)))


def wrap(text: str | Text, width: int, first: str | Text = "", under: str | Text = "") -> list[Text]:
    """``text`` in lines of at most ``width``; the first begins with ``first``, the others with ``under``.

    A word that is longer than a line is broken, not cut.
    """
    lead = Text.assemble(first)
    indent = Text.assemble(under).cell_len
    room = max(width - indent, NARROWEST // 2)
    # a placeholder reserves the room that the lead takes beyond the indent; spaces would be trimmed
    ahead = max(lead.cell_len - indent, 0)
    whole = Text.assemble("x" * ahead, text)
    lines = whole.wrap(console(), room, overflow="fold") or [Text()]
    found = [lead.append_text(lines[0][ahead:]), *(Text.assemble(under, line) for line in lines[1:])]
    for line in found:
        line.rstrip()
    return found


_program = contextvars.ContextVar("program", default="titans-build")
_needs_reader = contextvars.ContextVar("needs_reader", default=True)


@contextlib.contextmanager
def program(name: str, *, needs_reader: bool = True) -> Iterator[None]:
    """Inside the block, messages of :func:`complain` begin with ``name``.

    ``needs_reader``: whether printing raises ``BrokenPipeError`` if the reader of standard output has ended.
    """
    tokens = _program.set(name), _needs_reader.set(needs_reader)
    try:
        yield
    finally:
        _program.reset(tokens[0])
        _needs_reader.reset(tokens[1])


def complain(message: str, label: str = "error") -> None:
    """Print ``PROGRAM: LABEL: MESSAGE`` to standard error. Control characters are escaped."""
    style = "bold red" if label == "error" else "bold yellow"
    text = _printable(Text.assemble((f"{_program.get()}: {label}: ", style), message), sys.stderr)
    with contextlib.suppress(OSError):  # a closed pipe or terminal: nobody reads it, and the exit status says the same
        console(sys.stderr).print(text, soft_wrap=True)


def say_json(value: Any, *, in_one_line: bool = False) -> None:
    """Print a JSON document to standard output."""
    escaped = not _is_unicode(sys.stdout)
    text = json.dumps(value, indent=None if in_one_line else 2, ensure_ascii=escaped, allow_nan=False)
    with _heard():
        sys.stdout.write(text + "\n")


class Columns:
    """A table. Where it is wider than the terminal, the cells of a row stand one under the other.

    The columns named in ``right`` are aligned to the right. A column whose cells have several lines keeps these lines.
    """

    GAP = 2
    COMFORT = 20
    """The width to which columns of text are narrowed at most."""

    def __init__(self, *headings: str, right: Sequence[str] = ()) -> None:
        self.headings = headings
        self.right = right
        self.rows: list[list[Text]] = []

    def add(self, *cells: str | Text) -> None:
        """Add a row with a cell for each heading."""
        self.rows.append([Text(cell) if isinstance(cell, str) else cell for cell in cells])

    def lines(self, width: int) -> list[Text]:
        """The table in lines of at most ``width``."""
        least = [self._least_width(index) for index in range(len(self.headings))]
        if sum(least) + self.GAP * (len(least) - 1) > width:
            return list(self._stacked(width))
        table = Table(box=None, pad_edge=False, padding=(0, self.GAP, 0, 0), header_style="bold", show_edge=False)
        for heading, narrow in zip(self.headings, least):
            table.add_column(
                heading, min_width=narrow, overflow="fold", justify="right" if heading in self.right else "left"
            )
        for row in self.rows:
            table.add_row(*row)
        target = console()
        rendered = target.render_lines(table, target.options.update(width=width), pad=False)
        lines = [Text.assemble(*((part.text, part.style or "") for part in line)) for line in rendered]
        for line in lines:
            line.rstrip()
        return lines

    def _least_width(self, index: int) -> int:
        cells = [self.headings[index], *(row[index].plain for row in self.rows)]
        natural = max(len(line) for cell in cells for line in cell.splitlines() or [""])
        if self.headings[index] in self.right or any("\n" in cell for cell in cells):
            return natural
        longest_word = max(len(word) for cell in cells for word in cell.split() or [""])
        return min(natural, max(longest_word, self.COMFORT), 2 * self.COMFORT)

    def _stacked(self, width: int) -> Iterator[Text]:
        for row in self.rows:
            if row[0].plain:
                yield from wrap(row[0], width)
            for heading, cell in zip(self.headings[1:], row[1:]):
                if cell.plain:
                    yield from wrap(cell, width, Text(f"  {heading}: ", style="dim"), "    ")


def say_columns(rows: Columns) -> None:
    """Print a table to standard output."""
    say(*rows.lines(terminal_width() or PIPED_WIDTH))


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if that is a terminal; call the yielded function after each step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    description_column = TextColumn("{task.description}", markup=False)
    parts = (description_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(escape_controls(description), total=total)
        yield lambda: bar.advance(task)


def plain(text: str) -> str:
    """A docstring's text without reStructuredText markup."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


def paragraphs(text: str) -> list[str]:
    """A docstring's paragraphs, each in one line; indented text and lists keep their lines."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        shaped = any(line[:1] in (" ", "-", "*") for line in lines)
        found += ["", *lines] if shaped else ["", " ".join(lines)]
    return found[1:]


def count(number: float) -> str:
    """A number in short form: ``1,234``, ``5.68M``, ``1.31G``."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}"


def in_bytes(number: float) -> str:
    """A size in bytes: ``512 B``, ``1.5 MiB``."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(number) >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"

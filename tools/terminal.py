"""The terminal: what goes to it, in which form, and the errors that end a command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160
"""Columns when the output is a file or a pipe, where there is no edge to wrap at."""


class UsageError(Exception):
    """The user asked for something that cannot be: exit status 2. The message is shown as it is."""


def console(stream: TextIO | None = None) -> Console:
    """A console on ``stream`` (standard output), coloured only where a person reads and NO_COLOR is not set."""
    stream = stream if stream is not None else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(file=stream, width=PIPED_WIDTH if piped else None, highlight=False, markup=False, emoji=False)


def say(*parts: str | Text | Table) -> None:
    """Print to standard output; text is never cut or wrapped by us."""
    for part in parts:
        console().print(part, soft_wrap=not isinstance(part, Table))


def complain(message: str, label: str = "error") -> None:
    """One message to standard error."""
    style = "bold red" if label == "error" else "bold yellow"
    console(sys.stderr).print(Text.assemble((f"titans-build: {label}: ", style), message), soft_wrap=True)


def say_json(value: Any) -> None:
    """One JSON document to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def columns(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table with a line under its headings; the columns named in ``right`` are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for heading in headings:
        numeric = heading in right
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error while the block runs, if a person is looking; call the yielded function per step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*parts, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def plain(text: str) -> str:
    """A docstring's text without the marks that only a page of documentation renders."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


def count(number: float) -> str:
    """A number as people say it: ``1,234``, ``5.68M``, ``1.31G``."""
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

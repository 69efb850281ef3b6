"""A bar for reading: how much of the text, how many tokens, how fast."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from ..terminal import console
from .sources import Text


@contextlib.contextmanager
def reading_bar(text: Text, description: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while the block runs, if a person is looking.

    The yielded function is told how many tokens of ``text`` have been read so far.
    """
    if not sys.stderr.isatty() or text.size == 0:
        yield lambda tokens: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f}/s")
    columns = (TextColumn("{task.description}"), BarColumn(), said, TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(description, total=text.size, tokens=0, speed=0)

        def advance(tokens: int) -> None:
            seconds = max(time.perf_counter() - started, 1e-9)
            bar.update(task, completed=text.read, tokens=tokens, speed=tokens / seconds)

        yield advance

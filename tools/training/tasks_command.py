"""``titans-train tasks``: the generated tasks that ``--data`` accepts."""

from __future__ import annotations

import argparse
import dataclasses

from rich.text import Text

from ...registry import nearest, show
from ..tasks import list_tasks, task_rows
from ..terminal import Columns, UsageError, plain, say_columns, say_json

SUMMARY = "List the tasks that --data accepts, with their settings and defaults."
EXAMPLES = ("titans-train tasks", "titans-train tasks 'needle*'      names that match a wildcard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pattern."""
    parser.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="a wildcard over names (default: all)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the tasks whose names match."""
    rows = task_rows(arguments.pattern)
    if not rows:
        raise UsageError(f"no task is called {show(arguments.pattern)}{nearest(arguments.pattern, list_tasks())}")
    if arguments.json:
        tasks = [{**row._asdict(), "fields": [dataclasses.asdict(field) for field in row.fields]} for row in rows]
        say_json({"tasks": tasks}, in_one_line=True)
        return 0
    table = Columns("task", "description", "settings and defaults")
    for row in rows:
        if row.problem is not None:
            table.add(row.name, Text(f"{row.problem} (from {row.source})", style="yellow"), "")
            continue
        source = "" if row.source == "titans_build" else f" (from {row.source})"
        settings = ", ".join(f.name if f.required else f"{f.name}={show(f.default)}" for f in row.fields)
        table.add(Text(row.name, style="bold cyan"), plain(row.summary) + source, settings)
    say_columns(table)
    return 0

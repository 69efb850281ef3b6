"""``titans-build kernels``: how every operation would run on a device, and why a faster way is not taken."""

from __future__ import annotations

import argparse
import os

from rich.text import Text

from ..kernels import dispatch
from .options import add_placement, placement
from .terminal import Columns, complain, say_columns, say_json, say_prose

SUMMARY = "Show every operation, its backends, which one is taken, and why the others are not."
EXAMPLES = (
    "titans-build kernels",
    "titans-build kernels --device cuda --dtype bfloat16",
    f"{dispatch.VARIABLE}=attention=reference titans-build kernels",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Device and dtype."""
    add_placement(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 2 when the environment asks for a backend that there is not."""
    device, dtype = placement(arguments.device, arguments.dtype)
    rows = dispatch.table(device.type, dtype)
    # running any such operation would end with the same words
    problems = list(dict.fromkeys(row.error for row in rows if row.error))
    for problem in problems:
        complain(problem)
    if arguments.json:
        operations = [row._asdict() for row in rows]
        say_json({"device": str(device), "dtype": arguments.dtype, "operations": operations, "problems": problems})
        return 2 if problems else 0
    table = Columns("operation", "backend", "status", "why not")
    previous = ""
    for row in rows:
        state = ("taken", "bold green") if row.chosen else ("available", "") if row.available else ("refused", "yellow")
        table.add(row.operation if row.operation != previous else "", row.backend, Text(*state), row.reason)
        previous = row.operation
    setting = os.environ.get(dispatch.VARIABLE)
    say_prose(f"on {device} in {arguments.dtype}" + (f", with {dispatch.VARIABLE}={setting}" if setting else ""), "")
    say_columns(table)
    return 2 if problems else 0

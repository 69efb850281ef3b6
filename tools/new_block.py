"""``titans-build new-block``: a package of one's own that adds a block."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from .scaffolding import names_of, write_plugin
from .terminal import say, say_json

SUMMARY = "Start a package that adds a block of your own: the block, a test of the laws, a recipe."
EXAMPLES = (
    "titans-build new-block moving_average                   makes the folder moving_average",
    "titans-build new-block moving_average --into plugins    makes it in the folder plugins",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name, and where."""
    parser.add_argument("name", metavar="NAME", help="what recipes will call the block; the folder is called so, too")
    parser.add_argument(
        "--into",
        default=".",
        metavar="FOLDER",
        help="where the package's folder is made (default: here); nothing that is there is replaced",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the package and say what to do with it."""
    names = names_of(arguments.name)
    folder, files = write_plugin(names, Path(arguments.into))
    if arguments.json:
        made = {"block": names.block, "package": names.package, "module": names.module, "class": names.cls}
        say_json({**made, "folder": os.path.abspath(folder), "files": files})
        return 0
    path = str(folder) if os.path.isabs(folder) else f"./{folder}"
    place, editable = shlex.quote(path), shlex.quote(f"{path}[test]")
    say(f"wrote {folder}:", *(f"  {file}" for file in files), "")
    commands = (f"pip install -e {editable}", f"python -m pytest {place}", f"titans-build {place}/recipe.yaml")
    say("next:", *(f"  {command}" for command in commands))
    return 0

"""``titans-build new-block``: the files of a package that adds a block."""

from __future__ import annotations

import argparse
import builtins
import importlib.resources
import keyword
import os
import re
import shlex
import shutil
from pathlib import Path
from string import Template
from typing import NamedTuple

from ... import __version__
from ...recipes.atomic_write import making_folder
from ...recipes.parse import read_value
from ...registry import NAME_RULE, is_name, list_blocks, list_rows, show
from ..command_line import Command
from ..terminal import UsageError, say, say_json
from . import template

FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "recipe.yaml": "recipe.yaml.in",
    "src/$module/__init__.py": "block.py.in",
    "tests/test_$module.py": "test_block.py.in",
}
"""The plugin's files, and the templates they are made from."""
TAKEN_BY_TEMPLATE = {"Annotated", "Field", "Tensor"}
"""Names that the module of the block imports and its class must not have."""


class Names(NamedTuple):
    """The names of a plugin."""

    block: str
    """In recipes, and of the folder: ``moving_average``."""
    package: str
    """For pip: ``moving-average-block``."""
    module: str
    """To import: ``moving_average_block``."""
    cls: str
    """``MovingAverage``."""


def names_of(block: str) -> Names:
    """The names of a plugin for a block called ``block``.

    Raises ``UsageError`` for an invalid name and for the name of an existing block.
    """
    if not is_name(block):
        raise UsageError(f"NAME {show(block)}: {NAME_RULE}")
    read = read_value(block)
    if read != block:
        raise UsageError(f"NAME {block}: a recipe would read that as {show(read)}, not as a name; choose another")
    if block in list_blocks():
        source = ", ".join(row.source for row in list_rows(block))
        raise UsageError(
            f"NAME {block}: there is a block of that name (from {source}; `titans-build describe {block}`): "
            "choose another"
        )
    words = [word for word in re.split("[-_]+", block) if word]
    package = "-".join([*words, "block"]).lower()
    cls = "".join(word[0].upper() + word[1:] for word in words)
    if keyword.iskeyword(cls) or hasattr(builtins, cls) or cls in TAKEN_BY_TEMPLATE:
        cls += "Block"
    return Names(block, package, package.replace("-", "_"), cls)


def write_plugin(names: Names, into: Path) -> tuple[Path, list[str]]:
    """Create the folder ``into/names.block`` and return it with the names of its files. On an error nothing is left.

    ``into`` is created if it does not exist. Raises ``UsageError`` if the folder exists or cannot be created.
    """
    folder = into / names.block
    values = {**names._asdict(), "version": __version__}
    texts = {
        Template(name).substitute(values): importlib.resources.files(template).joinpath(source).read_text("utf-8")
        for name, source in FILES.items()
    }
    try:
        if folder.exists() or folder.is_symlink():
            raise UsageError(f"{folder}: is there already; nothing was written (--into FOLDER: make it elsewhere)")
        with making_folder(into):
            folder.mkdir()
            try:
                for name, text in texts.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_text(Template(text).substitute(values), encoding="utf-8")
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except (OSError, ValueError) as error:  # ValueError: a character that no file name can have
        raise UsageError(f"{folder}: cannot be made: {getattr(error, 'strerror', None) or error}") from None
    return folder, list(texts)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the name of the block in recipes, and of the folder")
    parser.add_argument(
        "--into",
        default=".",
        metavar="FOLDER",
        help="where the folder of the package is created (default: here); existing files are not replaced",
    )


def _run(arguments: argparse.Namespace) -> int:
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


NEW_BLOCK = Command(
    "Create a package for a block of your own: the block, a test of the laws, a recipe.",
    (
        "titans-build new-block moving_average                   creates the folder moving_average",
        "titans-build new-block moving_average --into plugins    creates it in the folder plugins",
    ),
    _add_arguments,
    _run,
)

"""``titans-build``: reads the command line, runs one command, and turns what goes wrong into an exit status."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..kernels.dispatch import BackendError
from ..recipes import StorageError, packaged_names
from ..registry import RecipeError, nearest, show
from . import build, check, describe, diagram, kernels, listing, schema
from .terminal import UsageError, complain, prepare_streams, say_json

COMMANDS: dict[str, ModuleType] = {
    "list": listing,
    "describe": describe,
    "check": check,
    "schema": schema,
    "kernels": kernels,
    "diagram": diagram,
}
"""Each module has ``SUMMARY`` (one line), ``EXAMPLES``, ``add_arguments(parser)`` and ``run(arguments) -> status``.
A first word that is none of these names a recipe to build."""

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


def parser_of(name: str | None) -> Parser:
    """The parser of one command; ``None`` is the command that builds a recipe."""
    module = build if name is None else COMMANDS[name]
    epilog = "examples:\n" + "".join(f"  {line}\n" for line in module.EXAMPLES)
    if name is None:
        rows = "".join(f"  titans-build {other:<10} {command.SUMMARY}\n" for other, command in COMMANDS.items())
        epilog = f"other commands (each has --help):\n{rows}\n{epilog}"
    parser = Parser(
        prog="titans-build" if name is None else f"titans-build {name}",
        description=module.SUMMARY,
        epilog=epilog + "\nexit status: 0 done, 1 it failed, 2 bad use",
        formatter_class=Layout,
        allow_abbrev=False,
    )
    if name is None:
        parser.add_argument("--version", action="version", version=f"titans-build {__version__}")
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (``sys.argv`` if not given) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        # --json may stand anywhere, in front of the command, too
        while words[:1] == ["--json"] and len(words) > 1:
            words = [*words[1:], "--json"]
        named = words and words[0] in COMMANDS
        parser = parser_of(words[0] if named else None)
        arguments = parser.parse_args(words[1:] if named else words)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except RecipeError as error:
        problems = [{"path": problem.path, "message": problem.message} for problem in error.problems]
        return _refuse(str(error) + _command_hint(words), 2, as_json, problems=problems)
    except UsageError as error:
        # what `chek mac` is refused for says nothing about chek
        stray = _stray(words) if str(error).startswith("unrecognized arguments") else None
        return _refuse(stray or str(error), 2, as_json)
    except (BackendError, StorageError) as error:
        return _refuse(str(error), 1 if _is_full(error.__cause__) else 2, as_json)
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        _give_up_output()
        return 1
    except Exception as error:
        if _is_full(error):
            _give_up_output()
            return _refuse(f"the output cannot be written: {getattr(error, 'strerror', error)}", 1, as_json=False)
        memory = _out_of_memory(error)
        if memory is not None:
            return _refuse(memory, 1, as_json)
        traceback.print_exc()
        return _refuse(
            "this is a fault in titans-build, or in a block or package it loaded, not in what you typed; "
            "the lines above say where",
            1,
            as_json,
        )


def run() -> NoReturn:
    """The console script."""
    prepare_streams()
    sys.exit(main())


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk had no room, or failed: nothing that could have been typed otherwise."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    # safetensors says what the system said, in words
    return (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error)


def _give_up_output() -> None:
    # keeps the interpreter from complaining once more on its way out
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str, status: int, as_json: bool, **details: object) -> int:
    complain(message)
    if as_json:
        say_json({"error": {"message": message, "status": status, **details}})
    return status


def _command_hint(words: list[str]) -> str:
    if words and words[0] in ("help", "version"):
        return f"\n  (titans-build --{words[0]})"
    # `titans-build lst` reads as a recipe called lst
    near = _near_command(words[0]) if words and words[0] not in COMMANDS else None
    return f"\n  (there is a command {near!r})" if near else ""


def _stray(words: list[str]) -> str | None:
    """What is wrong with `chek mac`, `build mac` and `--set dim=64 check mac`, if that is it."""
    first = words[0]
    if first in COMMANDS:
        return None
    if first in ("build", "help"):
        rest = " ".join(words[1:]) if first == "build" else f"{words[1]} --help"
        return f"there is no command {first!r}: titans-build {rest}"
    near = _near_command(first)
    if near and first not in packaged_names() and not os.path.exists(first):
        said = f"no command and no recipe is called {show(first)}; did you mean {near!r}?"
    elif late := next((word for word in words if word in COMMANDS), None):
        said = f"the command comes first: titans-build {late} ..."
    else:
        return None
    return f"{said}\ntry: titans-build --help"


def _near_command(word: str) -> str | None:
    near = difflib.get_close_matches(word, COMMANDS, n=1) if len(word) < 40 else []
    return near[0] if near else None


def _out_of_memory(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.partition("\n")[0] or "out of memory"
        return f"{first}\nnot enough memory: try a smaller recipe, --dtype bfloat16, or fewer bytes to --try"
    return None

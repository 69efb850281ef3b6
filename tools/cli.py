"""``titans-build``: reads the command line, runs one command, and turns what goes wrong into an exit status."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from .. import __version__
from ..kernels.dispatch import BackendError
from ..recipes import StorageError
from ..registry import RecipeError
from . import build, check, describe, diagram, kernels, listing, schema
from .terminal import UsageError, complain, say_json

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


class Parser(argparse.ArgumentParser):
    """Raises what ``argparse`` would print before leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}\ntry: {self.prog} --help")


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    except (UsageError, BackendError, StorageError) as error:
        return _refuse(str(error), 2, as_json)
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:
        # the reader (`| head`) has gone; keep the interpreter from complaining about it once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
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
    sys.exit(main())


def _refuse(message: str, status: int, as_json: bool, **details: object) -> int:
    complain(message)
    if as_json:
        say_json({"error": {"message": message, "status": status, **details}})
    return status


def _command_hint(words: list[str]) -> str:
    # `titans-build lst` reads as a recipe called lst
    near = difflib.get_close_matches(words[0], COMMANDS, n=1) if words and words[0] not in COMMANDS else []
    return f"\n  (there is a command {near[0]!r})" if near else ""


def _out_of_memory(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        first = text.partition("\n")[0] or "out of memory"
        return f"{first}\nnot enough memory: try a smaller recipe, --dtype bfloat16, or fewer bytes to --try"
    return None

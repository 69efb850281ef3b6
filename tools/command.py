"""What every console script shares: its commands, what ends them, and the exit status that each end has.

A command is a module with four names. A script is a ``Program`` of one command, or of several by name::

    # tools/counting.py
    SUMMARY = "Count the words of a file."
    EXAMPLES = ("titans-count README.md   how many there are",)

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("file", metavar="FILE")

    def run(arguments: argparse.Namespace) -> int:    # the exit status: 0, or 1 when what it did found a fault
        if not os.path.exists(arguments.file):
            raise UsageError(f"{arguments.file}: no such file")          # exit status 2
        ...
        if arguments.json:                                               # --json is always there
            say_json({"words": words})

    # tools/count.py, which pyproject.toml names: titans-count = "titans_build.tools.count:run"
    PROGRAM = Program("titans-count", counting, {"compare": comparing})
    main, run = PROGRAM.main, PROGRAM.run             # main(["README.md"]) -> 0; run() leaves the process
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from .. import __version__
from ..kernels.dispatch import BackendError
from ..recipes import StorageError, packaged_names
from ..registry import RecipeError, show
from . import starting
from .parser import Layout, Parser
from .terminal import CommandFailed, UsageError, complain, prepare_streams, say_json, speaking_as


class Command(Protocol):
    """What a command's module holds."""

    @property
    def SUMMARY(self) -> str:
        """One line: what it does."""

    @property
    def EXAMPLES(self) -> Sequence[str]:
        """Command lines, each with a remark two or more spaces after it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Everything but ``--json`` and ``--help``."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it, and return the exit status. What it may raise is said at ``Program.main``."""


class Program:
    """A console script.

    ``command``: what runs when the first word names none of ``commands``. ``saving_memory``: what to try when there is
    too little. ``json_lines``: ``--json`` prints a JSON document per line as things happen, not one at the end.
    """

    def __init__(
        self,
        name: str,
        command: Command,
        commands: Mapping[str, Command] | None = None,
        *,
        saving_memory: str = "try a smaller model, or --dtype bfloat16",
        json_lines: bool = False,
    ) -> None:
        self.name = name
        self.command = command
        self.commands = dict(commands or {})
        self.saving_memory = saving_memory
        self.json_lines = json_lines

    def parser_of(self, name: str | None) -> Parser:
        """The parser of one command; ``None`` is the command without a name."""
        command = self.command if name is None else self.commands[name]
        epilog = "examples:\n" + "".join(f"  {line}\n" for line in command.EXAMPLES)
        if name is None and self.commands:
            rows = "".join(f"  {self.name} {other:<10} {each.SUMMARY}\n" for other, each in self.commands.items())
            epilog = f"other commands (each has --help):\n{rows}\n{epilog}"
        parser = Parser(
            prog=self.name if name is None else f"{self.name} {name}",
            description=command.SUMMARY,
            epilog=epilog + "\nexit status: 0 done, 1 it failed, 2 bad use",
            formatter_class=Layout,
            allow_abbrev=False,
        )
        if name is None:
            parser.add_argument("--version", action="version", version=f"{self.name} {__version__}")
        command.add_arguments(parser)
        what = "JSON, a line for each thing that happens," if self.json_lines else "one JSON document"
        parser.add_argument("--json", action="store_true", help=f"print {what} instead of text")
        parser.set_defaults(run=command.run)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line ``argv`` (``sys.argv`` if not given) and return its exit status.

        What a command raises becomes one message on standard error, and with ``--json`` a document, too:

        * 2, bad use: ``UsageError``, ``RecipeError``, ``StorageError``, ``BackendError``;
        * 1, it failed: ``CommandFailed``, a full disk, too little memory, a reader of the output that left;
        * 1 with a trace, a fault of the program: any other exception;
        * 130, interrupted: ``KeyboardInterrupt``, whose text, if it has one, is the message.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        with speaking_as(self.name):
            return self._main(words)

    def run(self) -> NoReturn:
        """The console script."""
        starting.over()
        prepare_streams()
        sys.exit(self.main())

    def _main(self, words: list[str]) -> int:
        as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        try:
            # --json may stand anywhere, in front of the command, too
            while self.commands and words[:1] == ["--json"] and len(words) > 1:
                words = [*words[1:], "--json"]
            named = words and words[0] in self.commands
            parser = self.parser_of(words[0] if named else None)
            arguments = parser.parse_intermixed_args(words[1:] if named else words)
            status: int = arguments.run(arguments)
            sys.stdout.flush()
            return status
        except SystemExit as leaving:  # --help and --version
            return leaving.code if isinstance(leaving.code, int) else 0
        except RecipeError as error:
            problems = [{"path": problem.path, "message": problem.message} for problem in error.problems]
            return self._refuse(str(error) + self._command_hint(words), 2, as_json, problems=problems)
        except UsageError as error:
            # what `chek mac` is refused for says nothing about chek
            stray = self._stray(words) if str(error).startswith("unrecognized arguments") else None
            return self._refuse(stray or str(error), 2, as_json)
        except (BackendError, StorageError) as error:
            return self._refuse(str(error), 1 if _is_full(error.__cause__) else 2, as_json)
        except CommandFailed as error:
            return self._refuse(str(error), 1, as_json)
        except KeyboardInterrupt as interrupt:
            return self._refuse(str(interrupt) or "interrupted", 130, as_json)
        except BrokenPipeError:  # the reader (`| head`) has gone
            _give_up_output()
            return 1
        except Exception as error:
            if _is_full(error):
                _give_up_output()
                said = getattr(error, "strerror", error)
                return self._refuse(f"the output cannot be written: {said}", 1, as_json=False)
            if _is_out_of_memory(error):
                first = str(error).partition("\n")[0] or "out of memory"
                return self._refuse(f"{first}\nnot enough memory: {self.saving_memory}", 1, as_json)
            traceback.print_exc()
            return self._refuse(
                f"this is a fault in {self.name}, or in a block or package it loaded, not in what you typed; "
                "the lines above say where",
                1,
                as_json,
            )

    def _refuse(self, message: str, status: int, as_json: bool, **details: object) -> int:
        complain(message)
        if as_json:
            say_json({"error": {"message": message, "status": status, **details}}, in_one_line=self.json_lines)
        return status

    def _command_hint(self, words: list[str]) -> str:
        if words and words[0] in ("help", "version"):
            return f"\n  ({self.name} --{words[0]})"
        # `titans-build lst` reads as a recipe called lst
        near = self._near_command(words[0]) if words and words[0] not in self.commands else None
        return f"\n  (there is a command {near!r})" if near else ""

    def _stray(self, words: list[str]) -> str | None:
        """What is wrong with `chek mac`, `build mac` and `--set dim=64 check mac`, if that is it."""
        first = words[0]
        if first in self.commands or not self.commands:
            return None
        own = self.name.rpartition("-")[2]
        if first in (own, "help"):
            rest = " ".join(words[1:]) if first == own else f"{words[1]} --help"
            return f"there is no command {first!r}: {self.name} {rest}"
        near = self._near_command(first)
        if near and first not in packaged_names() and not os.path.exists(first):
            said = f"no command and no recipe is called {show(first)}; did you mean {near!r}?"
        elif late := next((word for word in words if word in self.commands), None):
            said = f"the command comes first: {self.name} {late} ..."
        else:
            return None
        return f"{said}\ntry: {self.name} --help"

    def _near_command(self, word: str) -> str | None:
        near = difflib.get_close_matches(word, self.commands, n=1) if len(word) < 40 else []
        return near[0] if near else None


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk had no room, or failed: nothing that could have been typed otherwise."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    # safetensors says what the system said, in words
    return (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _give_up_output() -> None:
    # keeps the interpreter from complaining once more on its way out
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The console scripts: subcommands, ``--help``, ``--json``, error messages and exit statuses.

A script is a ``Program``. A command is a ``Command``, or a module with ``SUMMARY``, ``EXAMPLES``, ``add_arguments`` and
``run``::

    # tools/count.py; pyproject.toml has: titans-count = "titans_build.tools.count:run"
    def commands() -> dict[str, Command]:
        from .counting import comparing, script          # imported when the program starts

        return {"": Command.of(script), "compare": Command.of(comparing)}

    PROGRAM = Program("titans-count", commands)
    main, run = PROGRAM.main, PROGRAM.run             # main(["README.md"]) -> 0; run() leaves the process
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .signals import Terminated
from .terminal import (
    NARROWEST,
    CommandFailed,
    UsageError,
    complain,
    discard_output,
    first_process_first,
    prepare_streams,
    program,
    say_json,
)


class Command(NamedTuple):
    """One command of a program."""

    summary: str
    """One line that says what the command does."""
    examples: Sequence[str]
    """Command lines, each with an optional remark after three or more spaces."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    """Adds every argument except ``--json`` and ``--help``."""
    run: Callable[[argparse.Namespace], int]
    """Runs the command and returns the exit status. ``Program.main`` lists what it may raise."""

    @classmethod
    def of(cls, module: Any) -> Command:
        """The command that a module holds."""
        return cls(module.SUMMARY, module.EXAMPLES, module.add_arguments, module.run)


class Program:
    """A console script.

    ``commands``: imports and returns the commands by name. The command ``""`` runs if the first word is not the name of
    another one. ``saving_memory``: advice for when memory runs out. ``json_lines``: ``--json`` prints one JSON document
    per line, as events happen, instead of one at the end. ``needs_reader``: whether the end of the reader of its output
    (``| head``) ends the program, with status 1. Otherwise it goes on, and the status is that of the command.
    """

    def __init__(
        self,
        name: str,
        commands: Callable[[], Mapping[str, Command]],
        *,
        saving_memory: str = "try a smaller model, or --dtype bfloat16",
        json_lines: bool = False,
        needs_reader: bool = True,
    ) -> None:
        self.name = name
        self.commands = commands
        self.saving_memory = saving_memory
        self.json_lines = json_lines
        self.needs_reader = needs_reader

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line ``argv`` (``sys.argv`` if not given) and return its exit status.

        An exception that a command raises is reported as a message on standard error and, with ``--json``, a document:

        * 2, bad use: ``UsageError``, ``RecipeError``, ``StorageError``, ``BackendError``;
        * 1, failure: ``CommandFailed``, a full disk, too little memory, a closed pipe on standard output;
        * 1 with a stack trace, a bug: any other exception;
        * 130, interrupted: ``KeyboardInterrupt``. The message is its text, if it has one;
        * 143 or 129: ``Terminated``, by SIGTERM or SIGHUP.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        with program(self.name, needs_reader=self.needs_reader):
            try:
                with first_process_first():
                    arguments = self.parse(words)
                status: int = arguments.run(arguments)
                sys.stdout.flush()
                return status
            except Terminated as ended:
                return self._report(ended.message, 128 + ended.number, as_json)
            except SystemExit as leaving:  # --help and --version
                return leaving.code if isinstance(leaving.code, int) else 0
            except KeyboardInterrupt as interrupt:
                return self._report(str(interrupt) or "interrupted", 130, as_json)
            except BrokenPipeError:  # the reader (`| head`) has ended
                discard_output()
                return 1
            except Exception as error:
                return self._report_error(error, words, as_json)

    def run(self) -> NoReturn:
        """The console script."""
        # set before torch is loaded: threads that wait actively take the cores of those that work, if both are few
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        prepare_streams()
        sys.exit(self.main())

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read a command line without running it; ``run`` of the result is the command's. Raises ``UsageError``."""
        commands, words = self.commands(), list(words)
        # --json may come first, before the name of a command
        while len(commands) > 1 and words[:1] == ["--json"] and len(words) > 1:
            words = [*words[1:], "--json"]
        name, rest = (words[0], words[1:]) if words and words[0] in commands else ("", words)
        return self._parser(name, commands).parse_intermixed_args(rest)

    def _parser(self, name: str, commands: Mapping[str, Command]) -> argparse.ArgumentParser:
        command = commands[name]
        width = max(shutil.get_terminal_size().columns - 2, NARROWEST)
        rows = ["examples:", *command.examples, "", "exit status: 0 done, 1 it failed, 2 bad use"]
        others = [f"{self.name} {other:<10}   {each.summary}" for other, each in commands.items() if other]
        if others and not name:
            rows = ["other commands (each has --help):", *others, "", *rows]
        parser = _Parser(
            prog=f"{self.name} {name}".strip(),
            description=textwrap.fill(command.summary, width),
            epilog="\n".join(_fit(row, width) for row in rows),
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=width),
            allow_abbrev=False,
        )
        if not name:
            from .. import __version__

            parser.add_argument("--version", action="version", version=f"{self.name} {__version__}")
        command.add_arguments(parser)
        what = "one JSON document per event" if self.json_lines else "one JSON document"
        parser.add_argument("--json", action="store_true", help=f"print {what} instead of text")
        parser.set_defaults(run=command.run)
        return parser

    def _report_error(self, error: Exception, words: list[str], as_json: bool) -> int:
        from ..kernels.dispatch import BackendError
        from ..recipes import StorageError
        from ..registry import RecipeError

        if isinstance(error, RecipeError):
            return self._report(self._with_hint(str(error), words), 2, as_json, problems=problem_list(error))
        if isinstance(error, UsageError):
            return self._report(self._with_hint(str(error), words), 2, as_json)
        if isinstance(error, (BackendError, StorageError)):
            return self._report(str(error), 1 if _is_disk_full(error.__cause__) else 2, as_json)
        if isinstance(error, CommandFailed):
            return self._report(str(error), 1, as_json)
        if _is_disk_full(error):
            discard_output()
            reason = getattr(error, "strerror", error)
            return self._report(f"the output cannot be written: {reason}", 1, as_json=False)
        if _is_out_of_memory(error):
            first = str(error).partition("\n")[0] or "out of memory"
            return self._report(f"{first}\nnot enough memory: {self.saving_memory}", 1, as_json)
        traceback.print_exc()
        message = f"this is a bug in {self.name}, or in a block or package it loaded; the lines above say where"
        return self._report(message, 1, as_json)

    def _report(self, message: str, status: int, as_json: bool, **details: object) -> int:
        complain(message)
        if as_json:
            say_json({"error": {"message": message, "status": status, **details}}, in_one_line=self.json_lines)
        return status

    def _with_hint(self, message: str, words: list[str]) -> str:
        """``message`` with the command that was probably meant, if the first word is not one."""
        commands = [name for name in self.commands() if name]
        first = words[0] if words else ""
        if not commands or not first or first in commands or os.path.lexists(first[:200]):
            return message
        near = [] if {".", "/"} & set(first) else difflib.get_close_matches(first[:40], commands, n=1)
        late = next((word for word in words if word in commands), None)
        if first in ("help", "version"):
            hint = f"try: {' '.join([self.name, *words[1:2]])} --{first}"
        elif first == self.name.rpartition("-")[2]:
            hint = f"there is no command {first!r}: {self.name} {' '.join(words[1:])}"
        elif near:
            return f"there is no command {first!r}; did you mean {near[0]!r}?\ntry: {self.name} --help"
        elif late and message.startswith("unrecognized arguments"):
            hint = f"the command comes first: {self.name} {late} ..."
        else:
            return message
        return f"{message}\n  ({hint})"


class _Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage()
        unknown = re.fullmatch(r"unrecognized arguments: (--?[\w-]+).*", message, re.DOTALL)
        if unknown:
            from ..registry import nearest

            message += nearest(unknown[1], re.findall(r"--[\w-]+", usage))
        raise UsageError(f"{message}\n{usage.strip()}\ntry: {self.prog} --help")


def problem_list(error: Exception) -> list[dict[str, str]]:
    """The problems of a ``RecipeError`` as plain data."""
    return [{"path": problem.path, "message": problem.message} for problem in getattr(error, "problems", ())]


def _fit(line: str, width: int) -> str:
    """Wrap an example to ``width``. A remark that does not fit beside its command goes below it."""
    command, gap, remark = line.partition("   ")
    if gap and len(line) + 2 > width:
        return _fit(command, width) + "\n" + textwrap.indent(textwrap.fill(remark.strip(), width - 6), " " * 6)
    indent = "" if line.endswith(":") or line.startswith("exit status") else "  "
    return textwrap.fill(line, width, initial_indent=indent, subsequent_indent=" " * 4, break_long_words=False)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether a disk was full or failed, which is no error of the command line."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
    # safetensors passes on the message of the system only
    return (isinstance(error, OSError) and error.errno in full) or any(
        text in str(error) for text in ("No space left on device", "File too large")
    )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text

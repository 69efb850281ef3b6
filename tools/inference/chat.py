"""``--chat``: each line is read, its answer is printed as it comes, and the state carries over to the next line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from ...blocks.generation import Sampler
from ...recipes import StorageError
from ...registry import nearest
from ..terminal import CommandFailed, UsageError, complain, say
from .generate import Printer, before_stop, read_with_progress, saving_state
from .session import Session, Text, check_state_file, usage_errors

PLACEHOLDER = "{line}"
"""Replaced by the line in a template."""
DEFAULT_TEMPLATE = PLACEHOLDER + r"\n"
PROMPT = "> "


def chat(session: Session, text: Text, sampler: Sampler, arguments: argparse.Namespace) -> int:
    """Read ``text``, chat until the input ends, and save the state. Returns the exit status."""
    loop = _Chat(session, sampler, arguments)
    with saving_state(session):
        read_with_progress(session, text)
        if loop.interactive:
            say(f"/help lists the commands; {'/quit or Ctrl-D leaves'}{_saved_at_end(session)}")
        loop.run()
    return 0


class _Chat:
    def __init__(self, session: Session, sampler: Sampler, arguments: argparse.Namespace) -> None:
        self.session, self.sampler = session, sampler
        self.max_new_tokens, self.stops = arguments.max_new_tokens, arguments.stop
        self.template = unescaped(arguments.template)
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.done = False
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "save": ("FILE  save the state now (without FILE: where it is saved at the end)", self._save),
            "load": ("FILE  continue from the state in FILE", self._load),
            "fork": ("[FILE]  leave the state's file as it is; save to FILE at the end, or nowhere", self._fork),
            "freeze": ("  the memory answers from what it has learned so far", self._freeze),
            "thaw": ("  the memory learns again", self._thaw),
            "reset": ("  return to the initial state", self._reset),
            "help": ("  this list", self._help),
            "quit": ("  leave, as Ctrl-D does", self._quit),
        }

    def run(self) -> None:
        """Answer lines until there are no more."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - arrows and earlier lines in input()
        while not self.done:
            try:
                line = self._read_line()
            except EOFError:
                if self.interactive:
                    say("")
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say("", "(/quit or Ctrl-D leaves)")
                continue
            try:
                self._handle(line)
            except (UsageError, CommandFailed, StorageError) as error:
                complain(str(error))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say("", "(stopped)")

    def _read_line(self) -> bytes:
        """One line without its end. Raises ``EOFError`` after the last."""
        if self.interactive:
            # keeps bytes that are not valid text
            return input(PROMPT).encode(sys.stdin.encoding or "utf-8", errors="surrogateescape")
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not line:
            raise EOFError
        return line.removesuffix(b"\n").removesuffix(b"\r")

    def _handle(self, line: bytes) -> None:
        if line.startswith(b"/") and not line.startswith(b"//"):
            name, _, rest = line[1:].decode(errors="replace").strip().partition(" ")
            if name not in self.commands:
                hint = nearest(name, list(self.commands))
                raise UsageError(f"there is no command /{name}{hint}; /help lists them, // begins a line with /")
            self.commands[name][1](rest.strip())
            return
        before, after = self.template.split(PLACEHOLDER, 1)
        turn = before.encode() + line.removeprefix(b"/" if line.startswith(b"//") else b"") + after.encode()
        self.session.read([turn])
        printer = Printer()
        try:
            with contextlib.closing(self.session.generate(self.max_new_tokens, self.sampler)) as texts:
                for part in before_stop(texts, self.stops):
                    printer.write(part)
        finally:
            if printer.on_terminal:
                printer.end_line()
            else:
                printer.write("" if printer.at_line_start else "\n")  # separates the answers

    def _save(self, name: str) -> None:
        path = Path(name) if name else self.session.target
        if path is None:
            raise UsageError("/save: expected the name of a file, since there is no --state to save to")
        check_state_file(path, "/save")
        self.session.save(path)
        say(f"(saved to {path})")

    def _load(self, name: str) -> None:
        if not name:
            raise UsageError("/load: expected the name of a file")
        self.session.load(Path(name))
        say(f"(continues from {name}{_saved_at_end(self.session)})")

    def _fork(self, name: str) -> None:
        target = Path(name) if name else None
        if target is not None:
            check_state_file(target, "/fork")
        self.session.target = target
        say(f"(forked{_saved_at_end(self.session) or ': nothing is saved at the end'})")

    def _freeze(self, _: str) -> None:
        with usage_errors("/freeze"):
            frozen = self.session.model.freeze_memory()
        say(f"({len(frozen.names)} memories frozen)" if frozen.names else "(no memory was left to freeze)")

    def _thaw(self, _: str) -> None:
        self.session.model.unfreeze_memory()
        say("(the memory learns again)")

    def _reset(self, _: str) -> None:
        self.session.reset()
        say("(the state is reset)")

    def _help(self, _: str) -> None:
        for name, (what, _do) in self.commands.items():
            argument, _, remark = what.partition("  ")
            say(f"  /{f'{name} {argument}':<14} {remark}")
        say("  a line that begins with // is read from its second / on; Ctrl-C stops an answer")

    def _quit(self, _: str) -> None:
        self.done = True


def _saved_at_end(session: Session) -> str:
    return "" if session.target is None else f"; the state is saved to {session.target} at the end"


def unescaped(text: str) -> str:
    r"""Replace ``\n``, ``\t`` and ``\\`` in ``text`` by the characters they stand for."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)

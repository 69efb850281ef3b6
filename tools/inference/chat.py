"""Talking line by line: every line is read, every answer is said as it comes, and the state goes on between them."""

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
from .answering import keeping, read_with_bar
from .session import Session, check_target
from .sources import Text
from .speaking import Voice, until

PLACE = "{line}"
"""Where the line goes in a template."""
DEFAULT_TEMPLATE = PLACE + r"\n"

SIGN = "> "
"""What asks for a line."""


def chat(session: Session, text: Text, sampler: Sampler, arguments: argparse.Namespace, target: Path | None) -> int:
    """Read ``text``, then talk until the lines end; save the state to ``target``, if there is one."""
    talk = _Talk(session, sampler, arguments, target)
    with keeping(session, lambda: talk.target):
        read_with_bar(session, text)
        if talk.to_person:
            say(f"/help lists the commands; {'/quit or Ctrl-D leaves'}{_saves(target)}")
        talk.loop()
    return 0


class _Talk:
    def __init__(self, session: Session, sampler: Sampler, arguments: argparse.Namespace, target: Path | None) -> None:
        self.session, self.sampler, self.target = session, sampler, target
        self.most, self.stops = arguments.max_new_tokens, arguments.stop
        self.template = unescaped(arguments.template)
        self.to_person = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.over = False
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "save": ("FILE  save the state now (without FILE: where it is saved at the end)", self._save),
            "load": ("FILE  go on from the state in FILE", self._load),
            "fork": ("[FILE]  leave the state's file as it is; save to FILE at the end, or nowhere", self._fork),
            "freeze": ("  the memory answers from what it has learned so far", self._freeze),
            "thaw": ("  the memory learns again", self._thaw),
            "reset": ("  forget everything that was read", self._reset),
            "help": ("  this list", self._help),
            "quit": ("  leave, as Ctrl-D does", self._quit),
        }

    def loop(self) -> None:
        """Until the lines end."""
        if self.to_person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - arrows and earlier lines in input()
        while not self.over:
            try:
                line = self._line()
            except EOFError:
                if self.to_person:
                    say("")
                return
            except KeyboardInterrupt:
                if not self.to_person:
                    raise
                say("", "(/quit or Ctrl-D leaves)")
                continue
            try:
                self._take(line)
            except (UsageError, CommandFailed, StorageError) as error:
                complain(str(error))
            except KeyboardInterrupt:
                if not self.to_person:
                    raise
                say("", "(stopped)")

    def _line(self) -> bytes:
        """One line without its end. Raises ``EOFError`` after the last."""
        if self.to_person:
            # bytes that are no text come back out as they went in
            return input(SIGN).encode(sys.stdin.encoding or "utf-8", errors="surrogateescape")
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not line:
            raise EOFError
        return line.removesuffix(b"\n").removesuffix(b"\r")

    def _take(self, line: bytes) -> None:
        if line.startswith(b"/") and not line.startswith(b"//"):
            name, _, rest = line[1:].decode(errors="replace").strip().partition(" ")
            if name not in self.commands:
                hint = nearest(name, list(self.commands))
                raise UsageError(f"there is no command /{name}{hint}; /help lists them, // begins a line with /")
            self.commands[name][1](rest.strip())
            return
        before, after = self.template.split(PLACE, 1)
        said = before.encode() + line.removeprefix(b"/" if line.startswith(b"//") else b"") + after.encode()
        self.session.read([said])
        voice = Voice()
        try:
            for part in until(self.session.answer(self.most, self.sampler), self.stops):
                voice.say(part)
        finally:
            if voice.to_person:
                voice.end()
            else:
                voice.say("" if voice.ended else "\n")  # so that answers can be told apart

    def _save(self, name: str) -> None:
        path = Path(name) if name else self.target
        if path is None:
            raise UsageError("/save: expected the name of a file, since there is no --state to save to")
        check_target(path, "/save")
        self.session.save(path)
        say(f"(saved to {path})")

    def _load(self, name: str) -> None:
        if not name:
            raise UsageError("/load: expected the name of a file")
        self.session.load(Path(name))
        say(f"(goes on from {name}{_saves(self.target)})")

    def _fork(self, name: str) -> None:
        target = Path(name) if name else None
        if target is not None:
            check_target(target, "/fork")
        self.target = target
        say(f"(forked{_saves(target) or ': nothing is saved at the end'})")

    def _freeze(self, _: str) -> None:
        try:
            frozen = self.session.model.freeze_memory()
        except ValueError as error:
            raise UsageError(f"/freeze: {error}") from None
        say(f"({len(frozen.names)} memories frozen)" if frozen.names else "(no memory was left to freeze)")

    def _thaw(self, _: str) -> None:
        self.session.model.unfreeze_memory()
        say("(the memory learns)")

    def _reset(self, _: str) -> None:
        self.session.reset()
        say("(everything is forgotten)")

    def _help(self, _: str) -> None:
        for name, (what, _do) in self.commands.items():
            argument, _, remark = what.partition("  ")
            say(f"  /{f'{name} {argument}':<14} {remark}")
        say("  a line that begins with // is read from its second / on; Ctrl-C stops an answer")

    def _quit(self, _: str) -> None:
        self.over = True


def _saves(target: Path | None) -> str:
    return "" if target is None else f"; the state is saved to {target} at the end"


def unescaped(text: str) -> str:
    r"""``text`` with ``\n``, ``\t`` and ``\\`` as what they stand for."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)

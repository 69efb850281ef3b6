"""One prompt and its continuation: read the prompt, print the generated text as it comes, save the state."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...blocks.generation import Sampler
from ..signals import Terminated, handling, leave
from ..terminal import say, say_json
from .session import Session, Text, reading_progress


def answer_prompt(session: Session, text: Text, sampler: Sampler, arguments: argparse.Namespace) -> int:
    """Read ``text``, generate what follows it, and save the state. Returns the exit status."""
    target = session.target
    with saving_state(session):
        read, reading = _read(session, text)
        answer = _answer(session, sampler, arguments) if arguments.max_new_tokens else _NOTHING
    if arguments.json:
        say_json(_common(session, arguments) | answer | {"read": reading, "position": session.position})
    elif not arguments.max_new_tokens:
        saved = "" if target is None else f"; the state is saved to {target}"
        say(f"{read:,} tokens read, {reading['tokens_per_second']:,.0f} per second{saved}")
    return 0


def answer_questions(session: Session, text: Text, sampler: Sampler, arguments: argparse.Namespace) -> int:
    """Read ``text`` once, answer each question as if it alone followed, and save the state after the text."""
    answers = []
    draws = sampler.generator.get_state()
    with saving_state(session):
        _, reading = _read(session, text)
        after_text = session.reading
        try:
            for question in arguments.question:
                session.reading = after_text
                sampler.generator.set_state(draws)
                _, asking = _read(session, Text([], [question]))
                answers.append({"question": question} | _answer(session, sampler, arguments) | {"read": asking})
                if not arguments.json and not sys.stdout.isatty():
                    print(flush=True)  # separates the answers
        finally:
            session.reading = after_text
    if arguments.json:
        document = {"answers": answers, "read": reading, "position": session.position}
        say_json(_common(session, arguments) | document)
    return 0


def _answer(session: Session, sampler: Sampler, arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate and print an answer. Returns it as a part of a JSON document."""
    answer: list[str] = []
    tokens: list[int] = []
    start = time.perf_counter()
    printer = Printer()
    try:
        with contextlib.closing(session.generate(arguments.max_new_tokens, sampler, tokens.append)) as texts:
            for part in before_stop(texts, arguments.stop):
                answer.append(part)
                if not arguments.json:
                    printer.write(part)
    finally:
        if not arguments.json:
            printer.end_line()
    generated = _pace(len(tokens), time.perf_counter() - start)
    drafted = {} if session.draft is None else {"drafted": session.drafted._asdict()}
    return {"text": "".join(answer), "tokens": tokens, "generated": generated} | drafted


def _read(session: Session, text: Text) -> tuple[int, dict[str, float]]:
    start = time.perf_counter()
    read = read_with_progress(session, text)
    return read, _pace(read, time.perf_counter() - start)


def _common(session: Session, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": os.path.abspath(arguments.model),
        "memory_frozen": arguments.no_write,
        "state": None if session.target is None else os.path.abspath(session.target),
    }


def read_with_progress(session: Session, text: Text) -> int:
    """Read ``text`` behind a progress bar; returns its number of tokens."""
    with reading_progress(text, "reading") as update:
        return session.read(text, update)


@contextlib.contextmanager
def saving_state(session: Session) -> Iterator[None]:
    """Save the state to the session's target when the block ends, is interrupted by Ctrl-C or a signal to end, or its
    output cannot be written.
    """
    try:
        with handling(leave):
            yield
    except (KeyboardInterrupt, Terminated, OSError) as ending:
        if session.target is None or session.reading.tokens == 0:
            raise
        session.save(session.target)
        read = f"{session.reading.tokens:,} tokens of this session"
        message = f"interrupted; the state after {read} is saved to {session.target}"
        if isinstance(ending, Terminated):
            raise Terminated(ending.number, message) from None
        if isinstance(ending, KeyboardInterrupt):
            raise KeyboardInterrupt(message) from None
        raise
    if session.target is not None:
        session.save(session.target)


def _pace(tokens: int, seconds: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }


_NOTHING: dict[str, Any] = {"text": "", "tokens": [], "generated": _pace(0, 0.0)}


def before_stop(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """``texts`` up to the first of ``stops``, which is left out; the possible beginning of a stop is held back."""
    held = ""
    for text in texts:
        held += text
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            yield held[: min(found)]
            return
        keep = max((_overlap(held, stop) for stop in stops), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def without_control(text: str) -> str:
    """``text`` with control characters but tabs and line ends replaced by their pictures, harmless to a terminal."""
    return text.translate(_CONTROL_PICTURES)


_CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}


class Printer:
    """Writes text to standard output as it comes; on a terminal without control characters."""

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty()
        self.at_line_start = True

    def write(self, text: str) -> None:
        """Write ``text`` and flush."""
        if text:
            self.at_line_start = text.endswith("\n")
            sys.stdout.write(without_control(text) if self.on_terminal else text)
            sys.stdout.flush()

    def end_line(self) -> None:
        """Finish the line on a terminal; in a pipe the text is all that is written."""
        if self.on_terminal and not self.at_line_start:
            self.write("\n")

"""One prompt and one answer: read it all, say what follows, keep the state."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ...blocks.generation import Sampler
from ..terminal import say, say_json
from .bar import reading_bar
from .session import Session
from .sources import Text
from .speaking import Voice, until


def answer_prompt(
    session: Session, text: Text, sampler: Sampler, arguments: argparse.Namespace, target: Path | None
) -> int:
    """Read ``text``, write what follows it, and save the state to ``target``, if there is one."""
    answer: list[str] = []
    tokens: list[int] = []
    with keeping(session, lambda: target):
        started = time.perf_counter()
        read = read_with_bar(session, text)
        between = time.perf_counter()
        if arguments.max_new_tokens:
            voice = Voice()
            try:
                for part in until(session.answer(arguments.max_new_tokens, sampler, tokens.append), arguments.stop):
                    answer.append(part)
                    if not arguments.json:
                        voice.say(part)
            finally:
                if not arguments.json:
                    voice.end()
        ended = time.perf_counter()
    if arguments.json:
        say_json(
            {
                "model": os.path.abspath(arguments.model),
                "text": "".join(answer),
                "tokens": tokens,
                "read": _pace(read, between - started),
                "generated": _pace(len(tokens), ended - between),
                "position": session.position,
                "memory_frozen": arguments.no_write,
                "state": None if target is None else os.path.abspath(target),
            }
        )
    elif not arguments.max_new_tokens:
        saved = "" if target is None else f"; the state is saved to {target}"
        say(f"{read:,} tokens read, {_speed(read, between - started):,.0f} per second{saved}")
    return 0


def read_with_bar(session: Session, text: Text) -> int:
    """Read ``text`` behind a bar; how many tokens it was."""
    with reading_bar(text, "reading") as advance:
        return session.read(text, advance)


@contextlib.contextmanager
def keeping(session: Session, where: Callable[[], Path | None]) -> Iterator[None]:
    """Save the state to the file ``where()`` when the block ends, or is interrupted, or nobody listens any more."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as ending:
        target = where()
        if target is None or session.at.tokens == 0:
            raise
        session.save(target)
        if isinstance(ending, BrokenPipeError):
            raise
        raise KeyboardInterrupt(
            f"interrupted; the state after {session.at.tokens:,} tokens of this session is saved to {target}"
        ) from None
    target = where()
    if target is not None:
        session.save(target)


def _pace(tokens: int, seconds: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(_speed(tokens, seconds), 1),
    }


def _speed(tokens: int, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)

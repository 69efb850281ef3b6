"""Generated text on its way to a reader: streamed, ended where it should end, and harmless to a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """``texts`` up to the first of ``stops``, which is left out; what may be its beginning is held back."""
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
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def shown(text: str) -> str:
    """``text`` with its control characters, but for tabs and line ends, as pictures: none of them moves a cursor."""
    return text.translate(_PICTURES)


_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}


class Voice:
    """Writes text to standard output as it comes, and ends it with a line end on a terminal alone."""

    def __init__(self) -> None:
        self.to_person = sys.stdout.isatty()
        self.ended = True

    def say(self, text: str) -> None:
        """Write ``text`` at once."""
        if text:
            self.ended = text.endswith("\n")
            sys.stdout.write(shown(text) if self.to_person else text)
            sys.stdout.flush()

    def end(self) -> None:
        """Nothing more comes."""
        if self.to_person and not self.ended:
            self.say("\n")

"""``titans-infer`` as a process: its streams, a terminal, interruptions, and the same memory for any text."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.tools.inference import position
from titans_build.tools.inference.reading import PIECE

TINY = {
    "version": 1,
    "name": "tiny",
    "dim": 8,
    "vocab": 256,
    "layers": {"mag": [{"type": "gate", "branches": [{"type": "attention", "window": 8}, {"type": "memory"}]}]},
    "stack": ["mag"],
}
COMMAND = (sys.executable, "-c", "from titans_build.tools.infer import run; run()")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "100"}
PATIENCE = 60.0
F_SETPIPE_SZ, BLOCK = 1031, 4096
"""Linux's number for setting how much a pipe holds, and that much."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    tb.save(tb.build(tb.load_recipe(TINY), seed=0), place)
    return place


def test_standard_input_to_standard_output(folder: Path, in_process: Any) -> None:
    prompt = b"caf\xe9 \xff\x00\n"
    (done,) = in_process("infer", folder, "--max-new-tokens", "40", stdin=prompt)
    model = tb.load(folder)
    expected = model.generate(torch.tensor([list(prompt)]), 40).tokens[0, len(prompt) :].tolist()
    assert (done.status, done.err) == (0, b"")
    # on no terminal the text is all there is
    assert done.out.decode() == bytes(expected).decode(errors="replace")


def test_a_session_goes_on_in_another_process(folder: Path, tmp_path: Path, in_process: Any) -> None:
    state = tmp_path / "a.state"
    for part in (b"what is read today ", b"is remembered tomorrow"):
        assert in_process("infer", folder, "--state", state, "--max-new-tokens", "0", stdin=part)[0].status == 0
    model = tb.load(folder)
    loaded = tb.load_state(state, model)
    assert position(model, loaded) == 41
    with torch.no_grad():
        whole = model(torch.tensor([list(b"what is read today is remembered tomorrow")])).state
    for (name, a), (_, b) in zip(tb.state.named_tensors(loaded), tb.state.named_tensors(whole)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)


class Terminal:
    """The command on a pseudo terminal: what is typed, and what is seen."""

    def __init__(self, *words: object) -> None:
        self.keyboard, screen = pty.openpty()

        def own_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to it

        self.process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=own_terminal,
        )
        os.close(screen)
        self.seen = ""

    def until(self, mark: str) -> str:
        """What appears up to and with ``mark``."""
        start, end = len(self.seen), time.monotonic() + PATIENCE
        while mark not in self.seen[start:]:
            assert time.monotonic() < end, f"no {mark!r} in {self.seen!r}"
            if not self._look():
                raise AssertionError(f"it left without {mark!r}: {self.seen!r}")
        return self.seen[start:]

    def type(self, text: str, mark: str = "> ") -> str:
        os.write(self.keyboard, text.encode())
        return self.until(mark)

    def leave(self, text: str) -> int:
        """The exit status after ``text``."""
        os.write(self.keyboard, text.encode())
        end = time.monotonic() + PATIENCE
        while self._look():
            assert time.monotonic() < end, f"it stays: {self.seen!r}"
        return self.process.wait(PATIENCE)

    def _look(self) -> bool:
        if select.select([self.keyboard], [], [], 0.2)[0]:
            try:
                block = os.read(self.keyboard, 65536)
            except OSError:  # what Linux says when nobody holds the other end
                return False
            self.seen += block.decode(errors="replace")
            return bool(block)
        return self.process.poll() is None


@contextlib.contextmanager
def terminal(*words: object) -> Iterator[Terminal]:
    shown = Terminal(*words)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()
        os.close(shown.keyboard)


def test_talking_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "talk.state"
    # no prompt on a terminal: it talks
    with terminal(folder, "--state", state, "--max-new-tokens", "1000000000") as shown:
        assert f"the state is saved to {state} at the end" in shown.until("> ")
        os.write(shown.keyboard, b"hello\n")
        shown.until("hello")
        time.sleep(1.0)
        # an answer without end is stopped, and the loop goes on; the answer may well hold what looks like a prompt
        shown.type("\x03", mark="(stopped)\r\n> ")
        time.sleep(1.0)  # until the line is waited for: Python's input() loses an interruption just before that
        assert "leaves" in shown.type("\x03")
        assert "did you mean 'freeze'" in shown.type("/freez\n")
        assert not state.exists()
        assert shown.leave("\x04") == 0
        assert "Traceback" not in shown.seen and "\x1b[" not in shown.seen
    model = tb.load(folder)
    read = position(model, tb.load_state(state, model))
    assert read is not None and read > len("hello\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_what_was_read_before_an_interruption_is_kept(
    folder: Path, tmp_path: Path, number: signal.Signals, in_process: Any
) -> None:
    state = tmp_path / "a.state"
    reading = in_process.start("infer", folder, "--state", state, "--max-new-tokens", "0", pipe="stdin")
    with (in_process.folder / "stdin").open("wb", buffering=0) as pipe:
        fcntl.fcntl(pipe.fileno(), F_SETPIPE_SZ, BLOCK)
        for _ in range(3):  # where the third has room, the first has been read, and the second has been taken
            os.write(pipe.fileno(), b"x" * BLOCK)
        os.kill(reading, number)
        ((status, _),) = in_process.end()
    err = (in_process.folder / "stderr").read_text()
    assert status == 128 + number
    model = tb.load(folder)
    read = position(model, tb.load_state(state, model))
    assert read is not None and read >= BLOCK and read % PIECE == 0
    said = f"interrupted; the state after {read:,} tokens of this session is saved to {state}\n"
    assert err == f"titans-infer: error: {said}"


def test_a_reader_that_leaves_ends_it(folder: Path, tmp_path: Path, in_process: Any) -> None:
    state = tmp_path / "a.state"
    words = ("hello", "--state", state, "--max-new-tokens", "100000000")
    (done,) = in_process("infer", folder, *words, reader="head -c 5")
    assert (done.status, done.err, len(done.out)) == (1, b"", 5)
    assert tb.load_state(state, tb.load(folder)) is not None


def assert_constant(folder: Path, text: Path, in_process: Any, *sizes: int) -> None:
    peaks = []
    for size in sizes:
        text.write_bytes(os.urandom(2**16) * (size // 2**16))
        (done,) = in_process("infer", folder, "--file", text, "--max-new-tokens", "0", "--json")
        assert done.status == 0 and json.loads(done.out)["read"]["tokens"] == size
        peaks.append(done.peak)
    # 64 KiB are read before memory is at its largest; after that it varies by about one MiB from run to run
    assert peaks[1] - peaks[0] < 3 * 2**10


def test_memory_does_not_grow_with_the_text(folder: Path, tmp_path: Path, in_process: Any) -> None:
    assert_constant(folder, tmp_path / "text", in_process, 2**16, 2**17)


@pytest.mark.slow
def test_memory_does_not_grow_over_two_million_tokens(folder: Path, tmp_path: Path, in_process: Any) -> None:
    assert_constant(folder, tmp_path / "text", in_process, 2**16, 2**21)

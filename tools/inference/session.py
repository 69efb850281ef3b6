"""A session of ``titans-infer``: a saved model with its tokenizer, the text it reads, and its state in a file."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ... import recipes
from ...blocks.generation import Sampler, read_draft, read_prompt, steps
from ...blocks.language_model import LanguageModel
from ...blocks.speculation import Drafted, check_draft, speculate
from ...blocks.state import State, batch_size, named_tensors
from ...recipes import StorageError, packaged_names
from ...recipes.atomic_write import locked_folder
from ...recipes.parse import read_file
from ...recipes.saved_format import INDEX, MODEL, RUN, TOKENIZER, as_path, saved_folder
from ...recipes.saved_state import expect_replaceable
from ...registry import nearest
from ..options import expect_text_file, placement
from ..terminal import CommandFailed, UsageError, console
from ..training.run_folder import is_run
from .reading import PIECE, position
from .tokenizer import Lengths, Tokenizer, check_ids, open_tokenizer

MAX_CANDIDATES = 1000
"""Folders that are searched for the nearest name."""

BLOCK = 2**16
"""Bytes that are read from a file at once."""
STANDARD_INPUT = "-"
AHEAD = 32
"""Tokens that are generated together with a draft."""
LINE_SECONDS = 30.0
"""Between lines about the progress, where no bar is shown."""


@contextlib.contextmanager
def usage_errors(subject: str) -> Iterator[None]:
    """Turn ``OSError`` and ``ValueError`` inside the block into ``UsageError``, which begins with ``subject``."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(f"{subject}: {getattr(error, 'strerror', None) or error}") from None


# -- the model ---------------------------------------------------------------------------------------------------------


def open_model(
    name: str, tokenizer: str | None, device_name: str, dtype_name: str | None
) -> tuple[LanguageModel, Tokenizer]:
    """The model in evaluation mode and its tokenizer: ``bytes``, ``ids``, a file, or ``None`` for its own, or bytes.

    Raises ``UsageError``, ``RecipeError`` and ``StorageError``, and ``UsageError`` for a model of more tokens than
    bytes that has no tokenizer.
    """
    folder = find_model(name)
    device, _ = placement(device_name, dtype_name or "float32")
    model = recipes.load(folder, device=device, dtype=dtype_name).eval()
    if model.vocab is None:
        raise UsageError(f"{name}: a model of vectors (vocab: null), which neither reads nor writes text")
    if tokenizer is None and model.tokenizer is not None:
        return model, open_tokenizer(str(folder / TOKENIZER), model.vocab, model.tokenizer)  # type: ignore[arg-type]
    if tokenizer is None and folder.name == MODEL:
        tokenizer = _tokenizer_of(folder.parent)
    if tokenizer is None and model.vocab > 256:
        message = f"{name}: the model has {model.vocab:,} tokens, and no tokenizer is saved with it"
        raise UsageError(f"{message}: give --tokenizer FILE, or bytes or ids if it was trained on those")
    return model, open_tokenizer(tokenizer or "bytes", model.vocab)


def open_draft(name: str, model: LanguageModel) -> LanguageModel | Literal["prompt"]:
    """The draft of ``model``: ``prompt``, or the folder of a smaller model. Raises ``UsageError``."""
    if name == "prompt":
        return "prompt"
    like = next(model.parameters())
    try:
        place = find_model(name)
    except UsageError as error:
        raise UsageError(f"--draft: {error}{nearest(name, ['prompt'])}") from None
    draft = recipes.load(place, device=like.device, dtype=like.dtype).eval()
    try:
        check_draft(draft, model)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    return draft


def find_model(name: str) -> Path:
    """The folder of a saved model, or that of the model of a run. Raises ``UsageError`` with the nearest name."""
    folder = Path(name)
    with usage_errors(name):
        place = saved_folder(folder)
        if (place / INDEX).exists():
            return place
        raise UsageError(f"{name}: {_why_no_model(folder)}")


def _why_no_model(folder: Path) -> str:
    if is_run(folder):
        return f"this run has not saved its model yet (no {MODEL}/{INDEX}), which it does at its end"
    if folder.is_dir():
        inside = _models_in(folder)
        hint = f"; did you mean {str(folder / inside[0])!r}?" if inside else ""
        return f"no saved model is in this folder (no {INDEX}){hint}"
    if folder.exists():
        hint = f"; its folder is {str(folder.parent)!r}" if folder.name == INDEX else ""
        return f"a file; expected the folder of a saved model{hint}"
    if str(folder) in packaged_names():
        return (
            f"a recipe, not a saved model: `titans-build {folder} --out DIR` saves one with fresh weights, "
            "titans-train a trained one"
        )
    hint = nearest(folder.name, _models_in(folder.parent)) if folder.parent.is_dir() else ""
    return f"no such folder{hint}; expected a saved model, or the folder of a titans-train run"


def _tokenizer_of(run: Path) -> str | None:
    """The tokenizer of the data of a run by an earlier version, which saved none with the model."""
    if (run / TOKENIZER).is_file():
        return str(run / TOKENIZER)
    if not is_run(run):
        return None
    recorded = read_file(run / RUN)
    data = recorded.get("data") if isinstance(recorded, dict) else None
    if not isinstance(data, dict):
        return None
    name = data.get("tokenizer")
    return name if isinstance(name, str) else "bytes" if data.get("tokens_are") == "bytes" else None


def _models_in(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that hold a model, or a run with one."""
    places = itertools.islice(folder.iterdir(), MAX_CANDIDATES)
    return sorted(place.name for place in places if (place / INDEX).exists() or (place / MODEL / INDEX).exists())


# -- the text ----------------------------------------------------------------------------------------------------------


class Text:
    """The bytes of files, one after the other, and then words joined by spaces; nothing is added."""

    def __init__(self, files: Sequence[str], words: Sequence[str], option: str = "--file") -> None:
        """``option``: the one that named the files. Raises ``UsageError`` for a file that cannot be read."""
        self.words = os.fsencode(" ".join(words))
        self.files, self.option = list(files), option
        self.read = 0
        """Bytes that were yielded."""
        if self.files.count(STANDARD_INPUT) > 1:
            raise UsageError("--file -: standard input can be read once")
        sizes = [self._size(name) for name in files]
        self.size = None if None in sizes else sum(filter(None, sizes)) + len(self.words)
        """Bytes in all; ``None`` for a pipe, whose size is not known in advance."""

    def __iter__(self) -> Iterator[bytes]:
        for name in self.files:
            if name == STANDARD_INPUT and sys.stdin is None:
                raise UsageError("standard input is closed: give a prompt or --file FILE")
            with usage_errors(f"{self.option} {name}"), contextlib.ExitStack() as opened:
                file: Any = sys.stdin.buffer if name == STANDARD_INPUT else opened.enter_context(open(name, "rb"))
                # read1 returns what a pipe holds now instead of waiting for a full block
                while block := file.read1(BLOCK):
                    self.read += len(block)
                    yield block
        self.read += len(self.words)
        if self.words:
            yield self.words

    def _size(self, name: str) -> int | None:
        if name == STANDARD_INPUT:
            return None
        with usage_errors(f"{self.option} {name}"):
            found = os.stat(name)
            if stat.S_ISDIR(found.st_mode):
                raise UsageError(f"{self.option} {name}: a folder; expected a file")
            expect_text_file(name, self.option)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
                return None
            with open(name, "rb"):
                return found.st_size


@contextlib.contextmanager
def reading_progress(text: Text, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, or a line every ``LINE_SECONDS`` if that is no terminal.

    Call what it yields with the tokens read so far.
    """
    if not sys.stderr.isatty():
        yield _progress_lines(text, description)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[tokens]:,} tokens, {task.fields[speed]:,.0f}/s")
    columns = (TextColumn("{task.description}"), BarColumn(), speed, TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console(sys.stderr), transient=True, disable=text.size == 0) as bar:
        task = bar.add_task(description, total=text.size, tokens=0, speed=0)

        def update(tokens: int) -> None:
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=text.read, tokens=tokens, speed=tokens / seconds)

        yield update


def _progress_lines(text: Text, description: str) -> Callable[[int], None]:
    start = shown = time.monotonic()

    def update(tokens: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < LINE_SECONDS:
            return
        shown = now
        share = f", {text.read / text.size:.0%}" if text.size else ""
        print(f"{description}: {tokens:,} tokens{share}, {tokens / (now - start):,.0f}/s", file=sys.stderr, flush=True)

    return update


# -- the session -------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """The position of a model in a text."""

    state: State
    """The state after every token so far."""
    logits: Tensor | None
    """``[1, vocab]``: the prediction of the next token; ``None`` before the first."""
    tokens: int
    """Tokens that were read in this session."""
    seen: Tensor | None = None
    """``[1, tokens]``: these, if there is a draft."""


class Session:
    """One row that reads and writes. An interruption leaves it after the last complete piece or token."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, target: Path | None = None, draft: Any = None
    ) -> None:
        """``target``: the file that the state is saved to at the end. ``draft``: as of ``LanguageModel.generate``."""
        self.model, self.tokenizer = model, tokenizer
        self.draft = draft
        self.drafted = Drafted(0, 0, 0)
        """Of the last answer."""
        self.target = target
        self.device = next(model.parameters()).device
        self.reading = Reading(None, None, 0)
        """Replaced as a whole, so that an interruption finds it consistent. ``tokens`` counts from the loaded state."""
        self.loaded_position: int | None = 0
        """Tokens that the loaded state had read."""

    @property
    def target(self) -> Path | None:
        """The file that the state is saved to at the end."""
        return self._target

    @target.setter
    def target(self, path: Path | None) -> None:
        self._target, self._known = path, None if path is None else _identity(path)

    @property
    def position(self) -> int | None:
        """Tokens that the state has read in all sessions; ``None`` where its blocks do not count them."""
        return None if self.loaded_position is None else self.loaded_position + self.reading.tokens

    def read(self, text: Iterable[bytes], on_piece: Callable[[int], None] = lambda tokens: None) -> int:
        """Read ``text`` and return its number of tokens; ``on_piece`` is called with the tokens so far.

        Raises ``UsageError`` for text that has no token ids of the model.
        """
        start = self.reading
        for piece in self.pieces(text):
            logits, state = read_prompt(self.model, piece, self.reading.state)
            self.reading = self._after(self.reading, piece, logits, state)
            on_piece(self.reading.tokens - start.tokens)
        return self.reading.tokens - start.tokens

    def pieces(self, text: Iterable[bytes], on_lengths: Lengths | None = None) -> Iterator[Tensor]:
        """``text`` in token ids ``[1, time]`` on the model's device, in pieces of ``PIECE`` tokens.

        ``on_lengths``: called with the bytes of the tokens, ahead of the pieces.
        """
        held = torch.empty(0, dtype=torch.int64)
        for ids in self.tokenizer.encode(text, on_lengths):
            check_ids(ids, self.model.vocab, f"--tokenizer {self.tokenizer.name}")
            held = torch.cat([held, ids])
            while len(held) >= PIECE:
                yield held[None, :PIECE].to(self.device)
                held = held[PIECE:]
        if len(held):
            yield held[None].to(self.device)

    def generate(
        self, max_new_tokens: int, sampler: Sampler, on_token: Callable[[int], None] = lambda token: None
    ) -> Generator[str]:
        """Yield the text of up to ``max_new_tokens`` new tokens; a character is yielded when it is complete.

        Close the generator to stop early: ``reading`` is then the position after the last token.
        Raises ``UsageError`` where nothing was read before, and ``CommandFailed`` where the model has diverged.
        """
        if self.reading.logits is None:
            hint = "; a state is what was read, without what comes next: give it at least a line end, $'\\n'"
            message = "there is nothing to continue: the prompt is empty"
            raise UsageError(message + ("" if self.reading.state is None else hint))
        decoder = self.tokenizer.decoder()
        choose = self._choose if self.draft is None else self._choose_with_draft
        try:
            with contextlib.closing(choose(self.reading.logits, sampler, max_new_tokens)) as tokens:
                for token in tokens:
                    on_token(token)
                    if text := decoder.feed(token):
                        yield text
        except ValueError as error:
            raise CommandFailed(f"generation stopped: {error}") from None
        if text := decoder.finish():
            yield text

    def _choose(self, logits: Tensor, sampler: Sampler, count: int) -> Generator[int]:
        """Yield ``count`` new tokens. ``reading`` is then the position after the token."""
        for step in steps(self.model, logits, self.reading.state, sampler, count):
            self.reading = Reading(step.state, step.logits, self.reading.tokens + 1)
            yield int(step.token)

    def _choose_with_draft(self, logits: Tensor, sampler: Sampler, count: int) -> Generator[int]:
        """``_choose``, where ``reading`` is the position after the token once the generator is closed."""
        seen = self.reading.seen
        assert seen is not None  # there are logits
        source = read_draft(self.draft, seen, None, sampler)
        self.drafted = Drafted(0, 0, 0)
        while count:
            before, taken = self.reading, 0
            found = speculate(self.model, logits, before.state, sampler, min(count, AHEAD), source)
            logits, state = found.logits, found.state
            self.drafted = Drafted(*map(sum, zip(self.drafted, found.drafted)))
            try:
                for token in found.tokens[0].tolist():
                    taken += 1
                    yield token
            finally:
                tokens = found.tokens[:, :taken]
                if taken < found.tokens.shape[1]:  # the tokens are read again up to the last one that was taken
                    logits, state = read_prompt(self.model, tokens, before.state)
                self.reading = self._after(before, tokens, logits, state)
            count -= taken

    def _after(self, before: Reading, tokens: Tensor, logits: Tensor, state: State) -> Reading:
        """The position after ``tokens`` [1, time]."""
        seen = None
        if self.draft is not None:
            seen = tokens if before.seen is None else torch.cat([before.seen, tokens], dim=1)
        return Reading(state, logits, before.tokens + tokens.shape[1], seen)

    def load(self, path: Path) -> None:
        """Continue from the state in a file. Raises ``StorageError``, and changes nothing, where that fails."""
        known = _identity(path)
        state = recipes.load_state(path, self.model)
        rows = batch_size(state)
        if rows != 1:
            raise StorageError(f"{path}: a state of {rows} rows; a session is one row")
        self.reading, self.loaded_position = Reading(state, None, 0), position(self.model, state)
        if path == self.target:
            self._known = known

    def save(self, path: Path) -> None:
        """Write the state to a file atomically.

        Raises ``CommandFailed`` for a state with NaN or infinity, and if another session has written the file of
        ``target`` since this one read it; the state is then saved beside it.
        """
        state = self.reading.state
        if state is None:
            with torch.no_grad():
                state = self.model.init_state(1)
        for name, tensor in named_tensors(state):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CommandFailed(
                    f"{path}: not saved: the state holds NaN or infinity ({name}): the model has diverged"
                )
        with locked_folder(path.absolute().parent):
            if path == self.target and self._known != _identity(path):
                taken = path
                while path.exists():
                    path = path.with_name(f"{path.name}.other")
                recipes.save_state(state, path, self.model)
                message = "another session has saved its state there meanwhile, which is kept"
                raise CommandFailed(f"{taken}: {message}; the state of this session is saved to {path}")
            recipes.save_state(state, path, self.model)
            if path == self.target:
                self._known = _identity(path)

    def reset(self) -> None:
        """Return to the initial state."""
        self.reading, self.loaded_position = Reading(None, None, 0), 0


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a file has been replaced; ``None`` if it is no regular file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def check_state_file(path: Path, option: str) -> None:
    """Raise ``UsageError`` where a state could not be written to ``path``, or would replace another kind of file."""
    check_writable(path, option)
    try:
        expect_replaceable(path)
    except StorageError as error:
        raise UsageError(f"{option} {error}") from None


def check_writable(path: Path, option: str) -> None:
    """Raise ``UsageError`` where no file could be written to ``path``."""
    with usage_errors(f"{option} {path}"):
        as_path(path, option)
        if path.is_dir():
            raise UsageError(f"{option} {path}: a folder; expected the name of a file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} {path}: there is no folder {path.absolute().parent}")
        if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
            raise UsageError(f"{option} {path}: {path.resolve().parent} cannot be written to")

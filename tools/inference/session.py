"""A model, the text it has read and the state that came of it: read on, answer, keep the state in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ... import recipes
from ...blocks.generation import Sampler, steps
from ...blocks.language_model import LanguageModel
from ...blocks.state import State, batch_size, named_tensors
from ...recipes import StorageError
from ...recipes.storage import STATE_FORMAT
from ..terminal import CommandFailed, UsageError
from .codec import Codec
from .reading import PIECE, Reading, cut, position, readings


class Session:
    """One row that reads and writes. Whatever interrupts it, it stands after the last whole piece or token."""

    def __init__(self, model: LanguageModel, codec: Codec) -> None:
        self.model, self.codec = model, codec
        self.device = next(model.parameters()).device
        self.at = Reading(None, None, 0)
        """Replaced as a whole, so that an interruption finds it consistent. ``tokens``: of this session."""
        self.before: int | None = 0
        """Tokens that the state had read when it came."""

    @property
    def position(self) -> int | None:
        """Tokens the state has read, from the first session on; ``None`` where its blocks do not count them."""
        return None if self.before is None else self.before + self.at.tokens

    def read(self, text: Iterable[bytes], on_piece: Callable[[int], None] = lambda tokens: None) -> int:
        """Read ``text`` and return how many tokens it was; ``on_piece`` is told how many so far.

        Raises ``UsageError`` for what cannot be written in the model's token ids.
        """
        began = self.at
        for reading in readings(self.model, self.pieces(text), began.state):
            self.at = Reading(reading.state, reading.logits, began.tokens + reading.tokens)
            on_piece(reading.tokens)
        return self.at.tokens - began.tokens

    def pieces(self, text: Iterable[bytes]) -> Iterator[Tensor]:
        """``text`` in token ids ``[1, time]``, on the model's device, in pieces that are worth a call of the model."""
        held: list[Tensor] = []
        for ids in self.codec.encode(text):
            self._check_ids(ids)
            held.append(ids)
            if sum(map(len, held)) >= PIECE:
                joined = torch.cat(held)
                ready = len(joined) - len(joined) % PIECE
                held = [joined[ready:]]
                yield from (piece.to(self.device) for piece in cut(joined[None, :ready]))
        if held:
            yield from (piece.to(self.device) for piece in cut(torch.cat(held)[None]))

    def answer(
        self, most: int, sampler: Sampler, on_token: Callable[[int], None] = lambda token: None
    ) -> Iterator[str]:
        """Up to ``most`` new tokens as text, as it comes; a letter is held back until it is whole.

        Raises ``UsageError`` when nothing was read to go on from, and ``CommandFailed`` when the model has diverged.
        """
        if self.at.logits is None:
            hint = "; a state is what was read, without what comes next: give it at least a line end, $'\\n'"
            said = "there is nothing to go on from: the prompt is empty"
            raise UsageError(said + ("" if self.at.state is None else hint))
        decoder = self.codec.decoder()
        try:
            for step in steps(self.model, self.at.logits, self.at.state, sampler, most):
                self.at = Reading(step.state, step.logits, self.at.tokens + 1)
                token = int(step.token)
                on_token(token)
                if text := decoder.feed(token):
                    yield text
        except ValueError as error:
            raise CommandFailed(f"the model says nothing more: {error}") from None
        if text := decoder.finish():
            yield text

    def load(self, path: Path) -> None:
        """Go on from the state in a file. Raises ``StorageError``, and changes nothing, where that cannot be."""
        state = recipes.load_state(path, self.model)
        rows = batch_size(state)
        if rows != 1:
            raise StorageError(f"{path}: a state of {rows} rows; a session is one row")
        self.at, self.before = Reading(state, None, 0), position(self.model, state)

    def save(self, path: Path) -> None:
        """Write the state to a file, in one step. Raises ``CommandFailed`` for a state that is worth nothing."""
        state = self.at.state if self.at.state is not None else self._fresh()
        for name, tensor in named_tensors(state):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CommandFailed(
                    f"{path}: not saved: the state holds NaN or infinity ({name}): the model has diverged"
                )
        recipes.save_state(state, path, self.model)

    def reset(self) -> None:
        """Forget all that was read."""
        self.at, self.before = Reading(None, None, 0), 0

    def _fresh(self) -> State:
        with torch.no_grad():
            return self.model.init_state(1)

    def _check_ids(self, ids: Tensor) -> None:
        vocab = self.model.vocab
        assert vocab is not None
        if len(ids) and int(ids.max()) >= vocab:
            raise UsageError(
                f"--tokenizer {self.codec.name}: token id {int(ids.max())} is outside of the model's vocabulary of "
                f"{vocab:,} (0 to {vocab - 1:,})"
            )


def check_target(path: Path, option: str) -> None:
    """Raise ``UsageError``, before the work, when a state could not or should not be written to ``path`` after it."""
    check_place(path, option)
    if path.is_file() and not _is_state(path, option):
        raise UsageError(f"{option} {path}: there is a file that is no saved state, which would be replaced")


def check_place(path: Path, option: str) -> None:
    """Raise ``UsageError``, before the work, when no file could be written to ``path`` after it."""
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: a folder; expected the name of a file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} {path}: there is no folder {path.absolute().parent}")
        if not os.access(path.resolve().parent, os.W_OK | os.X_OK):
            raise UsageError(f"{option} {path}: {path.resolve().parent} cannot be written to")
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None


def _is_state(path: Path, option: str) -> bool:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return (file.metadata() or {}).get("format") == STATE_FORMAT
    except SafetensorError:
        return False
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from None

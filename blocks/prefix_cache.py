"""``PrefixCache``: states by the tokens that led to them, so that a common beginning of prompts is read once."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import is_sharded
from .decode import ModuleSnapshot
from .fingerprint import sums_of_bits
from .prompt import read_prompt
from .state import State, concatenate, map_state, named_tensors, select

PIECE = 4096
"""Tokens of a row that are read in one call at most, which limits the memory of a call."""
NEAREST = 64
"""Distance of the last checkpoint from the end of a prompt. The distance of each one before is twice as large."""
GRID = 8
"""Further checkpoints of a long prompt, at equal distances from its beginning."""


class PrefixStatistics(NamedTuple):
    """What a cache holds, and what it has saved."""

    hits: int
    """Prompts of which a beginning was found."""
    misses: int
    """Prompts that were read from their first token."""
    tokens_saved: int
    """Tokens of prompts that were not read again."""
    tokens_read: int
    """Tokens of prompts that were read."""
    states: int
    """States in the cache."""
    nbytes: int
    """Size of all states and logits in the cache."""


class _Entry(NamedTuple):
    state: State
    logits: Tensor
    length: int
    nbytes: int


class PrefixCache:
    """States of one model by the tokens that led to them: ``model.generate(tokens, prefix_cache=cache)``.

    The state after the longest stored beginning of a prompt is used, and the rest is read. Tokens and logits are those
    without a cache, up to rounding. States are stored at the end of prompts and answers, and at checkpoints along a
    prompt: at 64, 128, 256, ... tokens before its end, so that another continuation of the same text reads at most
    twice the tokens that differ, and at 8 or fewer equal distances. A common beginning of the rows of a batch is read
    once. When the weights, the blocks or the hooks of the model have changed, the cache is emptied.

    Args:
        max_bytes: size of all states and logits. The least recently used ones are removed first.

    A cache belongs to the first model that uses it. It may be used by several threads. Raises ``ValueError`` for
    another model, and for ``max_bytes`` that is not a positive integer.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes: expected an integer >= 1, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()  # of the entries
        self._nbytes = 0
        self._counts: Counter[str] = Counter()
        self._model: nn.Module | None = None
        self._snapshot: ModuleSnapshot | None = None
        self._identity = b""

    @property
    def statistics(self) -> PrefixStatistics:
        """Counts since the cache was created, and its size."""
        with self._lock:
            return PrefixStatistics(
                self._counts["hits"], self._counts["misses"], self._counts["tokens_saved"], self._counts["tokens_read"],
                len(self._entries), self._nbytes,
            )  # fmt: skip

    def clear(self) -> None:
        """Remove all states."""
        with self._lock:
            self._entries.clear()
            self._lengths.clear()
            self._nbytes = 0

    @torch.no_grad()
    def read(self, model: Any, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Process a prompt, ``tokens`` [batch, time] int64 with ``mask`` [batch, time] bool, from a fresh state.

        Return the logits ``[batch, vocab]`` at the last valid token of each row, and the state. Raises ``ValueError``
        for a row without a valid token, and what the model raises for its inputs.
        """
        model.embed(tokens[:, :0] if isinstance(tokens, Tensor) and tokens.dim() == 2 else tokens)  # checks
        if mask is not None:
            model.check_mask(mask, tuple(tokens.shape))
        texts = _texts(tokens, mask)
        for row, text in enumerate(texts):
            if not len(text):
                raise ValueError(f"tokens: row {row} has no valid token")
        identity = self._identify(model)
        depths, logits, state, read = self._read(model, identity, texts, tokens.device)
        given = sum(map(len, texts))
        found = sum(depth > 0 for depth in depths)
        with self._lock:
            self._counts.update(hits=found, misses=len(texts) - found, tokens_saved=given - read, tokens_read=read)
        return logits, state

    @torch.no_grad()
    def store(self, model: Any, tokens: Tensor, state: State, logits: Tensor, mask: Tensor | None = None) -> None:
        """Store the state of each row after ``tokens`` [batch, time], and the logits ``[batch, vocab]`` after them."""
        identity = self._identify(model)
        for row, text in enumerate(_texts(tokens, mask)):
            self._put(identity, _digest(identity, text, [len(text)])[0], len(text), row, state, logits)

    def _read(
        self, model: Any, identity: bytes, texts: list[Tensor], device: torch.device
    ) -> tuple[list[int], Tensor, State, int]:
        """Tokens of each text that were found, the logits and state after it, and the number of tokens read."""
        rows, read = len(texts), 0
        common: _Entry | None = None
        if rows > 1 and (shared := _common(texts)):
            _, logits, state, read = self._read(model, identity, [texts[0][:shared]], device)
            common = _Entry(state, logits, shared, 0)
        found = [self._find(identity, text) for text in texts]
        if common is not None:  # it may be too large to be stored
            found = [common if entry is None or entry.length < shared else entry for entry in found]
        depths = [0 if entry is None else entry.length for entry in found]
        if model.grows and len(set(depths)) > 1:  # rows of different lengths cannot be one state
            found = [common] * rows
            depths = [0 if common is None else common.length] * rows
        fresh = None if all(found) else model.init_state(1)
        states = [fresh if entry is None else entry.state for entry in found]
        state = states[0] if rows == 1 else concatenate(states)
        like = next(model.parameters())
        unused = torch.zeros(1, model.vocab, dtype=like.dtype, device=device)
        logits = torch.cat([unused if entry is None else entry.logits for entry in found])

        # the texts end in the last column, so that checkpoints are at equal distances from the ends
        rests = [len(text) - depth for text, depth in zip(texts, depths)]
        width = max(rests)
        padded = torch.zeros(rows, width, dtype=torch.int64)
        for row, (text, rest) in enumerate(zip(texts, rests)):
            padded[row, width - rest :] = text[len(text) - rest :]
        starts = torch.tensor([width - rest for rest in rests]).unsqueeze(1)
        kept = _checkpoints(width, depths[0], rows == 1)
        cuts = sorted({*kept, *range(PIECE, width, PIECE)})
        digests = []
        for text, rest in zip(texts, rests):
            ends = [len(text) - width + column for column in sorted(kept)]
            usable = [end for end in ends if end > len(text) - rest]
            digests.append(dict(zip(usable, _digest(identity, text, usable))))
        for start, stop in zip([0, *cuts], cuts):
            valid = torch.arange(start, stop) >= starts
            piece, mask = padded[:, start:stop].to(device), None if bool(valid.all()) else valid.to(device)
            logits, state = read_prompt(model, piece, state, mask=mask, logits=logits)
            read += int(valid.sum())
            for row, text in enumerate(texts):
                end = len(text) - width + stop
                if stop in kept and end in digests[row]:
                    self._put(identity, digests[row][end], end, row, state, logits)
        return depths, logits, state, read

    def _find(self, identity: bytes, text: Tensor) -> _Entry | None:
        """The entry of the longest stored beginning of ``text``."""
        with self._lock:
            if identity != self._identity:
                return None
            lengths = sorted(length for length in self._lengths if length <= len(text))
        keys = _digest(identity, text, lengths)
        with self._lock:
            for key in reversed(keys):
                if key in self._entries:
                    self._entries.move_to_end(key)
                    return self._entries[key]
        return None

    def _put(self, identity: bytes, key: bytes, length: int, row: int, state: State, logits: Tensor) -> None:
        with self._lock:
            if identity != self._identity or key in self._entries:
                return
        # copies of their own, which do not keep the memory of larger tensors
        state = map_state(_compact, state if len(logits) == 1 else select(state, [row]))
        logits = logits[row : row + 1].clone()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for _, x in named_tensors(state)}
        entry = _Entry(state, logits, length, sum(storages.values()) + logits.numel() * logits.element_size())
        with self._lock:
            if identity != self._identity or key in self._entries or entry.nbytes > self.max_bytes:
                return
            self._entries[key] = entry
            self._lengths[length] += 1
            self._nbytes += entry.nbytes
            while self._nbytes > self.max_bytes:
                _, old = self._entries.popitem(last=False)
                self._nbytes -= old.nbytes
                self._lengths[old.length] -= 1
                if not self._lengths[old.length]:
                    del self._lengths[old.length]

    def _identify(self, model: Any) -> bytes:
        """A digest of the model. The cache is emptied if it has changed."""
        identity = _fingerprint(model)
        with self._lock:
            if self._model is None:
                self._model = model
            if self._model is not model:
                raise ValueError("prefix_cache: it has states of another model: create a PrefixCache for each model")
            if identity != self._identity or self._snapshot is None or not self._snapshot.unchanged():
                self.clear()
                self._snapshot, self._identity = ModuleSnapshot(model), identity
            return identity


def _texts(tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The valid tokens of each row, on the CPU."""
    rows = list(tokens.cpu())
    return rows if mask is None else [row[valid] for row, valid in zip(rows, mask.cpu())]


def _common(texts: list[Tensor]) -> int:
    """The number of first tokens that all texts share."""
    shortest = min(map(len, texts))
    rows = torch.stack([text[:shortest] for text in texts])
    different = (rows != rows[0]).any(dim=0).nonzero()
    return int(different[0]) if len(different) else shortest


def _checkpoints(width: int, depth: int, grid: bool) -> set[int]:
    """The columns, of ``width`` after ``depth`` tokens that are known, whose states are stored."""
    columns, distance = {width} if width else set(), NEAREST
    while distance < width:
        columns.add(width - distance)
        distance *= 2
    if grid and width > GRID * NEAREST:
        # powers of two: texts of almost equal lengths share them
        spacing = 1 << (-(-(depth + width) // GRID) - 1).bit_length()
        columns |= {place - depth for place in range(spacing, depth + width, spacing) if place > depth}
    return columns


def _digest(identity: bytes, text: Tensor, lengths: Iterable[int]) -> list[bytes]:
    """A cryptographic hash of the first tokens of ``text``, for increasing ``lengths``."""
    running, done, found = hashlib.blake2b(identity, digest_size=32), 0, []
    data = memoryview(text.numpy().tobytes())
    for length in lengths:
        running.update(data[8 * done : 8 * length])
        done = length
        found.append(running.copy().digest())
    return found


def _compact(x: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def _fingerprint(model: nn.Module) -> bytes:
    """A digest of everything that a module computes with: its weights, the settings of its blocks, and autocast."""
    digest = hashlib.blake2b(digest_size=32)
    kind = next(model.parameters()).device.type
    digest.update(repr((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))).encode())
    for name, module in model.named_modules():
        settings = {field: value for field, value in vars(module).items() if _is_plain(value)}
        digest.update(repr((name, type(module).__qualname__, sorted(settings.items()))).encode())
        for field, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if x.is_meta or is_sharded(x):
                raise ValueError(f"prefix_cache: {name}.{field} is offloaded or sharded, so its changes are not seen")
            digest.update(repr((field, x.shape, x.dtype, x.device)).encode())
            digest.update(sums_of_bits(x))
    return digest.digest()


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a string, or a collection of these. ``None`` may be filled later."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return bool(value) and all(map(_is_plain, value.values()))
    return isinstance(value, (str, int, float))

"""The model: an embedding, a stack of layers, a norm and a head; or the stack alone, over any embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from ..kernels.linear import project
from ..registry import Spec
from . import decode_plans  # noqa: F401 registers the plans
from .block import Blocks, check_state
from .combinators import Layer
from .decode import Decoder, model_decoder
from .fingerprint import Fingerprint
from .freezing import Frozen, freeze, thaw
from .generation import Generation, generate
from .layers import RMSNorm
from .state import State, nbytes, trainable

IGNORED = -100
"""A target with this value adds nothing to the loss."""


class ModelState(NamedTuple):
    """What a model carries from one token to the next: one tree per layer, mirroring the recipe's."""

    layers: tuple[State, ...]
    recipe: Tensor
    """``[batch]`` int64: the fingerprint of the recipe whose model it is of (``Fingerprint``)."""


class ModelOutput(NamedTuple):
    """What one call of a model returns."""

    logits: Tensor | None
    """``[batch, time, vocab]``, for the token after each; ``None`` without a vocabulary."""
    loss: Tensor | None
    """Mean cross-entropy (nats) over the targets that count, at least float32; ``None`` without targets."""
    state: ModelState
    """The state after all tokens."""
    hidden: Tensor
    """``[batch, time, dim]``: the outputs of the stack, normalised."""


class LanguageModel(nn.Module):
    """A stack of layers between an embedding and a head.

    ``layers``: for each layer from first to last, its list of blocks. ``vocab``: number of token ids; ``None``
    leaves out embedding and head, for inputs that are not tokens. ``tie``: the head's weights are the embedding's.
    Biases there are none. Everything is initialised by ``materialise``. ``fingerprint``: that of the
    recipe, which the states contain; states of other recipes are rejected.
    """

    def __init__(
        self,
        dim: int,
        *,
        vocab: int | None = None,
        layers: Sequence[Sequence[Spec]],
        tie: bool = False,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        super().__init__()
        if tie and vocab is None:
            raise ValueError("tie=True needs a vocabulary: there is no embedding to share with the head")
        self.dim = dim
        self.vocab = vocab
        self.fingerprint = fingerprint if fingerprint is not None else Fingerprint()
        self.embedding = None if vocab is None else nn.Parameter(torch.empty(vocab, dim))
        self.layers = Blocks(Layer(dim, of=blocks) for blocks in layers)
        self.norm = RMSNorm(dim)
        self.head = None if vocab is None or tie else nn.Parameter(torch.empty(vocab, dim))
        self._first_parameter: tuple[nn.Module, str] | None = None
        self._expected_states: dict[object, State] = {}

    @property
    def grows(self) -> bool:
        """True when the state grows with the number of tokens read."""
        return any(layer.grows for layer in self.layers)

    @property
    def period(self) -> int:
        """Shifting every position by a multiple of this many tokens leaves the outputs unchanged."""
        return math.lcm(*(layer.period for layer in self.layers))

    def reset_parameters(self) -> None:
        """Embedding and head: normal, of deviation 0.02. The blocks initialise their own."""
        for weight in (self.embedding, self.head):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)

    def init_state(self, batch_size: int) -> ModelState:
        """A fresh state of ``batch_size`` rows: learned initial values, not zeros."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        return ModelState(tuple(layer.init_state(batch_size) for layer in self.layers), self._mark(batch_size))

    def forward(
        self,
        tokens: Tensor | None = None,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        check_finite: bool = True,
    ) -> ModelOutput:
        """Read ``tokens`` [batch, time] int64, or ``embeddings`` [batch, time, dim] of the model's dtype.

        ``state``: what an earlier call returned, or ``None`` for a fresh one. ``mask`` [batch, time] bool: true at
        valid tokens; the others leave the state as it was. ``targets`` [batch, time] int64: the token that follows
        each token (they are not shifted here); -100 and masked positions do not count. ``check_finite``: whether to
        refuse embeddings that hold NaN or infinity at valid tokens. Under ``torch.compile`` nothing is refused for its
        values.

        Nothing that is passed in is changed. It may have been made in inference mode: where gradients are recorded,
        the model works on a copy. Raises ``TypeError`` for a wrong dtype and ``ValueError`` for a wrong shape, device,
        token id, or a state of other rows or of another model; each says what was expected.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens [batch, time] or embeddings=[batch, time, dim], and not both")
        recording = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recording:  # autograd keeps its arguments, and refuses to keep tensors of inference mode
            tokens, embeddings, mask, targets = map(_ordinary, (tokens, embeddings, mask, targets))
        if tokens is not None:
            x = self.embed(tokens)
        else:
            assert embeddings is not None
            self._check_embeddings(embeddings)
            x = embeddings
        rows, time, _ = x.shape
        if mask is not None:
            self.check_mask(mask, (rows, time))
        if embeddings is not None and check_finite and not torch.compiler.is_compiling():
            finite = embeddings.isfinite().all(dim=-1)
            if not bool((finite if mask is None else finite | ~mask).all()):
                raise ValueError("embeddings hold NaN or infinity at valid tokens (check_finite=False allows it)")
        if targets is not None:
            self.check_targets(targets, (rows, time))
        if state is not None:
            self.check_state(state, rows)
            state = trainable(state) if recording else state
        hidden, state = self.run(x, state, mask)
        logits = None if self.vocab is None else self.predict(hidden)
        loss = None
        if targets is not None:
            assert logits is not None
            loss = _loss(logits, targets if mask is None else targets.masked_fill(~mask, IGNORED))
        return ModelOutput(logits, loss, state, hidden)

    def run(self, x: Tensor, state: ModelState | None, mask: Tensor | None) -> tuple[Tensor, ModelState]:
        """The stack on checked inputs: ``x`` [batch, time, dim] -> hidden [batch, time, dim], state."""
        if x.shape[1] == 0:
            return x, state if state is not None else self.init_state(x.shape[0])
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # nothing is hidden: every block takes its unmasked path
        states = []
        for layer, before in zip(self.layers, [None] * len(self.layers) if state is None else state.layers):
            x, after = layer(x, before, mask=mask)
            states.append(after)
        return self.norm(x)[0], ModelState(tuple(states), self._mark(x.shape[0]) if state is None else state.recipe)

    def decoder(self, rows: int) -> Decoder:
        """``run`` for one token ``[rows, 1, dim]`` at a time: see ``decode.model_decoder``."""
        return model_decoder(self, rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """``[batch, time]`` int64 -> ``[batch, time, dim]``, with every check on ``tokens``."""
        if self.embedding is None:
            raise ValueError("this model has no vocabulary (vocab: null): give embeddings=[batch, time, dim]")
        self._check("tokens", tokens, torch.int64, None)
        if tokens.dim() != 2 or tokens.shape[0] < 1:
            raise ValueError(f"tokens: expected [batch, time] with at least one row, got {list(tokens.shape)}")
        self._check_range("tokens", tokens)
        return embedding(tokens, self.embedding)

    def lookup(self, tokens: Tensor) -> Tensor:
        """``embed`` without the checks, for tokens that the model itself has drawn."""
        assert self.embedding is not None
        return embedding(tokens, self.embedding)

    def predict(self, hidden: Tensor) -> Tensor:
        """``[..., dim]`` -> logits ``[..., vocab]``."""
        weight = self.head if self.head is not None else self.embedding
        if weight is None:
            raise ValueError("this model has no vocabulary (vocab: null), so it has no logits")
        return project(hidden, weight)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 64,
        state: ModelState | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | torch.Generator | None = None,
        *,
        mask: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Generation:
        """Continue ``tokens`` [batch, time] by ``max_new_tokens`` tokens: see ``generation.generate``."""
        return generate(self, tokens, max_new_tokens, state, temperature, top_k, top_p, seed, mask=mask, logits=logits)

    def freeze_memory(self) -> Frozen:
        """From now on memories are read and not written, whatever the model reads or generates, from any state.

        Until ``unfreeze_memory``, or for the length of ``with model.freeze_memory():``. Attention, convolutions and
        all else go on as ever, and so do states. A state's memory holds afterwards what it held before, and goes on
        learning from there; a fresh state holds its persistent tokens, frozen or not. Raises ``ValueError`` where a
        memory is only written (``use: write``).
        """
        return freeze(self)

    def unfreeze_memory(self) -> None:
        """Let every memory that ``freeze_memory`` froze write again."""
        thaw(self)

    def flops(self, length: int) -> int:
        """Forward FLOPs (a multiply-add is 2) for one row of ``length`` tokens from a fresh state."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"length: expected an integer >= 0, got {length!r}")
        head = 0 if self.vocab is None else 2 * self.dim * self.vocab * length
        return sum(block.flops(length) for block in [*self.layers, self.norm]) + head

    def state_bytes(self) -> int:
        """Bytes of state for one row."""
        with torch.no_grad():
            return nbytes(self.init_state(1))

    def check_mask(self, mask: Tensor, shape: tuple[int, int]) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``mask`` is bool, of this shape, on the model's device."""
        self._check("mask", mask, torch.bool, shape)

    def check_targets(self, targets: Tensor, shape: tuple[int, int], name: str = "targets") -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``targets`` is int64, of this shape, ids or -100."""
        if self.vocab is None:
            raise ValueError(f"this model has no vocabulary (vocab: null), so it takes no {name}")
        self._check(name, targets, torch.int64, shape)
        self._check_range(name, targets, IGNORED)

    def check_state(self, state: ModelState, rows: int) -> None:
        """Raise ``ValueError`` or ``TypeError`` unless ``state`` is one of this model with ``rows`` rows."""
        if not isinstance(state, ModelState):
            hint = ": give its .state" if isinstance(getattr(state, "state", None), ModelState) else ""
            raise TypeError(f"state: expected a ModelState (init_state makes one), got {type(state).__name__}{hint}")
        recipe = state.recipe
        if isinstance(recipe, Tensor) and recipe.dtype == torch.int64:
            # before the shapes: that it is of another recipe says more than the first shape that differs
            self.fingerprint.check(recipe)
        if not torch.compiler.is_compiling():
            check_state(self, state, rows)

    def _mark(self, rows: int) -> Tensor:
        return torch.full((rows,), self.fingerprint.number, dtype=torch.int64, device=self.norm.gain.device)

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected [batch, time] = {list(shape)}, got {list(tensor.shape)}")
        device = next(self.parameters()).device
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, the model is on {device}: move one of them")
        if device.type == "meta":
            raise ValueError(f"{name}: the model is on the meta device: it has shapes, and no values to compute with")

    def _check_embeddings(self, embeddings: Tensor) -> None:
        dtype = next(self.parameters()).dtype
        if isinstance(embeddings, Tensor) and embeddings.is_floating_point() and not embeddings.is_meta:
            dtype = embeddings.dtype if torch.is_autocast_enabled(embeddings.device.type) else dtype
        self._check("embeddings", embeddings, dtype, None)
        if embeddings.dim() != 3 or embeddings.shape[0] < 1 or embeddings.shape[2] != self.dim:
            raise ValueError(f"embeddings: expected [batch, time, {self.dim}], got {list(embeddings.shape)}")

    def _check_range(self, name: str, ids: Tensor, ignored: int | None = None) -> None:
        if ids.numel() == 0 or torch.compiler.is_compiling():
            return
        if ignored is not None:
            ids = ids.masked_fill(ids == ignored, 0)
        low, high = map(int, torch.aminmax(ids))
        assert self.vocab is not None
        if low < 0 or high >= self.vocab:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: id {wrong} is outside the vocabulary of {self.vocab} (0 to {self.vocab - 1})")


def _ordinary(x: Tensor | None) -> Tensor | None:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    # a batch in which nothing counts has loss 0, not 0/0
    return total / (targets != IGNORED).sum().clamp(min=1)

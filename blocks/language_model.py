"""The model: an embedding, a stack of layers, a norm and a head, or only a stack of layers and a norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from ..kernels.custom_op import NOT_TRACED
from ..kernels.dispatch import expect_values, known, on_host, placed, shows_values, transforming
from ..kernels.documents import NO_DOCUMENT, Documents
from ..kernels.linear import project
from ..registry import Spec
from . import decode_plans  # noqa: F401 registers the plans
from .block import Blocks, check_state, initial_state, is_sharded, like_of, with_parameters
from .combinators import Layer
from .decode import Decoder, model_decoder
from .documents import expect_documents
from .fingerprint import Fingerprint
from .freezing import Frozen, freeze, thaw
from .generation import Generation, generate
from .layers import RMSNorm
from .parallel import Parallel
from .parallel_call import ContextCall
from .prefix_cache import PrefixCache
from .state import State, nbytes, prefix_lengths, rewind, trainable

IGNORED = -100
"""Targets with this value are ignored by the loss."""


class ModelState(NamedTuple):
    """The state of a model."""

    layers: tuple[State, ...]
    """The states of the layers."""
    recipe: Tensor
    """``[batch]`` int64: the fingerprint of the model's recipe (``Fingerprint``)."""
    document: Tensor
    """``[batch]`` int64: the id of the document that the state belongs to, if the last tokens had one."""


class ModelOutput(NamedTuple):
    """The result of one call of a model."""

    logits: Tensor | None
    """``[batch, time, vocab]``: predictions of the next tokens. ``None`` without a vocabulary."""
    loss: Tensor | None
    """The mean cross-entropy of the targets in nats, in float32 or wider. ``None`` without targets."""
    state: ModelState
    """The state after all tokens."""
    hidden: Tensor
    """``[batch, time, dim]``: the normalized outputs of the last layer."""

    def rewind(self, count: int | Sequence[int] | Tensor) -> ModelState:
        """Return the state after the first ``count`` tokens of the call, which had ``rewindable=True``.

        ``count`` is an integer, or one for each row, from 0 (the state before the call) to ``time`` (the state after
        it). Tokens that a mask hides count. Anything between is processed again, so the model must not have changed
        since. Gradients are those of the prefix. Raises ``TypeError`` or ``ValueError`` for other numbers.
        """
        raise RuntimeError("this call cannot go back: call the model with rewindable=True, and then out.rewind(count)")


class RewindableOutput(ModelOutput):
    """The result of a call with ``rewindable=True``."""

    _replay: Callable[..., ModelState]

    def rewind(self, count: int | Sequence[int] | Tensor) -> ModelState:
        rows, time = self.hidden.shape[:2]
        whole = all(length == time for length in prefix_lengths(count, rows, time))
        return self.state if whole else self._replay(count)


class LanguageModel(nn.Module):
    """A stack of layers between an embedding and a head, both without biases.

    Args:
        dim: width of the model.
        vocab: number of token ids. ``None`` omits embedding and head, for inputs that are vectors.
        layers: the blocks of each layer, from the first layer to the last.
        tie: whether the head shares the weights of the embedding.
        fingerprint: that of the recipe. States contain it, and states of other recipes are errors.

    Parameters are initialized by ``materialize``, not by the constructor.
    """

    parallel: Parallel | None = None
    """The ranks that share the model (``parallelize``)."""

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
        self._parameter: tuple[nn.Module, str] | None = None
        self._expected_states: dict[object, State] = {}

    @property
    def grows(self) -> bool:
        """Whether the state grows with the number of tokens."""
        return any(layer.grows for layer in self.layers)

    @property
    def period(self) -> int:
        """Shifting all positions by a multiple of ``period`` leaves the outputs unchanged."""
        return math.lcm(*(layer.period for layer in self.layers))

    def reset_parameters(self) -> None:
        """Initialize embedding and head: normal, std 0.02. Blocks initialize their own parameters."""
        for weight in (self.embedding, self.head):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)

    def init_state(self, batch_size: int) -> ModelState:
        """Return a fresh state of ``batch_size`` rows: learned initial values, not zeros."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        like = like_of(self)
        if is_sharded(self.norm.gain):  # a call gathers the parameters
            x = torch.zeros(batch_size, 0, self.dim, dtype=like.dtype, device=like.device)
            state: ModelState = self(embeddings=x).state
            return state
        state = self._fresh_state(batch_size)
        if self.parallel is not None:
            (state,) = self.parallel.outputs(self.parallel.whole_of(self, state))
        return state

    def _fresh_state(self, rows: int) -> ModelState:
        """``init_state`` of the heads that this process computes."""
        device = like_of(self).device
        layers = tuple(initial_state(layer, rows) for layer in self.layers)
        number = torch.full((rows,), self.fingerprint.number, dtype=torch.int64, device=device)
        known(number, [self.fingerprint.number] * rows)
        state = ModelState(layers, number, torch.full_like(number, NO_DOCUMENT))
        return state if self.parallel is None else self.parallel.once(state)

    def __call__(self, *args: Any, **named: Any) -> Any:
        if torch.jit.is_tracing():  # before the arguments are bound: the exporter to ONNX gives all by position
            raise RuntimeError(NOT_TRACED)
        return super().__call__(*args, **named)

    def forward(
        self,
        tokens: Tensor | None = None,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        documents: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        check_finite: bool = True,
        rewindable: bool = False,
    ) -> ModelOutput:
        """Process a batch of sequences.

        Args:
            tokens: ``[batch, time]`` int64.
            state: the state returned by an earlier call, by default a fresh one.
            mask: ``[batch, time]`` bool, true at valid tokens. Other tokens do not change the state.
            targets: ``[batch, time]`` int64, the next token of each token: they are not shifted. -100 and masked
                targets are ignored. With packed documents, the default is the next token of the document, and no target
                for its last token.
            embeddings: ``[batch, time, dim]`` of the model's dtype, in place of ``tokens``.
            documents: ``[batch, time]`` int64: the document of each token, for rows that hold several. Ids do not
                decrease along a row. Each document begins from a fresh state, and the outputs, gradients and final
                states are those of separate rows. The first document of a row goes on from ``state`` if its id is that
                of the last token before (or if the tokens before had none).
            cu_seqlens: ``[documents + 1]`` int32 or int64, in place of ``documents``: the boundaries of the documents
                in one row, which may be empty. A given ``state`` is that of the first document.
            check_finite: raise for embeddings with NaN, infinity or values whose squares overflow at valid tokens.
            rewindable: keep copies of the inputs, so that ``out.rewind(count)`` returns the state after the first
                ``count`` tokens.

        Arguments are not modified. Tensors of inference mode are copied if gradients are recorded. Raises ``TypeError``
        for a wrong dtype, and ``ValueError`` for a wrong shape or device, a token id out of range, or a state of
        another model or number of rows. Under ``torch.compile``, values are not checked. On a GPU, ids out of range
        are a ``RuntimeError`` of CUDA (a device-side assertion) at a later operation. Raises ``RuntimeError`` under
        ``torch.jit.trace`` and when it is exported to ONNX.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens [batch, time] or embeddings=[batch, time, dim], and not both")
        recording = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if recording:  # autograd cannot save tensors of inference mode
            tokens, embeddings, mask, targets = map(_ordinary, (tokens, embeddings, mask, targets))
        if tokens is not None:
            self.check_tokens(tokens)
            given = tokens
        else:
            assert embeddings is not None
            self._check_embeddings(embeddings)
            given = embeddings
        rows, time = given.shape[:2]
        before = state
        if mask is not None:
            self.check_mask(mask, (rows, time))
            # whose values may be kept: the caller's own mask may change after this call
            same = mask.device == given.device
            mask = mask.view_as(mask) if same else placed(mask, given.device)
        if embeddings is not None and check_finite and not torch.compiler.is_compiling() and shows_values(embeddings):
            # norms square their inputs in float32 or wider: where that overflows, they return zeros
            wide = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
            finite = wide.square().sum(dim=-1).isfinite()
            if not bool((finite if mask is None else finite | ~mask).all()):
                raise ValueError(
                    "embeddings hold NaN, infinity or values too large to be squared at valid tokens "
                    "(check_finite=False allows it)"
                )
        if targets is not None:
            self.check_targets(targets, (rows, time))
        if state is not None:
            self.check_state(state, rows)
            state = trainable(state) if recording else state
        packed = None
        if documents is not None or cu_seqlens is not None:
            known = None if state is None else state.document
            packed = expect_documents(self, documents, cu_seqlens, given, mask, known)
            if targets is None and tokens is not None and self.vocab is not None:
                targets = packed.next_tokens(tokens, IGNORED)
        if targets is not None and mask is not None:
            targets = targets.masked_fill(~mask, IGNORED)
        count = None if targets is None else (targets != IGNORED).sum()
        if self.parallel is not None:
            state, embeddings = self.parallel.part_of(self, state), self.parallel.inputs(embeddings)
        shard: ContextCall | None = None
        if self.parallel is not None:
            shard = self.parallel.enter(self, embeddings, state, (rows, time), mask, documents, cu_seqlens)
        if shard is not None:
            tokens, mask, targets = (None if x is None else x[:, shard.part] for x in (tokens, mask, targets))
            embeddings, state, packed = shard.x, shard.state, shard.documents_from(shard.start)
        # packings differ from batch to batch: each would be compiled anew
        run = torch.compiler.disable(self.run) if packed is not None and torch.compiler.is_compiling() else self.run
        with nullcontext() if shard is None else shard.active():
            x = embeddings if tokens is None or self.embedding is None else embedding(tokens, self.embedding)
            assert x is not None
            hidden, state = run(x, state, mask, packed)
        if shard is not None:
            hidden, state = shard.leave(hidden, state)
        state = state if self.parallel is None else self.parallel.whole_of(self, state)
        logits = None if self.vocab is None else self.predict(hidden)
        loss = None
        if targets is not None:
            assert logits is not None and count is not None
            loss = _summed_loss(logits, targets)
            # the loss of a batch without targets is 0, not 0 / 0
            loss = (loss if shard is None else shard.sum(loss)) / count.clamp(min=1)
        if shard is not None and self.parallel is not None and self.parallel.gather_outputs:
            hidden, logits = shard.gather(hidden), None if logits is None else shard.gather(logits)
        if self.parallel is not None:
            logits, loss, state, hidden = self.parallel.outputs(logits, loss, state, hidden)
        if not rewindable:
            return ModelOutput(logits, loss, state, hidden)
        out = RewindableOutput(logits, loss, state, hidden)
        options = {"mask": mask, "documents": documents, "cu_seqlens": cu_seqlens}
        copies = {name: torch.as_tensor(x).clone() for name, x in options.items() if x is not None}
        out._replay = functools.partial(rewind, self, before, given.clone(), check_finite=check_finite, **copies)
        return out

    def run(
        self, x: Tensor, state: ModelState | None, mask: Tensor | None, documents: Documents | None = None
    ) -> tuple[Tensor, ModelState]:
        """Run layers and norm without checks: ``x`` [batch, time, dim] -> hidden ``[batch, time, dim]``, state."""
        if x.shape[1] == 0 and documents is None:
            return x, state if state is not None else self._fresh_state(x.shape[0])
        if mask is not None and not torch.compiler.is_compiling() and bool(on_host(mask).all()):
            mask = None  # all tokens are valid: blocks are faster without a mask
        states = []
        for layer, before in zip(self.layers, [None] * len(self.layers) if state is None else state.layers):
            x, after = layer(x, before, mask=mask, documents=documents)
            states.append(after)
        x, _ = self.norm(x)
        if state is None:
            number = x.new_full(x.shape[:1], self.fingerprint.number, dtype=torch.int64)
            if not number.is_cpu:
                known(number, [self.fingerprint.number] * len(number))
            state = ModelState(tuple(states), number, torch.full_like(number, NO_DOCUMENT))
        document = state.document if documents is None else documents.after
        return x, ModelState(tuple(states), state.recipe, document)

    def decoder(self, rows: int) -> Decoder:
        """Return a function like ``run`` for one token ``[rows, 1, dim]`` at a time: see ``decode.model_decoder``."""
        return model_decoder(self, rows)

    def embed(self, tokens: Tensor) -> Tensor:
        """Check and embed tokens: ``[batch, time]`` int64 -> ``[batch, time, dim]``."""
        self.check_tokens(tokens)
        return self.lookup(tokens)

    @with_parameters
    def lookup(self, tokens: Tensor) -> Tensor:
        """``embed`` without checks."""
        assert self.embedding is not None
        return embedding(tokens, self.embedding)

    @with_parameters
    def predict(self, hidden: Tensor) -> Tensor:
        """Return the logits: ``[..., dim]`` -> ``[..., vocab]``."""
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
        draft: Literal["prompt"] | LanguageModel | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> Generation:
        """Continue ``tokens`` [batch, time] by ``max_new_tokens`` tokens: see ``generation.generate``."""
        options: dict[str, Any] = {"mask": mask, "logits": logits, "draft": draft, "prefix_cache": prefix_cache}
        with nullcontext() if self.parallel is None else self.parallel.whole_outputs(compute=True):
            return generate(self, tokens, max_new_tokens, state, temperature, top_k, top_p, seed, **options)

    def freeze_memory(self) -> Frozen:
        """Freeze all memories: they are read and not written.

        They are frozen until ``unfreeze_memory`` is called, or until the end of ``with model.freeze_memory():``. The
        memories in a state do not change. Other parts of a state, such as the cache of attention, do. Persistent
        tokens are written into a fresh state even if its memories are frozen. Raises ``ValueError`` for a memory that
        is written and not read (``use: write``).
        """
        return freeze(self)

    def unfreeze_memory(self) -> None:
        """Thaw all frozen memories."""
        thaw(self)

    def flops(self, length: int) -> int:
        """Forward FLOPs (a multiply-add counts 2) for one row of ``length`` tokens from a fresh state."""
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise ValueError(f"length: expected an integer >= 0, got {length!r}")
        head = 0 if self.vocab is None else 2 * self.dim * self.vocab * length
        return sum(block.flops(length) for block in [*self.layers, self.norm]) + head

    def state_bytes(self) -> int:
        """Bytes of state for one row."""
        with torch.no_grad():
            return nbytes(self.init_state(1))

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``tokens`` are int64 ids ``[batch, time]``."""
        if self.vocab is None:
            raise ValueError("this model has no vocabulary (vocab: null): give embeddings=[batch, time, dim]")
        self._check("tokens", tokens, torch.int64, None)
        if tokens.dim() != 2 or tokens.shape[0] < 1:
            raise ValueError(f"tokens: expected [batch, time] with at least one row, got {list(tokens.shape)}")

    def check_mask(self, mask: Tensor, shape: tuple[int, int]) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``mask`` is bool, of this shape, on a CPU or with the model."""
        self._check("mask", mask, torch.bool, shape)
        expect_values("mask", mask)

    def check_targets(self, targets: Tensor, shape: tuple[int, int], name: str = "targets") -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``targets`` is int64, of this shape, ids or -100."""
        if self.vocab is None:
            raise ValueError(f"this model has no vocabulary (vocab: null), so it takes no {name}")
        self._check(name, targets, torch.int64, shape, IGNORED)

    def check_state(self, state: ModelState, rows: int) -> None:
        """Raise ``ValueError`` or ``TypeError`` unless ``state`` is one of this model with ``rows`` rows."""
        if not isinstance(state, ModelState):
            hint = ": give its .state" if isinstance(getattr(state, "state", None), ModelState) else ""
            raise TypeError(f"state: expected a ModelState (init_state makes one), got {type(state).__name__}{hint}")
        recipe = state.recipe
        if isinstance(recipe, Tensor) and recipe.dtype == torch.int64:
            # checked before the shapes, because its message names both recipes
            try:
                self.fingerprint.check(recipe)
            except RuntimeError:
                expect_values("state", recipe)
                raise
        if not torch.compiler.is_compiling():
            check_state(self, state, rows)

    def _check(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None, ignored: int | None = None
    ) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected [batch, time] = {list(shape)}, got {list(tensor.shape)}")
        device = like_of(self).device
        # a mask that is on a CPU need not be waited for, and is moved where it is used
        if tensor.device != device and not (name == "mask" and tensor.is_cpu and device.type != "meta"):
            raise ValueError(f"{name} are on {tensor.device}, the model is on {device}: move one of them")
        if device.type == "meta":
            raise ValueError(f"{name}: the model is on the meta device: it has shapes, and no values to compute with")
        # a GPU would be waited for, and its own kernels look at the ids that they are given
        if dtype != torch.int64 or tensor.numel() == 0 or torch.compiler.is_compiling() or tensor.is_cuda:
            return
        assert self.vocab is not None
        ids = tensor if ignored is None else tensor.masked_fill(tensor == ignored, 0)
        try:
            low, high = map(int, torch.aminmax(ids))
        except RuntimeError:
            if transforming():  # vmap hides the values
                return
            raise
        if low < 0 or high >= self.vocab:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: id {wrong} is outside the vocabulary of {self.vocab} (0 to {self.vocab - 1})")

    def _check_embeddings(self, embeddings: Tensor) -> None:
        dtype = like_of(self).dtype
        if isinstance(embeddings, Tensor) and embeddings.is_floating_point() and not embeddings.is_meta:
            dtype = embeddings.dtype if torch.is_autocast_enabled(embeddings.device.type) else dtype
        self._check("embeddings", embeddings, dtype, None)
        if embeddings.dim() != 3 or embeddings.shape[0] < 1 or embeddings.shape[2] != self.dim:
            raise ValueError(f"embeddings: expected [batch, time, {self.dim}], got {list(embeddings.shape)}")


def _ordinary(x: Tensor | None) -> Tensor | None:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

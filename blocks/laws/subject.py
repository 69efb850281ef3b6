"""A block under test: a randomised copy of it, inputs, and comparisons whose failures say what differs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import create
from ..build import materialise
from ..decode import Decoder, decoder
from ..language_model import LanguageModel
from ..state import State, named_tensors, select


class LawError(AssertionError):
    """A block breaks a law. ``law`` is the law's name, ``difference`` the largest difference where there is one.

    ``law`` is ``shape`` where outputs are not of the inputs' shape, which no law needs to say.
    """

    def __init__(self, law: str, message: str, difference: float | None = None) -> None:
        super().__init__(f"law {law!r}: {message}")
        self.law = law
        self.difference = difference


class Subject:
    """A block (or model) under test: a randomised copy, inputs for it, and comparisons that name what differs."""

    def __init__(
        self,
        block: Any,
        dim: int,
        *,
        dtype: torch.dtype,
        seed: int,
        length: int | None,
        cuts: int | None,
        endurance: int,
        device: torch.device | str,
    ) -> None:
        self.given = block
        self.dtype, self.seed, self.cuts, self.endurance, self.device = dtype, seed, cuts, endurance, device
        self.tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
        self.largest = 0.0
        if isinstance(block, nn.Module):
            initial: Any = copy.deepcopy(block)
            self.dim = int(initial.dim)
        else:
            self.dim = dim
            # constructed where it will live, so that only the law about the meta device depends on that device
            initial = create(block, dim=dim)
            try:
                materialise(initial, "cpu", torch.float32, seed)
            except RuntimeError as error:
                raise LawError("meta", str(error)) from error
        self.initial = initial.to(device=device)
        self.module = copy.deepcopy(self.initial).to(dtype)
        self._randomise(self.module)
        self.period, self.grows = int(self.module.period), bool(self.module.grows)
        buffers = [tensor.shape[1] for _, tensor in named_tensors(self.fresh(1)) if tensor.dim() > 2]
        self.reach = max([self.period, *buffers])
        """Tokens after which every chunk, segment and buffer has been gone through once."""
        self.length = length if length is not None else _prime(max(19, self.reach + self.reach // 2 + 5))

    def run(
        self, x: Tensor, state: State = None, mask: Tensor | None = None, module: Any = None
    ) -> tuple[Tensor, State]:
        """Outputs and state of ``module``, by default the subject itself, at ``x`` ``[rows, time, dim]``.

        Of a model they are its logits, or its hidden values where it has no vocabulary.
        """
        module = self.module if module is None else module
        if not isinstance(module, LanguageModel):
            y, state = module(x, state, mask=mask)
            if y.shape != x.shape:
                # a residual would broadcast or fail on it, and a comparison of two such outputs would see nothing
                raise LawError("shape", f"inputs {list(x.shape)} gave outputs {list(y.shape)}: expected the same shape")
            return y, state
        out = module(embeddings=x, state=state, mask=mask, check_finite=False)
        return out.hidden if out.logits is None else out.logits, out.state

    def decoder(self, rows: int) -> Decoder:
        """What ``decoding.decoder`` prepares of the subject; outputs as of :meth:`run`."""
        if not isinstance(self.module, LanguageModel):
            return decoder(self.module, rows)
        model, decode = self.module, self.module.decoder(rows)

        def run(x: Tensor, state: State) -> tuple[Tensor, State]:
            hidden, state = decode(x, state)
            return hidden if model.vocab is None else model.predict(hidden), state

        return run

    def fresh(self, rows: int, module: Any = None) -> State:
        """``init_state`` of ``module``, by default of the subject itself, without gradients."""
        with torch.no_grad():
            return (self.module if module is None else module).init_state(rows)

    def noise(self, *shape: int, salt: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise, the same for the same shape and ``salt``."""
        generator = torch.Generator().manual_seed(self.seed * 7919 + salt)
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device=self.device, dtype=dtype or self.dtype)

    def tokens(self, rows: int, time: int, salt: int = 0) -> Tensor:
        """Noise for inputs ``[rows, time, dim]``."""
        return self.noise(rows, time, self.dim, salt=salt)

    def cut_points(self) -> list[int]:
        """Where to cut: everywhere, or around each multiple of the period and evenly between."""
        inner = range(2, self.length - 1)
        if self.cuts is None or len(inner) <= self.cuts:
            return list(inner)
        near = [k + d for k in range(self.period, self.length, self.period) for d in (-1, 0, 1)]
        near = near[:: max(1, math.ceil(len(near) / (self.cuts // 2)))]
        even = [round(i * (self.length - 3) / (self.cuts // 2)) + 2 for i in range(self.cuts // 2)]
        return sorted({k for k in [*near, *even] if k in inner})

    def same(self, law: str, what: str, got: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Raise unless the two agree to ``tolerance`` (0: bit by bit), relative to the largest expected value."""
        tolerance = self.tolerance if tolerance is None else tolerance
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise LawError(
                law, f"{what}: got {list(got.shape)} {got.dtype}, expected {list(expected.shape)} {expected.dtype}"
            )
        if got.numel() == 0 or torch.equal(got, expected):
            return
        wide = torch.complex128 if got.is_complex() else torch.float64
        error = (got.to(wide) - expected.to(wide)).abs()
        scale = max(1.0, float(expected.to(wide).abs().nan_to_num().max()))
        difference = float(error.max())
        if not difference <= tolerance * scale:
            place = [int(i) for i in torch.unravel_index(error.nan_to_num(nan=math.inf).argmax(), error.shape)]
            raise LawError(
                law,
                f"{what}, {list(got.shape)}: largest difference {difference:.3g} at {place} "
                f"(values up to {scale:.3g}, tolerance {tolerance * scale:.1g})",
                difference,
            )
        self.largest = max(self.largest, difference)

    def same_state(self, law: str, what: str, got: State, expected: State, tolerance: float | None = None) -> None:
        """``same`` for every tensor of two states of one structure; integers have to agree exactly."""
        names, wanted = dict(named_tensors(got)), dict(named_tensors(expected))
        if names.keys() != wanted.keys():
            odd = sorted(names.keys() ^ wanted.keys())
            raise LawError(law, f"{what}: the state's structure changed: {', '.join(odd)} on one side only")
        for path, tensor in names.items():
            if self.grows and tensor.shape != wanted[path].shape:
                continue  # room for tokens, which padding may have enlarged; outputs from there on tell
            exact = not (tensor.is_floating_point() or tensor.is_complex())
            self.same(law, f"{what}, state {path}", tensor, wanted[path], 0.0 if exact else tolerance)

    def row(self, state: State, row: int) -> State:
        """One row of a state, which needs every tensor to have the rows first."""
        return select(state, [row])

    def check_rows(self, state: State, rows: int) -> None:
        """Raise unless every tensor of the state has ``rows`` rows as dimension 0."""
        for path, tensor in named_tensors(state):
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise LawError("rows", f"state {path} is {list(tensor.shape)}: dimension 0 must be the {rows} rows")

    def _randomise(self, module: nn.Module) -> None:
        with torch.no_grad():
            for index, parameter in enumerate(module.parameters()):
                scale = 0.3 * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
                parameter.add_(scale * self.noise(*parameter.shape, salt=1000 + index, dtype=parameter.dtype))


def _prime(least: int) -> int:
    return next(n for n in _count(least) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _count(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1

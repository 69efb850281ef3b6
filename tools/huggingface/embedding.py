"""The embedding of a language model as a module, which is what transformers asks for and puts hooks on."""

from __future__ import annotations

from torch import Tensor, nn

from ...blocks.language_model import LanguageModel


class Embedding(nn.Module):
    """``[batch, time]`` int64 -> ``[batch, time, dim]``, from the parameter of a model that this is no part of."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._model = (model,)  # not a child: its parameters have their names already

    @property
    def weight(self) -> Tensor | None:
        """``[vocab, dim]``."""
        return self._model[0].embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model[0].embed(tokens)

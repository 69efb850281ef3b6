"""Recipe models as models of transformers, for ``generate``, ``Trainer``, pipelines and evaluation harnesses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...blocks.build import materialize
from ...blocks.language_model import IGNORED, LanguageModel
from ...blocks.state import trainable
from ...recipes import Recipe, StorageError
from ...recipes.build import assemble
from ...recipes.saved_format import INDEX, list_differences
from ...registry import show
from ..training.train_step import activation_checkpointing
from .cache import StateCache
from .config import TitansBuildConfig


class Embedding(nn.Module):
    """The embedding of a language model as a module, as transformers expects: [batch, time] -> [batch, time, dim]."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._model = (model,)  # not a child: the model registers its own parameters

    @property
    def weight(self) -> Tensor | None:
        """``[vocab, dim]``."""
        return self._model[0].embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model[0].embed(tokens)


class TitansBuildPreTrainedModel(PreTrainedModel):
    """Base class. ``model`` is the ``LanguageModel`` inside.

    ``config``: contains the recipe; parameters are drawn from torch's global generator. ``model``: a
    ``LanguageModel`` of that recipe, in place of a new one.
    """

    config_class = TitansBuildConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = frozenset({"Layer"})
    _skip_keys_device_placement = frozenset({"past_key_values"})

    def __init__(self, config: TitansBuildConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        if model is None:
            model = assemble(config.checked())
            if torch.empty(0).is_meta:  # from_pretrained: values come from the files
                model.to(dtype=torch.get_default_dtype())
            else:
                materialize(model, "cpu", torch.get_default_dtype(), seed=None)
        self.model = model
        self.embed_tokens = Embedding(model)
        device = torch.empty(0).device if torch.empty(0).is_meta else model.norm.gain.device
        # saved with the weights, to reject the weights of another recipe with equal shapes
        self.register_buffer("fingerprint", torch.empty((), dtype=torch.int64, device=device))
        self.gradient_checkpointing = False
        self._set_fingerprint()
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors. Raises ``StorageError`` for weights that are not of the recipe."""
        place = pretrained_model_name_or_path
        if isinstance(place, str | os.PathLike) and is_saved_model(Path(place)):
            raise StorageError(f"{place}: a folder of tb.save: titans_build.huggingface.from_pretrained reads it, too")
        output_loading_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        result, info = super().from_pretrained(place, *args, output_loading_info=True, **kwargs)
        expect_whole(info, str(place), f"the recipe {show(result.model.recipe.name or '')}")
        if int(result.fingerprint) != result.model.fingerprint.number:
            raise StorageError(
                f"{place}: these are the weights of another recipe than the one in config.json "
                f"({result.config.fingerprint}), though all shapes are the same"
            )
        return (result, info) if output_loading_info else result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers: recipe in ``config.json``, weights in safetensors. Modules to import are left out."""
        self._set_fingerprint()
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens if self.model.vocab is not None else None

    def set_input_embeddings(self, value: Any) -> None:
        raise ValueError("the embedding is part of the recipe: it cannot be replaced")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Raises ``ValueError`` for a new number: the vocabulary is part of the recipe."""
        if new_num_tokens not in (None, self.model.vocab):
            raise ValueError(
                f"the vocabulary is part of the recipe: {self.model.vocab} ids, and not {new_num_tokens}; "
                "build a model of another recipe"
            )
        return self.get_input_embeddings()

    def _init_weights(self, module: Any) -> None:
        """Blocks initialize their own parameters."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True is not supported: it does not pass gradients through trees of tensors")
        self.gradient_checkpointing = enable
        self._checkpoint, self._every = gradient_checkpointing_func, every_n_layers

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, Tensor | None, StateCache | None]:
        """Hidden states ``[batch, time, dim]``, the mask of real tokens, and the cache, which has read them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids [batch, time] or inputs_embeds [batch, time, dim], and not both")
        cache = past_key_values
        if cache is not None and not isinstance(cache, StateCache):
            kind = type(cache).__name__
            raise TypeError(f"past_key_values: expected the cache of a titans-build model (StateCache), got {kind}")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = StateCache()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else self._check_embeddings(inputs_embeds)
        rows, time, _ = x.shape
        mask = real_tokens(attention_mask, rows, time, 0 if cache is None else cache.length)
        if mask is not None:
            self.model.check_mask(mask, (rows, time))
        state = None if cache is None else cache.state
        if state is not None:
            self.model.check_state(state, rows)
            state = trainable(state) if torch.is_grad_enabled() else state
        with contextlib.ExitStack() as stack:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                stack.enter_context(activation_checkpointing(self.model, self._checkpoint, self._every))
            hidden, state = self.model.run(x, state, mask)
        if cache is not None:
            cache.read(state, time)
        return hidden, mask, cache

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        dtype = self.model.norm.gain.dtype
        if embeddings.dim() != 3 or embeddings.shape[2] != self.model.dim:
            raise ValueError(f"inputs_embeds: expected [batch, time, {self.model.dim}], got {list(embeddings.shape)}")
        if embeddings.dtype != dtype and not torch.is_autocast_enabled(embeddings.device.type):
            raise TypeError(f"inputs_embeds: expected {dtype}, as the model's parameters are, got {embeddings.dtype}")
        return embeddings

    def _set_fingerprint(self) -> None:
        if not self.fingerprint.is_meta:
            self.fingerprint.fill_(self.model.fingerprint.number)


class TitansBuildModel(TitansBuildPreTrainedModel):
    """Returns hidden states: for recipes without a vocabulary, and for custom heads."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """``last_hidden_state`` [batch, time, dim], normalized; arguments as of ``TitansBuildForCausalLM``."""
        hidden, _, cache = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()


class TitansBuildForCausalLM(TitansBuildPreTrainedModel, GenerationMixin):
    """A language model of a recipe with all of ``generate``: greedy, sampling, beams, streamers.

    Assisted generation is not supported, because a memory cannot be rolled back.
    """

    def __init__(self, config: TitansBuildConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config, model)
        if self.model.vocab is None:
            raise ValueError("a recipe without vocab has no logits: TitansBuildModel is the class for it")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Read ``input_ids`` [batch, time] int64, or ``inputs_embeds`` [batch, time, dim].

        ``attention_mask`` [batch, time], or [batch, before + time] where the cache has read ``before`` tokens: 0 at
        padding, which may be on either side. ``past_key_values``: the call continues from it, and adds these tokens to
        it. ``labels`` [batch, time]: the tokens themselves, shifted here; -100 does not count.
        ``logits_to_keep``: of how many last tokens logits are wanted (0: all), or of which.

        Raises ``TypeError`` or ``ValueError`` for a cache of another model, and for wrong shapes and ids.
        """
        hidden, mask, cache = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        kept: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if labels is not None:
            self.model.check_targets(labels, (hidden.shape[0], hidden.shape[1]), "labels")
            logits = self.model.predict(hidden)
            loss = next_token_loss(logits, labels, mask, num_items_in_batch)
            logits = logits[:, kept]
        else:
            logits = self.model.predict(hidden[:, kept])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a titans-build model carries a "
                "state, which has one implementation"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()


def as_pretrained(model: LanguageModel) -> TitansBuildModel | TitansBuildForCausalLM:
    """A model of ``tb.build`` or ``tb.load`` as a model of transformers, with the same parameters.

    ``result.model`` is ``model``, for ``tb.save`` and other functions of this library.
    """
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"expected a model made by build() or load(), got {type(model).__name__} without a recipe")
    kind = TitansBuildModel if model.vocab is None else TitansBuildForCausalLM
    return kind(TitansBuildConfig(recipe=recipe), model)


def is_saved_model(place: Path) -> bool:
    """Whether ``place`` is a folder that ``tb.save`` wrote."""
    return (place / INDEX).is_file() and not (place / "config.json").exists()


def real_tokens(attention_mask: Tensor | None, rows: int, time: int, before: int) -> Tensor | None:
    """``[rows, time]`` bool, true at real tokens, from ``[rows, time]`` or ``[rows, before + time]``, 0 at padding.

    Raises ``ValueError`` for other shapes.
    """
    if attention_mask is None:
        return None
    shapes = {(rows, time), (rows, before + time)}
    if tuple(attention_mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(f"attention_mask: expected {expected}, 0 at padding, got {list(attention_mask.shape)}")
    return attention_mask[:, attention_mask.shape[1] - time :] != 0


def next_token_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy (nats) of ``labels`` [batch, time] int64 by the ``logits`` [batch, time, vocab] before each.

    Labels are aligned with their own tokens, as in transformers, and are shifted here. -100 does not count, nor does
    what follows a token where ``mask`` [batch, time] is false: a padded row has the loss of the row alone. ``count``:
    what to divide the sum by, where it is over more than this batch; by default the labels that count.
    """
    targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    if mask is not None:
        targets = targets.masked_fill(~mask, IGNORED)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def expect_whole(info: Mapping[str, Any], place: str, what: str) -> None:
    """Raise ``StorageError`` unless transformers' loading info says that a folder held the whole model, and no more.

    transformers itself only warns, and draws what is missing.
    """
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} is not part of the model" for name in sorted(info["unexpected_keys"])]
    wrong += [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in sorted(info["mismatched_keys"])]
    if wrong:
        raise StorageError(f"{place}: the weights do not fit {what}: {list_differences(wrong)}")


AutoModel.register(TitansBuildConfig, TitansBuildModel, exist_ok=True)
AutoModelForCausalLM.register(TitansBuildConfig, TitansBuildForCausalLM, exist_ok=True)

"""Recipe models as models of transformers, for ``generate``, ``Trainer``, pipelines and evaluation harnesses."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...blocks.build import materialize
from ...blocks.language_model import IGNORED, LanguageModel, ModelState
from ...blocks.state import trainable
from ...kernels.documents import Documents
from ...recipes import Recipe, StorageError
from ...recipes.atomic_write import read_regular
from ...recipes.build import assemble
from ...recipes.saved_format import INDEX, TOKENIZER, list_differences, saved_folder
from ...registry import show
from ..swapping.documents import ONE_DOCUMENT, SEVERAL
from ..swapping.replay import UNKNOWN, Replay
from ..training.train_step import activation_checkpointing
from .arguments import chosen_states, given_cache, read_rows
from .cache import CACHE, StateCache
from .config import TitansBuildConfig
from .tokenizer import tokenizer_of

LABELS_TAKEN_OUT = (
    "Trainer took the labels out to compute the loss itself. For label_smoothing_factor it does not shift them, as it "
    "does for the models of transformers: do not use that. A compute_loss_func has to shift them"
)


class _Part(nn.Module):
    """A view of parameters that the language model registers, as a module."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._model = (model,)  # not a child

    def __deepcopy__(self, memo: dict[int, Any]) -> _Part:
        if id(self._model[0]) not in memo:
            raise ValueError(
                f"{type(self).__name__}: has no parameters of its own, so it is copied with its model only; PEFT's "
                "modules_to_save cannot train it: set requires_grad of model.get_input_embeddings().weight or "
                "model.get_output_embeddings().weight, and save the whole model"
            )
        made = type(self).__new__(type(self))
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


class Embedding(_Part):
    """The embedding of a language model as a module, as transformers expects: [batch, time] -> [batch, time, dim]."""

    @property
    def weight(self) -> Tensor | None:
        """``[vocab, dim]``."""
        return self._model[0].embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self._model[0].embed(tokens)


class Head(_Part):
    """The head of a language model as a module, as transformers expects: [..., dim] -> [..., vocab]."""

    bias = None

    @property
    def weight(self) -> Tensor | None:
        """``[vocab, dim]``; that of the embedding where the recipe ties them."""
        model = self._model[0]
        return model.embedding if model.head is None else model.head

    def forward(self, hidden: Tensor) -> Tensor:
        return self._model[0].predict(hidden)


class TitansBuildPreTrainedModel(PreTrainedModel):
    """Base class of the models below."""

    config_class = TitansBuildConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = frozenset({"Layer"})
    _skip_keys_device_placement = frozenset({"cache", "past_key_values"})

    def _hold(self, model: LanguageModel | None) -> None:
        """Set ``model``, by default a new one of the recipe, its embedding, and the fingerprint that is saved."""
        if model is None:
            model = assemble(self.config.checked())
            if torch.empty(0).is_meta:  # from_pretrained: values come from the files
                model.to(dtype=torch.get_default_dtype())
            else:
                materialize(model, "cpu", torch.get_default_dtype(), seed=None)
        self.model = model
        self.embed_tokens = Embedding(model)
        self.embeddings = nn.ModuleDict({"word_embeddings": self.embed_tokens})  # where PEFT's prompt tuning looks
        # saved with the weights, to reject the weights of another recipe with equal shapes
        self.register_buffer("fingerprint", torch.tensor(model.fingerprint.number, device=model.norm.gain.device))
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def _holder(self) -> TitansBuildPreTrainedModel:
        """The module that holds the ``LanguageModel``: this one, or the one below a head."""
        return self if isinstance(self.model, LanguageModel) else self.model

    def _expect_language_model(self) -> None:
        if not isinstance(self.model, LanguageModel):
            raise TypeError(
                f"around the LanguageModel there is a {type(self.model).__name__} now: PEFT's target_parameters adapts "
                "linear layers in blocks, and not embedding and head: set their requires_grad, and save the whole model"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors. Raises ``StorageError`` for weights that are not of the recipe."""
        place = pretrained_model_name_or_path
        if isinstance(place, str | os.PathLike) and is_saved_model(Path(place)):
            raise StorageError(f"{place}: a folder of tb.save: titans_build.huggingface.from_pretrained reads it, too")
        output_loading_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        quantization = kwargs.get("quantization_config")
        if quantization is not None and getattr(quantization, "llm_int8_skip_modules", ()) is None:
            quantization = kwargs["quantization_config"] = copy.copy(quantization)
            quantization.llm_int8_skip_modules = narrow_layers(
                kwargs.get("config") or cls.config_class.from_pretrained(place)
            )
        result, info = super().from_pretrained(place, *args, output_loading_info=True, **kwargs)
        model, saved = result._holder, result.config.architectures or [cls.__name__]
        # a classifier is made from a language model, or the other way around: the head of the one is new, or left out
        strict = info if cls.__name__ in saved else {kind: _without_score(names) for kind, names in info.items()}
        expect_whole(strict, str(place), f"the recipe {show(model.model.recipe.name or '')}")
        known = model.model.fingerprint
        if int(model.fingerprint) not in (known.number, known.earlier):
            raise StorageError(
                f"{place}: these are the weights of another recipe than the one in config.json "
                f"({result.config.fingerprint}), though all shapes are the same"
            )
        if os.path.isfile(tokenizer := os.path.join(place, TOKENIZER)):
            model.model.tokenizer = read_regular(Path(tokenizer)).decode("utf-8")
        return (result, info) if output_loading_info else result

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers: recipe in ``config.json``, weights in safetensors, and the model's tokenizer.

        Modules to import are left out.
        """
        if getattr(getattr(self.config, "quantization_config", None), "quant_method", None) == "torchao":
            raise ValueError("a recipe model quantized by torchao cannot be saved; quantize it when it is loaded")
        model = self._holder
        model.fingerprint = torch.tensor(model.model.fingerprint.number)
        super().save_pretrained(save_directory, *args, **kwargs)
        if getattr(model.model, "tokenizer", None) is not None:
            tokenizer_of(self).save_pretrained(save_directory)

    def get_input_embeddings(self) -> Any:
        return self._holder.embed_tokens if self.config.vocab_size is not None else None

    def set_input_embeddings(self, value: Any) -> None:
        raise ValueError("the embedding is part of the recipe: it cannot be replaced")

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        raise ValueError("the head is part of the recipe: it cannot be replaced")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Raises ``ValueError`` for a new number: the vocabulary is part of the recipe."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the vocabulary is part of the recipe: {self.config.vocab_size} ids, and not {new_num_tokens}; "
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
        for model in (self, self.base_model):
            model.gradient_checkpointing = enable
            model._checkpoint, model._every = gradient_checkpointing_func, every_n_layers


class TitansBuildModel(TitansBuildPreTrainedModel):
    """Returns hidden states: for recipes without a vocabulary, and below heads. ``model`` is the ``LanguageModel``.

    ``config``: contains the recipe; parameters are drawn from torch's global generator. ``model``: a
    ``LanguageModel`` of that recipe, in place of a new one.
    """

    def __init__(self, config: TitansBuildConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self._hold(model)

    @property
    def base_model(self) -> Any:
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        **documents: Any,
    ) -> Any:
        """``last_hidden_state`` [batch, time, dim], normalized; arguments as of ``TitansBuildForCausalLM``."""
        self._expect_language_model()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids [batch, time] or inputs_embeds [batch, time, dim], and not both")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: a recipe model returns no attention weights")
        cache = given_cache(cache, past_key_values)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else self._check_embeddings(inputs_embeds)
        rows, time, _ = x.shape
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **documents}
        mask, packed = read_rows(self.model, given, x, 0 if cache is None else cache.length)
        if mask is not None:
            self.model.check_mask(mask, (rows, time))
        if packed is not None:
            if cache is not None or use_cache:
                raise ValueError(f"{SEVERAL}, and a cache: its state is of one document. {ONE_DOCUMENT}")
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = StateCache()
        before = state = None if cache is None else cache.state
        if state is not None:
            self.model.check_state(state, rows)
            state = trainable(state) if torch.is_grad_enabled() else state
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [x]
        with contextlib.ExitStack() as stack:
            if wanted or not isinstance(wanted, bool):
                for layer in self.model.layers:
                    keep = layer.register_forward_hook(lambda _, args, output: hidden_states.append(output[0]))
                    stack.callback(keep.remove)
            if self.gradient_checkpointing and self.model.training and torch.is_grad_enabled():
                stack.enter_context(activation_checkpointing(self.model, self._checkpoint, self._every))
            hidden, state = self.model.run(x, state, mask, packed)
        if cache is not None:
            cache.read(state, time, UNKNOWN if torch.is_grad_enabled() else self._replay(input_ids, x, before, mask))
        output = BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})
        if len(hidden_states) > 1:  # the last is normalized, as in transformers
            output.hidden_states = chosen_states([*hidden_states[:-1], hidden], wanted)
        return output if return_dict is not False else output.to_tuple()

    def _replay(self, tokens: Tensor | None, x: Tensor, before: ModelState | None, mask: Tensor | None) -> Replay:
        """What was read, to go back to any token of it."""

        def run(read: Tensor, state: ModelState | None, mask: Tensor | None) -> ModelState:
            return self.model.run(self.embed_tokens(read) if read.dim() == 2 else read, state, mask)[1]

        return Replay(run, before, (x if tokens is None else tokens.clone(),), (mask,))

    def _check_embeddings(self, embeddings: Tensor) -> Tensor:
        dtype = self.model.norm.gain.dtype
        if embeddings.dim() != 3 or embeddings.shape[2] != self.model.dim:
            raise ValueError(f"inputs_embeds: expected [batch, time, {self.model.dim}], got {list(embeddings.shape)}")
        if embeddings.dtype != dtype and not torch.is_autocast_enabled(embeddings.device.type):
            raise TypeError(f"inputs_embeds: expected {dtype}, as the model's parameters are, got {embeddings.dtype}")
        return embeddings


class TitansBuildForCausalLM(TitansBuildPreTrainedModel, GenerationMixin):
    """A language model of a recipe with all of ``generate``: greedy, sampling, beams, streamers.

    ``model`` is the ``LanguageModel``, and ``base_model`` a ``TitansBuildModel`` with the same parameters.
    """

    def __init__(self, config: TitansBuildConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        base = TitansBuildModel(config, model)
        if base.model.vocab is None:
            raise ValueError("a recipe without vocab has no logits: TitansBuildModel is the class for it")
        self._base = (base,)  # not a child: its parameters are those of model
        self._hold(base.model)
        self.lm_head = Head(base.model)
        base.embed_tokens = self.embed_tokens  # hooks are put on the one of this model

    @property
    def base_model(self) -> Any:
        return self._base[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cache: StateCache | None = None,
        **documents: Any,
    ) -> Any:
        """Read ``input_ids`` [batch, time] int64, or ``inputs_embeds`` [batch, time, dim].

        ``attention_mask`` [batch, time], or [batch, before + time] where the cache has read ``before`` tokens: 0 at
        padding, which may be anywhere, and else 1. ``cache``, or ``past_key_values``: the call continues from it, and
        adds these tokens to it. ``labels`` [batch, time]: the tokens themselves, shifted here; -100 does not count.
        ``logits_to_keep``: of how many last tokens logits are wanted (0: all), or of which. ``output_hidden_states``:
        also the inputs of the first layer and the outputs of each, the last of them normalized, or those of these
        numbers. ``position_ids`` that start again, ``documents`` (``cu_seq_lens_q``, ``seq_idx``) or a block-diagonal
        ``attention_mask`` [batch, 1, time, time]: rows hold several documents, each of which begins from a fresh state,
        and whose first tokens are not predicted.

        Raises ``TypeError`` or ``ValueError`` for a cache of another model, for wrong shapes and ids, and for several
        documents in a row with a cache.
        """
        self._expect_language_model()
        read = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache=cache,
            **documents,
        )
        hidden = read.last_hidden_state
        kept: Any = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if labels is not None:
            rows, time, _ = hidden.shape
            self.model.check_targets(labels, (rows, time), "labels")
            logits = self.lm_head(hidden)
            before = 0 if read.get(CACHE, None) is None else read[CACHE].length - time
            given = {"attention_mask": attention_mask, "position_ids": position_ids, **documents}
            mask, packed = read_rows(self.model, given, hidden, before)
            loss = next_token_loss(logits, labels, mask, num_items_in_batch, packed)
            logits = logits[:, kept]
        else:
            if num_items_in_batch is not None:
                warnings.warn(LABELS_TAKEN_OUT, stacklevel=2)
            logits = self.lm_head(hidden[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=read.hidden_states,
            **{CACHE: read.get(CACHE, None)},
        )
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers. The cache is ``past_key_values`` in every version: PEFT looks for it there."""
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        inputs.pop("tokenizer", None)  # of stop_strings
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a titans-build model carries a "
                "state, which has one implementation"
            )
        given = given_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if given is not None or generation_config.use_cache:
            model_kwargs[CACHE] = StateCache() if given is None else given

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ``NotImplementedError``. ``generate_batch`` calls it."""
        raise NotImplementedError(
            "continuous batching packs requests into one row and keeps their keys and values in pages: a recipe model "
            "carries a state instead; use generate with a padded batch and attention_mask"
        )


class TitansBuildForSequenceClassification(GenericForSequenceClassification, TitansBuildPreTrainedModel):
    """A linear layer over the hidden state of each row's last token, as in transformers: for rewards and classes.

    ``model`` is a ``TitansBuildModel``.
    """

    def _init_weights(self, module: Any) -> None:
        if module is self.score:
            torch.nn.init.normal_(module.weight, std=0.02)


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
    """Whether ``place`` is a folder that ``tb.save`` wrote, or a run with one."""
    return (saved_folder(place) / INDEX).is_file() and not (place / "config.json").exists()


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    count: Tensor | int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Mean cross-entropy (nats) of ``labels`` [batch, time] int64 by the ``logits`` [batch, time, vocab] before each.

    Labels are aligned with their own tokens, as in transformers, and are shifted here, over padding, where ``mask``
    [batch, time] is false: a padded row has the loss of the row alone, whatever its labels at padding. -100 does not
    count, nor does the first label of each of ``documents``. ``count``: what to divide the sum by, where it is over
    more than this batch; by default the labels that count.
    """
    if documents is not None:
        targets = documents.next_tokens(labels, IGNORED)
    elif mask is None:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        time = labels.shape[1]
        places = torch.where(mask, torch.arange(time, device=mask.device), time)
        following = pad(places[:, 1:].flip(-1).cummin(-1).values.flip(-1), (0, 1), value=time)
        targets = pad(labels, (0, 1), value=IGNORED).gather(1, following).masked_fill(~mask, IGNORED)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def narrow_layers(config: TitansBuildConfig) -> list[str]:
    """Names of linear layers that 4-bit kernels of bitsandbytes do not run on a processor: the gates of memories."""
    layers = assemble(config.checked()).named_modules(prefix="model")
    return [
        name
        for name, layer in layers
        if isinstance(layer, nn.Linear) and (layer.in_features % 64 or layer.out_features % 32)
    ]


def expect_whole(info: Mapping[str, Any], place: str, what: str) -> None:
    """Raise ``StorageError`` unless transformers' loading info says that a folder held the whole model, and no more.

    transformers itself only warns, and draws what is missing.
    """
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} is not part of the model" for name in sorted(info["unexpected_keys"])]
    wrong += [f"{name} is {list(got)}, expected {list(want)}" for name, got, want in sorted(info["mismatched_keys"])]
    if wrong:
        raise StorageError(f"{place}: the weights do not fit {what}: {list_differences(wrong)}")


def _without_score(names: Any) -> Any:
    """Without the names of a classifier's head."""
    return [name for name in names if not str(name[0] if isinstance(name, tuple) else name).startswith("score.")]


AutoModel.register(TitansBuildConfig, TitansBuildModel, exist_ok=True)
AutoModelForCausalLM.register(TitansBuildConfig, TitansBuildForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TitansBuildConfig, TitansBuildForSequenceClassification, exist_ok=True)

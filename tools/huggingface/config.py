"""The configuration of a recipe model in transformers: the recipe and its fingerprint."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...recipes import Recipe, StorageError, load_recipe
from ...registry import show

READ_FROM_RECIPE = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
"""Properties of a configuration, which its files contain for other readers."""


class TitansBuildConfig(PreTrainedConfig):
    """``TitansBuildConfig(recipe=...)``: whatever ``load_recipe`` takes. It is kept and saved as plain data.

    ``vocab_size``, ``hidden_size`` and ``num_hidden_layers`` are read from the recipe. Token ids such as
    ``eos_token_id`` are those of transformers, which saves them beside it.

    Raises ``RecipeError`` for an invalid recipe, and for one that asks for modules to be imported: reading a folder
    runs no code. ``StorageError`` if the recipe does not match its saved fingerprint.
    """

    model_type = "titans_build"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - transformers adds a list to it

    recipe: Any = None
    recipe_overrides: dict[str, Any] | None = None
    """The overrides that the recipe was loaded with, by path. ``recipe`` contains them."""
    fingerprint: str | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a ``config.json``, which holds the whole recipe and names no other file."""
        for name, value in config_dict.items():
            optional = name == "recipe_overrides" and value is None
            if name in ("recipe", "recipe_overrides") and not isinstance(value, dict) and not optional:
                raise StorageError(f"config.json: {name}: expected a mapping, got {show(value)}")
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.recipe is not None:
            # the configuration identifies blocks by their registered names: reading it imports nothing
            given = dataclasses.replace(self.recipe, imports=[]) if isinstance(self.recipe, Recipe) else self.recipe
            checked = load_recipe(given)
            if self.fingerprint not in (None, checked.fingerprint, checked.earlier_fingerprint):
                raise StorageError(
                    f"the recipe of this configuration is not the one that was saved: its fingerprint is "
                    f"{checked.fingerprint}, expected {show(self.fingerprint)}"
                )
            self.recipe_overrides = {**(self.recipe_overrides or {}), **checked.overrides}
            self.recipe, self.fingerprint = checked.to_dict(), checked.fingerprint
        for name in READ_FROM_RECIPE:
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with what is read from the recipe: PEFT and other readers look for it there."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in READ_FROM_RECIPE}}

    def checked(self) -> Recipe:
        """The recipe, as ``build`` takes it. Raises ``ValueError`` if there is none."""
        if self.recipe is None:
            raise ValueError("TitansBuildConfig: expected recipe=, whatever load_recipe takes, got none")
        return dataclasses.replace(load_recipe(self.recipe), overrides=dict(self.recipe_overrides or {}))

    @property
    def vocab_size(self) -> int | None:
        return None if self.recipe is None else self.recipe.get("vocab")

    @property
    def hidden_size(self) -> int | None:
        return None if self.recipe is None else self.recipe["dim"]

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.recipe) and bool(self.recipe.get("tie"))

    @property
    def num_hidden_layers(self) -> int | None:
        return None if self.recipe is None else self.checked().depth


AutoConfig.register(TitansBuildConfig.model_type, TitansBuildConfig, exist_ok=True)

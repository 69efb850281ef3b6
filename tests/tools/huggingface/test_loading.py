"""Models in folders of transformers and of ``tb.save``, and damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import titans_build as tb
from titans_build.huggingface import TitansBuildForCausalLM, TitansBuildModel, from_pretrained
from titans_build.recipes import StorageError
from titans_build.registry import RecipeError

Make = Callable[..., TitansBuildForCausalLM]


@pytest.mark.parametrize("changes", [{}, {"tie": True}], ids=["", "tied"])
def test_save_and_load(small: Make, tokens: Tensor, tmp_path: Path, changes: dict[str, bool]) -> None:
    model = small("mac", **changes)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    for again in (
        from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        TitansBuildForCausalLM.from_pretrained(str(tmp_path), dtype="auto"),
    ):
        assert isinstance(again, TitansBuildForCausalLM) and not again.training
        assert again.dtype == torch.float64 and again.model.recipe == model.model.recipe
        for (name, mine), other in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, other), name
        assert_close(again(tokens).logits, model(tokens).logits)
    # the model inside is one like any other: its states are those of the saved one
    state = model.model(tokens).state
    assert_close(again.model(tokens, state).logits, model.model(tokens, state).logits)


def test_load_shards_in_another_dtype(small: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = from_pretrained(tmp_path, dtype=torch.float32)
    assert again.dtype == torch.float32
    assert_close(again(tokens).logits, model(tokens).logits.float(), atol=1e-4, rtol=1e-4)


def test_folders_of_tb_save(small: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = small()
    tb.save(model.model, tmp_path / "tb")
    again = from_pretrained(tmp_path / "tb")
    assert_close(again(tokens).logits, model(tokens).logits)
    assert from_pretrained(tmp_path / "tb", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(TypeError, match="is read with dtype alone, got device_map"):
        from_pretrained(tmp_path / "tb", device_map="auto")
    with pytest.raises(StorageError, match=r"titans_build\.huggingface\.from_pretrained reads it, too"):
        TitansBuildForCausalLM.from_pretrained(tmp_path / "tb")
    # and there and back
    again.save_pretrained(tmp_path / "hf")
    tb.save(from_pretrained(tmp_path / "hf").model, tmp_path / "again")
    assert_close(tb.load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_load_as_the_model_without_head(small: Make, tokens: Tensor, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    again = TitansBuildModel.from_pretrained(tmp_path)
    assert_close(again(tokens).last_hidden_state, model.model(tokens).hidden)


def test_weights_that_do_not_fit_are_refused(small: Make, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)

    def damaged(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, file, {"format": "pt"})

    damaged({name: tensor for name, tensor in whole.items() if name != "model.head"})
    with pytest.raises(StorageError, match=r"do not fit the recipe 'mac': model\.head is missing"):
        from_pretrained(tmp_path)
    damaged({**whole, "model.more": torch.zeros(1)})
    with pytest.raises(StorageError, match=r"model\.more is not part of the model"):
        from_pretrained(tmp_path)
    damaged({**whole, "model.head": torch.zeros(40, 17)})
    with pytest.raises((StorageError, RuntimeError), match=r"model\.head|mismatch"):
        from_pretrained(tmp_path)
    damaged({**whole, "fingerprint": torch.tensor(7)})
    with pytest.raises(StorageError, match=r"these are the weights of another recipe than the one in config\.json"):
        from_pretrained(tmp_path)


def test_weights_of_another_recipe_with_equal_shapes_are_refused(small: Make, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "one")
    other = small("mac", layers={"mac": [{**small().model.recipe.to_dict()["layers"]["mac"][0], "segment": 5}, "ffn"]})
    other.save_pretrained(tmp_path / "two")
    (tmp_path / "one" / "model.safetensors").replace(tmp_path / "two" / "model.safetensors")
    with pytest.raises(StorageError, match="though all shapes are the same"):
        from_pretrained(tmp_path / "two")


def test_a_changed_recipe_is_refused(small: Make, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["recipe"]["stack"] = ["mac"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StorageError, match="not the one that was saved"):
        from_pretrained(tmp_path)


def test_config_names_no_other_file(small: Make, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "other.yaml").write_text("a secret")
    odd: tuple[dict[str, object], ...] = ({"recipe": str(tmp_path / "other.yaml")}, {"recipe_overrides": "x"})
    for changes in odd:
        (tmp_path / "config.json").write_text(json.dumps(written | changes))
        with pytest.raises(StorageError, match=rf"config\.json: {next(iter(changes))}: expected a mapping") as error:
            from_pretrained(tmp_path)
        assert "secret" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(written | {"recipe": {**written["recipe"], "imports": ["this"]}}))
    with pytest.raises(RecipeError, match="asks to import this"):
        from_pretrained(tmp_path)


def test_nothing_is_unpickled(small: Make, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        from_pretrained(tmp_path)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="empty"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        from_pretrained(tmp_path / "empty")

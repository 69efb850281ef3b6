"""Damaged models: each is an error that names the file and the problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from titans_build.blocks.language_model import LanguageModel
from titans_build.recipes import StorageError, build, load, load_recipe, save
from titans_build.registry import RecipeError


class TestDamagedModels:
    def refused(self, folder: Path, fragment: str) -> None:
        with pytest.raises(StorageError) as caught:
            load(folder)
        assert fragment in str(caught.value), str(caught.value)

    @pytest.fixture(autouse=True)
    def saved(self, tmp_path: Path, model: LanguageModel) -> Path:
        save(model, tmp_path)
        return tmp_path

    @pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
    def test_truncated_weights(self, saved: Path, keep: int, weights_of: Any):
        path = weights_of(saved)
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(saved, "expected a complete safetensors file")

    @pytest.mark.parametrize("content", [b"not safetensors at all", b"\xff" * 1000, b"PK\x03\x04" + b"\x00" * 500])
    def test_weights_that_are_no_safetensors_file(self, saved: Path, content: bytes, weights_of: Any):
        weights_of(saved).write_bytes(content)
        self.refused(saved, "expected a complete safetensors file")

    @pytest.mark.parametrize("place", [-1, -1000])
    def test_changed_bytes(self, saved: Path, place: int, weights_of: Any):
        content = bytearray(weights_of(saved).read_bytes())
        content[place] ^= 1
        weights_of(saved).write_bytes(content)
        self.refused(saved, "damaged: the tensors differ from those that were saved (checksum ")

    def test_weights_without_metadata(self, saved: Path, weights_of: Any):
        save_file({"a": torch.zeros(2)}, weights_of(saved))
        self.refused(saved, "expected a file of format 'titans-build model', got null")

    def test_weights_of_another_model(self, saved: Path, tmp_path_factory: Any, weights_of: Any, other: str):
        folder = tmp_path_factory.mktemp("other")
        save(build(other), folder)
        weights_of(saved).write_bytes(weights_of(folder).read_bytes())
        self.refused(saved, "these are the weights of another model")

    def test_weights_of_another_save_of_the_same_model(
        self, saved: Path, tmp_path_factory: pytest.TempPathFactory, tiny: str, weights_of: Any
    ):
        other = tmp_path_factory.mktemp("other")
        save(build(tiny, seed=9), other)
        weights_of(saved).write_bytes(weights_of(other).read_bytes())
        self.refused(saved, "these are the weights of another model")

    def test_an_index_with_an_unknown_key(self, saved: Path, edit_index: Any):
        edit_index(saved, overides={"dim": 3})
        self.refused(saved, "model.json: 'overides': unknown key; did you mean 'overrides'?")
        with pytest.raises(RecipeError, match="unknown key; did you mean 'overrides'"):
            load_recipe(saved)

    def test_missing_weights(self, saved: Path, weights_of: Any):
        weights_of(saved).unlink()
        self.refused(saved, "the weights that model.json names are missing")

    def test_weights_of_a_later_version(self, saved: Path, weights_of: Any, rewrite: Any):
        rewrite(weights_of(saved), lambda tensors: None, version="2")
        self.refused(saved, "expected format version 1, got '2'; a file of a later version")

    def test_missing_and_unexpected_tensors(self, saved: Path, weights_of: Any, rewrite: Any):
        path = weights_of(saved)
        rewrite(path, lambda tensors: tensors.pop("norm.weight" if "norm.weight" in tensors else "norm.gain"))
        self.refused(saved, "is missing")
        rewrite(path, lambda tensors: tensors.update(extra=torch.zeros(1)))
        self.refused(saved, "extra is not part of the model")

    def test_a_tensor_of_another_shape_or_dtype(self, saved: Path, weights_of: Any, rewrite: Any):
        path = weights_of(saved)
        original = path.read_bytes()
        rewrite(path, lambda tensors: tensors.update(embedding=torch.zeros(33, 16)))
        self.refused(saved, "embedding is [33, 16], expected [32, 16]")
        path.write_bytes(original)
        rewrite(path, lambda tensors: tensors.update(embedding=torch.zeros(32, 16, dtype=torch.int64)))
        self.refused(saved, "embedding: expected torch.float32, got torch.int64")

    @pytest.mark.parametrize(
        ("content", "fragment"),
        [
            (b"", "it is empty"),
            (b"{", "no JSON text"),
            (b"\xff\xfe", "no JSON text"),
            (b"[]", "expected the index of a saved model"),
            (b"{}", "expected the index of a saved model"),
            (b'{"format": "other"}', "expected the index of a saved model"),
            (b"[" * 100_000, "no JSON text"),
            (b" " * 5_000_000, "not a saved model's index"),
        ],
        ids=["empty", "broken", "binary", "list", "nothing", "foreign", "deep", "large"],
    )
    def test_a_damaged_index(self, saved: Path, content: bytes, fragment: str):
        (saved / "model.json").write_bytes(content)
        self.refused(saved, fragment)

    @pytest.mark.parametrize(
        ("changes", "fragment"),
        [
            ({"version": 2}, "expected format version 1, got 2"),
            ({"version": None}, "expected format version 1, got null"),
            ({"recipe": None}, "recipe: expected dict, got null"),
            ({"recipe": {"version": 1}}, "the recipe needs 'dim'"),
            ({"overrides": 3}, "overrides: expected dict, got 3"),
            ({"weights": 3}, "weights: expected str, got 3"),
            ({"weights": "../../etc/passwd"}, "weights: expected weights-<16 hex digits>.safetensors"),
            ({"weights": "weights-0123456789abcdef.safetensors"}, "the weights that model.json names are missing"),
        ],
    )
    def test_a_wrong_index(self, saved: Path, changes: dict[str, Any], fragment: str, edit_index: Any):
        edit_index(saved, **changes)
        self.refused(saved, fragment)

    def test_an_index_with_another_recipe(self, saved: Path, other: str, edit_index: Any):
        edit_index(saved, recipe=load_recipe(other).to_dict())
        self.refused(saved, "these are the weights of another model")

    def test_folders_without_a_model(self, saved: Path, weights_of: Any):
        self.refused(saved / "nowhere", "no such folder; expected a saved model")
        self.refused(weights_of(saved), "not a folder; expected a saved model")
        (saved / "empty").mkdir()
        self.refused(saved / "empty", "there is no model.json")

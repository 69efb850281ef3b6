"""Saving and loading of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.state import named_tensors
from titans_build.recipes import StorageError, build, load, load_state, save, save_state


class TestStates:
    def tensors(self, state: Any) -> dict[str, Tensor]:
        return dict(named_tensors(state))

    @pytest.mark.parametrize("recipe", ["tiny", "growing"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_states_are_bit_identical_after_loading(
        self, tmp_path: Path, recipe: str, dtype: str, same: Any, request: Any
    ):
        model = build(request.getfixturevalue(recipe), dtype=dtype)
        tokens = torch.arange(20).view(2, 10)
        with torch.no_grad():
            state = model(tokens[:, :7]).state
            save_state(state, tmp_path / "s.safetensors", model)
            loaded = load_state(tmp_path / "s.safetensors", model)
            assert type(loaded) is type(state)
            assert same(self.tensors(state), self.tensors(loaded))
            assert torch.equal(model(tokens[:, 7:], loaded).logits, model(tokens[:, 7:], state).logits)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_loading_into_a_model_of_another_dtype(
        self, tmp_path: Path, model: LanguageModel, state: Any, dtype: str, tiny: str
    ):
        save_state(state, tmp_path / "s", model)
        other = build(tiny, dtype=dtype, seed=3)
        loaded = self.tensors(load_state(tmp_path / "s", other))
        for name, fresh in self.tensors(other.init_state(2)).items():
            assert loaded[name].dtype == fresh.dtype
            assert torch.equal(loaded[name], self.tensors(state)[name].to(fresh.dtype))
        with torch.no_grad():
            out = other(torch.arange(6).view(2, 3), load_state(tmp_path / "s", other))
        assert bool(out.logits.isfinite().all())

    def test_fresh_states(self, tmp_path: Path, model: LanguageModel, same: Any):
        state = model.init_state(3)
        save_state(state, tmp_path / "s", model)
        assert same(self.tensors(load_state(tmp_path / "s", model)), self.tensors(state))

    def test_loading_into_a_loaded_model(self, tmp_path: Path, model: LanguageModel, state: Any, same: Any):
        save_state(state, tmp_path / "s", model)
        save(model, tmp_path / "model")
        assert same(self.tensors(load_state(tmp_path / "s", load(tmp_path / "model"))), self.tensors(state))

    def test_a_stateless_model(self, tmp_path: Path, tiny: str):
        model = build(tiny[: tiny.index("layers")] + "layers: {a: [ffn]}\nstack: [a]\n")
        state = model(torch.zeros(2, 3, dtype=torch.int64)).state
        save_state(state, tmp_path / "s", model)
        loaded = load_state(tmp_path / "s", model)
        assert loaded.layers == state.layers == ((None,),) and torch.equal(loaded.recipe, state.recipe)

    def test_saving_a_state_of_another_recipe_is_an_error(
        self, tmp_path: Path, model: LanguageModel, state: Any, tiny: str, other: str
    ):
        with pytest.raises(StorageError, match=r"it is of 'tiny' \(\w+\), the model of 'tiny' \(\w+\)"):
            save_state(state, tmp_path / "s", build(other))
        assert not (tmp_path / "s").exists()

    @pytest.fixture
    def saved(self, tmp_path: Path, model: LanguageModel, state: Any) -> Path:
        save_state(state, tmp_path / "s.safetensors", model)
        return tmp_path / "s.safetensors"

    def refused(self, path: Path, model: LanguageModel, *fragments: str) -> None:
        with pytest.raises(StorageError) as caught:
            load_state(path, model)
        assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)

    def test_changed_bytes(self, saved: Path, model: LanguageModel):
        content = bytearray(saved.read_bytes())
        content[-1] ^= 1
        saved.write_bytes(content)
        self.refused(saved, model, "s.safetensors: damaged: the tensors differ from those that were saved")

    def test_a_state_of_another_recipe(self, saved: Path, model: LanguageModel, other: str):
        stranger = build(other)
        fingerprints = model.recipe.fingerprint, stranger.recipe.fingerprint
        self.refused(saved, stranger, "belongs to another recipe", *fingerprints)

    @pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
    def test_truncated(self, saved: Path, model: LanguageModel, keep: int):
        saved.write_bytes(saved.read_bytes()[:keep])
        self.refused(saved, model, "expected a complete safetensors file")

    def test_files_that_are_no_states(self, saved: Path, model: LanguageModel, tmp_path: Path, weights_of: Any):
        saved.write_bytes(b"text\n" * 100)
        self.refused(saved, model, "expected a complete safetensors file")
        save(model, tmp_path / "model")
        self.refused(weights_of(tmp_path / "model"), model, "expected a file of format 'titans-build state'")
        self.refused(tmp_path / "model", model, "not a file; expected a saved state")
        self.refused(tmp_path / "nowhere", model, "no such file; expected a saved state")

    def test_a_later_version(self, saved: Path, model: LanguageModel, rewrite: Any):
        rewrite(saved, lambda tensors: None, version="7")
        self.refused(saved, model, "expected format version 1, got '7'")

    def test_rows_that_disagree(self, saved: Path, model: LanguageModel, rewrite: Any):
        original = saved.read_bytes()
        rewrite(saved, lambda tensors: tensors.update({(name := min(tensors)): tensors[name][:1]}))
        self.refused(saved, model, "disagree about the number of rows")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update({name: tensor[:1] for name, tensor in tensors.items()}))
        self.refused(saved, model, "expected 2 rows, got 1")

    def test_shapes_names_and_dtypes(self, saved: Path, model: LanguageModel, rewrite: Any):
        original = saved.read_bytes()
        rewrite(saved, lambda tensors: tensors.update({(name := max(tensors)): tensors[name][..., None]}))
        self.refused(saved, model, "is not a state of this model")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.pop("state.recipe"))
        self.refused(saved, model, "is missing")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update(extra=torch.zeros(2)))
        self.refused(saved, model, "extra is not part of this model's state")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update({(name := min(tensors)): tensors[name].to(torch.complex64)}))
        self.refused(saved, model, "complex64")

    def test_invalid_arguments_of_save_state(self, tmp_path: Path, model: LanguageModel, state: Any, growing: str):
        with pytest.raises(StorageError, match="is not a state of this model"):
            save_state(build(growing).init_state(2), tmp_path / "s", model)
        with pytest.raises(StorageError, match="without a recipe"):
            save_state(state, tmp_path / "s", nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="cannot be written"):
            save_state(state, tmp_path / "nowhere" / "s", model)
        assert list(tmp_path.iterdir()) == []

    def test_saving_again_replaces_the_state(self, saved: Path, model: LanguageModel):
        save_state(model.init_state(1), saved, model)
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]
        assert torch.equal(
            *(next(iter(self.tensors(s).values())) for s in (load_state(saved, model), model.init_state(1)))
        )

"""Saving and loading of models."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from titans_build import Block, register
from titans_build.blocks.language_model import LanguageModel
from titans_build.recipes import StorageError, build, load, load_recipe, save, storage
from titans_build.registry import RecipeError, scratch


@pytest.fixture(autouse=True, scope="module")
def nothing_registered_stays() -> Iterator[None]:
    with scratch():
        yield


class TestModels:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_parameters_are_bit_identical_after_loading(
        self, tmp_path: Path, dtype: str, tiny: str, same: Any, values: Any
    ):
        model = build(tiny, dtype=dtype, seed=3)
        save(model, tmp_path / "a" / "b")
        loaded = load(tmp_path / "a" / "b")
        assert same(values(model), values(loaded))
        assert loaded.recipe == model.recipe and loaded.recipe.name == "tiny"
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        tokens = torch.arange(14).view(2, 7)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    def test_loading_with_a_dtype_and_device(self, tmp_path: Path, model: LanguageModel, same: Any, values: Any):
        save(model, tmp_path)
        half = load(tmp_path, dtype=torch.bfloat16)
        assert same(values(half), {name: tensor.bfloat16() for name, tensor in values(model).items()})
        with pytest.raises(ValueError, match="unknown dtype 'flaot32'; did you mean 'float32'"):
            load(tmp_path, dtype="flaot32")
        with pytest.raises(ValueError, match="unknown device 'gpu'"):
            load(tmp_path, device="gpu")

    def test_a_tied_head_is_tied_after_loading(self, tmp_path: Path, tiny: str, same: Any, values: Any):
        model = build(tiny + "tie: true\n")
        save(model, tmp_path)
        loaded = load(tmp_path)
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        assert same(values(model), values(loaded))

    def test_overrides_are_applied_and_recorded(self, tmp_path: Path, tiny: str):
        recipe = load_recipe(tiny, {"layers.mag.0.of.branches.1.depth": 1, "dim": 8})
        save(build(recipe), tmp_path)
        loaded = load(tmp_path).recipe
        assert loaded == recipe and loaded.dim == 8
        assert loaded.overrides == {"layers.mag.0.of.branches.1.depth": 1, "dim": 8}

    def test_the_recipe_of_a_folder_has_its_overrides(self, tmp_path: Path, tiny: str):
        save(build(load_recipe(tiny, {"dim": 8})), tmp_path)
        assert load_recipe(tmp_path).overrides == {"dim": 8}
        assert load_recipe(tmp_path, {"layers.mag.0.tokens": 3}).overrides == {"dim": 8, "layers.mag.0.tokens": 3}

    def test_the_tokenizer_is_kept_by_copies(self, tmp_path: Path, model: LanguageModel):
        a, b = tmp_path / "a", tmp_path / "b"
        save(model, a)
        assert model.tokenizer is None and load(a).tokenizer is None
        model.tokenizer = '{"model": {"type": "BPE"}}'  # type: ignore[assignment]
        save(model, a)
        copy = load(a)
        save(copy, b)
        assert load(b).tokenizer == copy.tokenizer == model.tokenizer == (b / "tokenizer.json").read_text()
        # with another one beside it the model would read other tokens
        (a / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
        with pytest.raises(StorageError, match=r"tokenizer.json: the tokenizer is missing, or is not the one that mod"):
            load(a)
        copy.tokenizer = None  # type: ignore[assignment]
        save(copy, b)
        assert load(b).tokenizer is None and not (b / "tokenizer.json").exists()
        copy.tokenizer = "tok.json"  # type: ignore[assignment]
        with pytest.raises(StorageError, match=r"expected the text of a tokenizer.json, or None, got 'tok.json'"):
            save(copy, b)

    def test_another_model_is_replaced_only_on_request(self, tmp_path: Path, model: LanguageModel, other: str):
        save(model, tmp_path)
        save(model, tmp_path)
        with pytest.raises(StorageError, match="a model of another recipe is saved there: overwrite=True replaces it"):
            save(build(other), tmp_path)
        assert load(tmp_path).recipe == model.recipe
        save(build(other), tmp_path, overwrite=True)
        assert load(tmp_path).recipe == load_recipe(other)

    def test_the_model_of_a_run_is_loaded_from_the_folder_of_the_run(
        self, tmp_path: Path, model: LanguageModel, other: str
    ):
        (tmp_path / "run.json").write_text("{}")
        for read in (load, load_recipe):
            with pytest.raises((StorageError, RecipeError), match="this run has not saved its model yet"):
                read(tmp_path)
        save(model, tmp_path / "model")
        for overwrite in (False, True):
            with pytest.raises(
                StorageError, match=r"the folder of a run, whose model is in .*model: choose another fol"
            ):
                save(build(other), tmp_path, overwrite=overwrite)
        assert load(tmp_path).recipe == model.recipe == load_recipe(tmp_path)

    def test_loading_with_overrides(self, tmp_path: Path, tiny: str, same: Any, values: Any):
        save(build(load_recipe(tiny, {"dim": 8}), seed=3), tmp_path)
        changes = {"layers.mag.0.of.branches.1.chunk": 8, "layers.mag.0.of.branches.0.window": 6}
        loaded = load(tmp_path, overrides=changes)
        expected = build(load_recipe(tiny, {"dim": 8, **changes}), seed=3)
        assert loaded.recipe == expected.recipe and loaded.recipe.overrides == {"dim": 8, **changes}
        assert same(values(loaded), values(expected))
        tokens = torch.arange(20).view(1, 20)
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
        # it is a model of another recipe: states of the saved one are not its own
        with pytest.raises(ValueError, match="the state is"):
            loaded(tokens, load(tmp_path).init_state(1))
        save(loaded, tmp_path, overwrite=True)
        assert load(tmp_path).recipe == expected.recipe

    @pytest.mark.parametrize(
        ("changes", "fragment"),
        [
            (
                {"layers.mag.0.of.branches.1.depth": 3},
                "branches.1.depth: the weights do not fit this change: they are those of 2, not of 3",
            ),
            ({"dim": 32}, "dim: the weights do not fit this change: they are those of 16, not of 32"),
            (
                {"tie": True, "layers.mag.0.of.branches.1.chunk": 8},
                "tie: the weights do not fit this change",
            ),
            ({"layers.mag.0.of.branches.1.chnk": 8}, "did you mean 'chunk'"),
            ({"layers.mag.0.of.branches.1.heads": 1}, "heads: the weights do not fit this change: they are those of"),
            ({"layers.mag.0.of.branches.0": "ffn"}, "(no block may be exchanged)"),
            ({"layers.mag.0.of.branches.1.window": 3}, "controls.weight is"),
            ({"vocab": "many"}, "vocab: expected an integer"),
        ],
    )
    def test_loading_with_invalid_overrides(
        self, tmp_path: Path, model: LanguageModel, changes: dict[str, Any], fragment: str
    ):
        save(model, tmp_path)
        with pytest.raises(RecipeError) as caught:
            load(tmp_path, overrides=changes)
        assert fragment in str(caught.value), str(caught.value)
        assert "1 problem\n" in str(caught.value)

    def test_contiguous_weights_are_saved_without_a_copy(
        self, tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, same: Any, values: Any
    ):
        written: dict[str, Tensor] = {}

        def note(tensors: dict[str, Tensor], *arguments: Any) -> None:
            written.update(tensors)
            save_file(tensors, *arguments)

        monkeypatch.setattr(storage, "save_file", note)
        with torch.no_grad():
            model.embedding.set_(torch.randn(16, 32).t())  # not contiguous: has to be copied
        save(model, tmp_path)
        copied = [n for n, parameter in model.named_parameters() if written[n].data_ptr() != parameter.data_ptr()]
        assert copied == ["embedding"]
        assert same(values(load(tmp_path)), values(model))

    def test_a_folder_as_the_source_of_a_recipe(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        assert load_recipe(tmp_path) == load_recipe(str(tmp_path)) == model.recipe
        with pytest.raises(RecipeError, match=r"there is no model\.json"):
            load_recipe(tmp_path.parent)

    def test_saving_again_replaces_the_model(self, tmp_path: Path, model: LanguageModel, other: str, weights_of: Any):
        save(model, tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        save(build(other, seed=4), tmp_path, overwrite=True)
        assert load(tmp_path).recipe == load_recipe(other)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model.json",
            "notes.txt",
            weights_of(tmp_path).name,
        ]

    def test_files_of_killed_saves_are_removed(self, tmp_path: Path, model: LanguageModel, same: Any, values: Any):
        save(model, tmp_path)
        (tmp_path / f"weights-{'0' * 16}.safetensors").write_bytes(b"")
        leftover = tmp_path / f".weights-{'1' * 16}.safetensors.{'0' * 16}.tmp"
        leftover.mkdir()
        (leftover / "content").write_bytes(b"half")
        save(model, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        assert same(values(load(tmp_path)), values(model))

    def test_another_model_is_replaced_only_with_overwrite(self, tmp_path: Path, model: LanguageModel, tiny: str):
        a, b, other = tmp_path / "a", tmp_path / "b", build(tiny, seed=9)
        for _ in range(2):  # the model that was saved there
            save(model, a)
            save(model, b)
        with pytest.raises(StorageError, match="another model is saved there: overwrite=True"):
            save(other, a)
        loaded = load(a)
        save(loaded, a)  # the model that was loaded from there
        with pytest.raises(StorageError, match="another model"):
            save(model, a)  # which has been replaced
        save(copy.deepcopy(model), b)
        save(other, b, overwrite=True)
        save(other, b)
        (a / "model.json").write_text("{")
        with pytest.raises(StorageError, match=r"a model\.json that cannot be read: overwrite=True"):
            save(model, a)
        save(model, a, overwrite=True)
        load(a)

    def test_import_paths_are_not_saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: str):
        (tmp_path / "my_blocks_here.py").write_text(
            "from titans_build import Block, register\n"
            "@register('my_own')\n"
            "class Mine(Block):\n"
            "    def forward(self, x, state=None, *, mask=None):\n"
            "        return x, None\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        with scratch():
            recipe = load_recipe("imports: [my_blocks_here]\n" + tiny.replace("- ffn", "- my_own"), allow_imports=True)
            save(build(recipe), tmp_path / "model")
            assert "my_own" in (tmp_path / "model" / "model.json").read_text()
            for path in (tmp_path / "model").iterdir():
                assert b"my_blocks_here" not in path.read_bytes()
            assert load(tmp_path / "model").recipe.fingerprint == recipe.fingerprint
        with pytest.raises(StorageError, match=r"unknown block 'my_own'(.|\n)*import their module first"):
            load(tmp_path / "model")

    def test_imports_of_a_saved_recipe_are_not_run(self, tmp_path: Path, model: LanguageModel, edit_index: Any):
        save(model, tmp_path)
        edit_index(tmp_path, recipe={**model.recipe.to_dict(), "imports": ["antigravity"]})
        with pytest.raises(StorageError, match="asks to import antigravity"):
            load(tmp_path)
        assert "antigravity" not in sys.modules

    def test_models_that_cannot_be_saved(self, tmp_path: Path, model: LanguageModel, tiny: str):
        with pytest.raises(StorageError, match="Linear without a recipe"):
            save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="meta device"):
            save(build(tiny, device="meta"), tmp_path)
        model.extra = nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
        with pytest.raises(StorageError, match="extra is not part of the model"):
            save(model, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_folders_that_cannot_be_written(self, tmp_path: Path, model: LanguageModel):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot be written"):
            save(model, tmp_path / "file")
        with pytest.raises(StorageError, match="cannot be written"):
            save(model, "/dev/null/model")

    def test_buffers(self, tmp_path: Path, tiny: str):
        with scratch():

            @register("buffered")
            class Buffered(Block):
                def __init__(self, dim: int) -> None:
                    super().__init__(dim)
                    self.register_buffer("seen", torch.zeros(dim, dtype=torch.int64))
                    self.register_buffer("ramp", torch.empty(dim), persistent=False)

                def reset_parameters(self) -> None:
                    self.seen.zero_()
                    self.ramp.copy_(torch.arange(self.dim))

                def forward(self, x: Tensor, state: Any = None, *, mask: Any = None) -> Any:
                    return x * self.ramp, None

            model = build(tiny.replace("- ffn", "- buffered"))
            buffered = model.get_submodule("layers.0.blocks.1")
            buffered.seen += 5
            save(model, tmp_path)
            loaded = load(tmp_path).get_submodule("layers.0.blocks.1")
            assert torch.equal(loaded.seen, buffered.seen) and loaded.seen.dtype == torch.int64
            assert torch.equal(loaded.ramp, buffered.ramp)

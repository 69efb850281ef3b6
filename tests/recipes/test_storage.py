from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_build import Block, register
from titans_build.blocks.language_model import LanguageModel
from titans_build.blocks.state import named_tensors
from titans_build.recipes import StorageError, build, load, load_recipe, load_state, save, save_state, storage
from titans_build.registry import RecipeError, scratch

TINY = """
version: 1
name: tiny
dim: 16
vocab: 32
layers:
  mag:
    - type: persistent
      tokens: 2
      of:
        type: gate
        branches: [{type: attention, heads: 2, window: 4}, {type: memory, heads: 2, chunk: 4}]
    - ffn
stack: [mag]
"""
OTHER = TINY.replace("chunk: 4", "chunk: 8")
GROWING = TINY.replace("window: 4", "window: null")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> LanguageModel:
    return build(TINY, seed=3)


@pytest.fixture
def state(model: LanguageModel) -> Any:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).state


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.safetensors")
    return path


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    """Write a safetensors file anew with other tensors and metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {**old, **metadata})


class TestModels:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
    def test_what_is_saved_is_what_loads(self, tmp_path: Path, dtype: str):
        model = build(TINY, dtype=dtype, seed=3)
        save(model, tmp_path / "a" / "b")
        loaded = load(tmp_path / "a" / "b")
        assert same(values(model), values(loaded))
        assert loaded.recipe == model.recipe and loaded.recipe.name == "tiny"
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        tokens = torch.arange(14).view(2, 7)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    def test_dtype_and_device_of_choice(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        half = load(tmp_path, dtype=torch.bfloat16)
        assert same(values(half), {name: tensor.bfloat16() for name, tensor in values(model).items()})
        with pytest.raises(ValueError, match="unknown dtype 'flaot32'; did you mean 'float32'"):
            load(tmp_path, dtype="flaot32")
        with pytest.raises(ValueError, match="unknown device 'gpu'"):
            load(tmp_path, device="gpu")

    def test_a_tied_head_stays_tied(self, tmp_path: Path):
        model = build(TINY + "tie: true\n")
        save(model, tmp_path)
        loaded = load(tmp_path)
        assert len(list(loaded.parameters())) == len(list(model.parameters()))
        assert same(values(model), values(loaded))

    def test_overrides_are_applied_and_recorded(self, tmp_path: Path):
        recipe = load_recipe(TINY, {"layers.mag.0.of.branches.1.depth": 1, "dim": 8})
        save(build(recipe), tmp_path)
        loaded = load(tmp_path).recipe
        assert loaded == recipe and loaded.dim == 8
        assert loaded.overrides == {"layers.mag.0.of.branches.1.depth": 1, "dim": 8}

    def test_a_folder_s_recipe_keeps_what_was_changed(self, tmp_path: Path):
        save(build(load_recipe(TINY, {"dim": 8})), tmp_path)
        assert load_recipe(tmp_path).overrides == {"dim": 8}
        assert load_recipe(tmp_path, {"layers.mag.0.tokens": 3}).overrides == {"dim": 8, "layers.mag.0.tokens": 3}

    def test_overrides_that_the_weights_fit(self, tmp_path: Path):
        save(build(load_recipe(TINY, {"dim": 8}), seed=3), tmp_path)
        changes = {"layers.mag.0.of.branches.1.chunk": 8, "layers.mag.0.of.branches.0.window": 6}
        loaded = load(tmp_path, overrides=changes)
        expected = build(load_recipe(TINY, {"dim": 8, **changes}), seed=3)
        assert loaded.recipe == expected.recipe and loaded.recipe.overrides == {"dim": 8, **changes}
        assert same(values(loaded), values(expected))
        tokens = torch.arange(20).view(1, 20)
        assert torch.equal(loaded(tokens).logits, expected(tokens).logits)
        # it is a model of another recipe: states of the saved one are not its own
        with pytest.raises(ValueError, match="the state is"):
            loaded(tokens, load(tmp_path).init_state(1))
        save(loaded, tmp_path)
        assert load(tmp_path).recipe == expected.recipe

    @pytest.mark.parametrize(
        ("changes", "fragment"),
        [
            ({"layers.mag.0.of.branches.1.depth": 3}, "layers.mag.0.of.branches.1.depth: the saved weights do not fit"),
            ({"dim": 32}, "dim: the saved weights do not fit this change: embedding is [32, 16], expected [32, 32]"),
            (
                {"tie": True, "layers.mag.0.of.branches.1.chunk": 8},
                "tie: the saved weights do not fit this change: head",
            ),
            ({"layers.mag.0.of.branches.1.chnk": 8}, "did you mean 'chunk'"),
            ({"vocab": "many"}, "vocab: expected an integer"),
        ],
    )
    def test_overrides_that_are_refused(
        self, tmp_path: Path, model: LanguageModel, changes: dict[str, Any], fragment: str
    ):
        save(model, tmp_path)
        with pytest.raises(RecipeError) as caught:
            load(tmp_path, overrides=changes)
        assert fragment in str(caught.value), str(caught.value)
        assert "1 problem\n" in str(caught.value)

    def test_weights_are_written_from_where_they_are(
        self, tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
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

    def test_a_folder_is_a_recipe_too(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        assert load_recipe(tmp_path) == load_recipe(str(tmp_path)) == model.recipe
        with pytest.raises(RecipeError, match=r"there is no model\.json"):
            load_recipe(tmp_path.parent)

    def test_saving_again_replaces(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        (tmp_path / "notes.txt").write_text("mine")
        save(build(OTHER, seed=4), tmp_path)
        assert load(tmp_path).recipe == load_recipe(OTHER)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "model.json",
            "notes.txt",
            weights_of(tmp_path).name,
        ]

    def test_leftovers_of_killed_saves_are_removed_when_old(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        leftovers = [tmp_path / f"weights-{'0' * 16}.safetensors", tmp_path / f".model.json.{'0' * 16}.tmp"]
        fresh = tmp_path / f"weights-{'1' * 16}.safetensors"  # perhaps of a save that is going on
        for path in [*leftovers, fresh]:
            path.write_bytes(b"")
        for path in leftovers:
            os.utime(path, (0, 0))
        save(model, tmp_path)
        assert not any(path.exists() for path in leftovers) and fresh.exists()
        assert same(values(load(tmp_path)), values(model))

    def test_import_paths_are_not_saved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "my_blocks_here.py").write_text(
            "from titans_build import Block, register\n"
            "@register('my_own')\n"
            "class Mine(Block):\n"
            "    def forward(self, x, state=None, *, mask=None):\n"
            "        return x, None\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        with scratch():
            recipe = load_recipe("imports: [my_blocks_here]\n" + TINY.replace("- ffn", "- my_own"), allow_imports=True)
            save(build(recipe), tmp_path / "model")
            assert "my_own" in (tmp_path / "model" / "model.json").read_text()
            for path in (tmp_path / "model").iterdir():
                assert b"my_blocks_here" not in path.read_bytes()
            assert load(tmp_path / "model").recipe.fingerprint == recipe.fingerprint
        with pytest.raises(StorageError, match=r"unknown block 'my_own'(.|\n)*import its module first"):
            load(tmp_path / "model")

    def test_a_recipe_that_asks_for_imports_runs_nothing(self, tmp_path: Path, model: LanguageModel):
        save(model, tmp_path)
        edit_index(tmp_path, recipe={**model.recipe.to_dict(), "imports": ["antigravity"]})
        with pytest.raises(StorageError, match="asks to import antigravity"):
            load(tmp_path)
        assert "antigravity" not in sys.modules

    def test_models_that_cannot_be_saved(self, tmp_path: Path, model: LanguageModel):
        with pytest.raises(StorageError, match="Linear without a recipe"):
            save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="meta device"):
            save(build(TINY, device="meta"), tmp_path)
        model.extra = nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
        with pytest.raises(StorageError, match="extra is not part of the model"):
            save(model, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_places_that_cannot_be_written(self, tmp_path: Path, model: LanguageModel):
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="cannot be written"):
            save(model, tmp_path / "file")
        with pytest.raises(StorageError, match="cannot be written"):
            save(model, "/dev/null/model")

    def test_buffers(self, tmp_path: Path):
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

            model = build(TINY.replace("- ffn", "- buffered"))
            buffered = model.get_submodule("layers.0.blocks.1")
            buffered.seen += 5
            save(model, tmp_path)
            loaded = load(tmp_path).get_submodule("layers.0.blocks.1")
            assert torch.equal(loaded.seen, buffered.seen) and loaded.seen.dtype == torch.int64
            assert torch.equal(loaded.ramp, buffered.ramp)


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
    def test_truncated_weights(self, saved: Path, keep: int):
        path = weights_of(saved)
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(saved, "expected a whole safetensors file")

    @pytest.mark.parametrize("content", [b"not safetensors at all", b"\xff" * 1000, b"PK\x03\x04" + b"\x00" * 500])
    def test_foreign_weights(self, saved: Path, content: bytes):
        weights_of(saved).write_bytes(content)
        self.refused(saved, "expected a whole safetensors file")

    def test_weights_of_another_program(self, saved: Path):
        save_file({"a": torch.zeros(2)}, weights_of(saved))
        self.refused(saved, "expected a file of format 'titans-build model', got null")

    def test_weights_of_another_model(self, saved: Path, tmp_path_factory: pytest.TempPathFactory):
        other = tmp_path_factory.mktemp("other")
        save(build(OTHER), other)
        weights_of(saved).write_bytes(weights_of(other).read_bytes())
        self.refused(saved, "these are the weights of another model")

    def test_weights_of_another_save_of_the_same_model(self, saved: Path, tmp_path_factory: pytest.TempPathFactory):
        other = tmp_path_factory.mktemp("other")
        save(build(TINY, seed=9), other)
        weights_of(saved).write_bytes(weights_of(other).read_bytes())
        self.refused(saved, "these are the weights of another model")

    def test_an_index_with_what_no_index_has(self, saved: Path):
        edit_index(saved, overides={"dim": 3})
        self.refused(saved, "model.json: 'overides': unknown key; did you mean 'overrides'?")
        with pytest.raises(RecipeError, match="unknown key; did you mean 'overrides'"):
            load_recipe(saved)

    def test_missing_weights(self, saved: Path):
        weights_of(saved).unlink()
        self.refused(saved, "the weights that model.json names are missing")

    def test_weights_of_a_later_version(self, saved: Path):
        rewrite(weights_of(saved), lambda tensors: None, version="2")
        self.refused(saved, "expected format version 1, got '2'; a file of a later version")

    def test_tensors_that_do_not_fit(self, saved: Path):
        path = weights_of(saved)
        rewrite(path, lambda tensors: tensors.pop("norm.weight" if "norm.weight" in tensors else "norm.gain"))
        self.refused(saved, "is missing")
        rewrite(path, lambda tensors: tensors.update(extra=torch.zeros(1)))
        self.refused(saved, "extra is not part of the model")

    def test_a_tensor_of_another_shape_or_kind(self, saved: Path):
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
    def test_a_wrong_index(self, saved: Path, changes: dict[str, Any], fragment: str):
        edit_index(saved, **changes)
        self.refused(saved, fragment)

    def test_an_index_with_another_recipe(self, saved: Path):
        edit_index(saved, recipe=load_recipe(OTHER).to_dict())
        self.refused(saved, "these are the weights of another model")

    def test_no_model_there(self, saved: Path):
        self.refused(saved / "nowhere", "no such folder; expected a saved model")
        self.refused(weights_of(saved), "not a folder; expected a saved model")
        (saved / "empty").mkdir()
        self.refused(saved / "empty", "there is no model.json")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path: Path):
    """A process that dies at the k-th step of a save, for every k, leaves the old model or the new one."""
    old, new = build(TINY, seed=0), build(OTHER, seed=1)
    outcomes = []
    for step in range(100):
        folder = tmp_path / str(step)
        save(old, folder)
        child = os.fork()
        if child == 0:
            _die_at(step)
            save(new, folder)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        loaded = load(folder)
        is_new = loaded.recipe == new.recipe
        assert same(values(loaded), values(new if is_new else old))
        outcomes.append(is_new)
        save(old, folder)
        assert same(values(load(folder)), values(old))
        if finished:
            break
    assert finished and outcomes[-1]
    # old up to one moment, new from then on
    assert len(outcomes) > 6 and not outcomes[0] and outcomes == sorted(outcomes)


def _die_at(step: int) -> None:
    """End this process, without any clean-up, at the ``step``-th call that touches the disk."""
    remaining = step

    def mortal(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                os._exit(9)
            remaining -= 1
            return function(*arguments, **named)

        return call

    for name in ("fsync", "replace", "open", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    Path.write_text = mortal(Path.write_text)  # type: ignore[method-assign]
    Path.unlink = mortal(Path.unlink)  # type: ignore[method-assign]
    storage.save_file = mortal(storage.save_file)  # type: ignore[attr-defined]


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, failing: str
):
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"titans_build.recipes.storage.{failing}", fail)
        with pytest.raises(StorageError, match="cannot be written: No space left on device"):
            save(build(OTHER), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_beside_a_writer(tmp_path: Path):
    """A load while saves go on finds one of the saved models."""
    models = [build(TINY, seed=seed) for seed in range(2)]
    save(models[0], tmp_path)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for model in models:
                save(model, tmp_path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            loaded = values(load(tmp_path))
            assert any(same(loaded, values(model)) for model in models)
    finally:
        stop.set()
        writer.join()


class TestStates:
    def tensors(self, state: Any) -> dict[str, Tensor]:
        return dict(named_tensors(state))

    @pytest.mark.parametrize("text", [TINY, GROWING], ids=["bounded", "growing"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_bit_for_bit(self, tmp_path: Path, text: str, dtype: str):
        model = build(text, dtype=dtype)
        tokens = torch.arange(20).view(2, 10)
        with torch.no_grad():
            state = model(tokens[:, :7]).state
            save_state(state, tmp_path / "s.safetensors", model)
            loaded = load_state(tmp_path / "s.safetensors", model)
            assert type(loaded) is type(state)
            assert same(self.tensors(state), self.tensors(loaded))
            assert torch.equal(model(tokens[:, 7:], loaded).logits, model(tokens[:, 7:], state).logits)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_a_model_of_another_dtype_takes_it(self, tmp_path: Path, model: LanguageModel, state: Any, dtype: str):
        save_state(state, tmp_path / "s", model)
        other = build(TINY, dtype=dtype, seed=3)
        loaded = self.tensors(load_state(tmp_path / "s", other))
        for name, fresh in self.tensors(other.init_state(2)).items():
            assert loaded[name].dtype == fresh.dtype
            assert torch.equal(loaded[name], self.tensors(state)[name].to(fresh.dtype))
        with torch.no_grad():
            out = other(torch.arange(6).view(2, 3), load_state(tmp_path / "s", other))
        assert bool(out.logits.isfinite().all())

    def test_fresh_states(self, tmp_path: Path, model: LanguageModel):
        state = model.init_state(3)
        save_state(state, tmp_path / "s", model)
        assert same(self.tensors(load_state(tmp_path / "s", model)), self.tensors(state))

    def test_a_model_of_the_same_recipe_takes_it(self, tmp_path: Path, model: LanguageModel, state: Any):
        save_state(state, tmp_path / "s", model)
        save(model, tmp_path / "model")
        assert same(self.tensors(load_state(tmp_path / "s", load(tmp_path / "model"))), self.tensors(state))

    def test_a_stateless_model(self, tmp_path: Path):
        model = build(TINY[: TINY.index("layers")] + "layers: {a: [ffn]}\nstack: [a]\n")
        state = model(torch.zeros(2, 3, dtype=torch.int64)).state
        save_state(state, tmp_path / "s", model)
        loaded = load_state(tmp_path / "s", model)
        assert loaded.layers == state.layers == ((None,),) and torch.equal(loaded.recipe, state.recipe)

    def test_a_state_of_equal_shapes_from_another_recipe_is_not_saved_as_ones_own(
        self, tmp_path: Path, model: LanguageModel, state: Any
    ):
        with pytest.raises(StorageError, match=r"it is of 'tiny' \(\w+\), the model of 'tiny' \(\w+\)"):
            save_state(state, tmp_path / "s", build(OTHER))
        assert not (tmp_path / "s").exists()

    @pytest.fixture
    def saved(self, tmp_path: Path, model: LanguageModel, state: Any) -> Path:
        save_state(state, tmp_path / "s.safetensors", model)
        return tmp_path / "s.safetensors"

    def refused(self, path: Path, model: LanguageModel, *fragments: str) -> None:
        with pytest.raises(StorageError) as caught:
            load_state(path, model)
        assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)

    def test_a_state_of_another_recipe(self, saved: Path, model: LanguageModel):
        other = build(OTHER)
        self.refused(saved, other, "belongs to another recipe", model.recipe.fingerprint, other.recipe.fingerprint)

    @pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
    def test_truncated(self, saved: Path, model: LanguageModel, keep: int):
        saved.write_bytes(saved.read_bytes()[:keep])
        self.refused(saved, model, "expected a whole safetensors file")

    def test_foreign(self, saved: Path, model: LanguageModel, tmp_path: Path):
        saved.write_bytes(b"text\n" * 100)
        self.refused(saved, model, "expected a whole safetensors file")
        save(model, tmp_path / "model")
        self.refused(weights_of(tmp_path / "model"), model, "expected a file of format 'titans-build state'")
        self.refused(tmp_path / "model", model, "not a file; expected a saved state")
        self.refused(tmp_path / "nowhere", model, "no such file; expected a saved state")

    def test_a_later_version(self, saved: Path, model: LanguageModel):
        rewrite(saved, lambda tensors: None, version="7")
        self.refused(saved, model, "expected format version 1, got '7'")

    def test_rows_that_disagree(self, saved: Path, model: LanguageModel):
        original = saved.read_bytes()
        rewrite(saved, lambda tensors: tensors.update({(name := min(tensors)): tensors[name][:1]}))
        self.refused(saved, model, "disagree about the number of rows")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update({name: tensor[:1] for name, tensor in tensors.items()}))
        self.refused(saved, model, "expected 2 rows, got 1")

    def test_shapes_names_and_kinds(self, saved: Path, model: LanguageModel):
        original = saved.read_bytes()
        rewrite(saved, lambda tensors: tensors.update({(name := max(tensors)): tensors[name][..., None]}))
        self.refused(saved, model, "is not a state of this model")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.pop(min(tensors)))
        self.refused(saved, model, "is missing")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update(extra=torch.zeros(2)))
        self.refused(saved, model, "extra is not part of this model's state")
        saved.write_bytes(original)
        rewrite(saved, lambda tensors: tensors.update({(name := min(tensors)): tensors[name].to(torch.complex64)}))
        self.refused(saved, model, "complex64")

    def test_saving_something_else(self, tmp_path: Path, model: LanguageModel, state: Any):
        with pytest.raises(StorageError, match="is not a state of this model"):
            save_state(build(GROWING).init_state(2), tmp_path / "s", model)
        with pytest.raises(StorageError, match="without a recipe"):
            save_state(state, tmp_path / "s", nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="cannot be written"):
            save_state(state, tmp_path / "nowhere" / "s", model)
        assert list(tmp_path.iterdir()) == []

    def test_replacing_leaves_nothing_behind(self, saved: Path, model: LanguageModel):
        save_state(model.init_state(1), saved, model)
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]
        assert torch.equal(
            *(next(iter(self.tensors(s).values())) for s in (load_state(saved, model), model.init_state(1)))
        )


@pytest.fixture(autouse=True, scope="module")
def nothing_registered_stays() -> Iterator[None]:
    with scratch():
        yield

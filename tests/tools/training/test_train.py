"""``tb.train``: what a run does and records, stages, averages, carried state, and resuming."""

from __future__ import annotations

import functools
import json
import math
import operator
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.recipes import StorageError
from titans_build.recipes.parse import read_file
from titans_build.tools.data.tokenizer import train_tokenizer
from titans_build.tools.train import main
from titans_build.tools.training import TrainedRun, as_settings, train
from titans_build.tools.training.checkpoint import CheckpointManager
from titans_build.tools.training.train_command import Display
from titans_build.tools.training.trials import Trial, check_trial

Train = Callable[..., TrainedRun]
COPY = "copy:length=16"


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_run_learns_and_records_itself(
    tiny: dict[str, Any], losses: Any, logged: Any, quick_train: Train, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    run = quick_train(steps=40, lr=0.02, valid_every=20, valid_batches=2, surprise_every=20, on_event=events.append)
    found = losses(run.history)
    assert len(found) == 40 and found[40] < found[1] - 0.3
    assert run.best is not None and run.best["step"] == 40 and {"loss", "accuracy", "exact"} < run.best.keys()
    # the folder
    out = tmp_path / "run"
    assert logged(out) == run.history == [event for event in events if event["event"] != "tick"]
    assert sum(event["event"] == "tick" for event in events) == 40
    surprise = [event["memories"] for event in run.history if event["event"] == "surprise"]
    assert [sorted(memories) for memories in surprise] == 2 * [
        ["layers.0.blocks.0.memory", "layers.1.blocks.0.of.branches.1"]
    ]
    described = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert described["data"]["task"] == "copy" and described["data"]["length"] == 16 and described["seed"] == 0
    assert torch.__version__.startswith(described["versions"]["torch"])
    assert tb.load_recipe(out / "recipe.yaml") == tb.load_recipe(tiny)
    assert same_weights(tb.load(out / "model"), run.model)
    assert json.loads((out / "checkpoints/index.json").read_text(encoding="utf-8")) == {
        "latest": "step-00000040",
        "best": "step-00000040",
    }


def test_recorded_inputs_repeat_the_run(losses: Any, quick_train: Train, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    first = quick_train(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    recorded = read_file(tmp_path / "run/train.yaml")
    data = recorded.pop("data")
    again = train(tmp_path / "run/recipe.yaml", data, recorded, tmp_path / "again")
    assert losses(again.history) == losses(first.history) and same_weights(again.model, first.model)
    other = quick_train(seed=4, out="other")
    assert losses(other.history)[1] != losses(first.history)[1]


STAGES = [{"steps": 2, "train": ["!@memory"]}, {"steps": 4, "train": ["@memory"]}]


@pytest.mark.parametrize(
    ("data", "more", "settings"),
    [
        ("ordered_text", {}, {"steps": 6, "carry": 2, "ema": 0.8}),
        ("ordered_text", {}, {"stages": STAGES, "carry": 2}),
        pytest.param("packed_text", {}, {"steps": 6, "accumulate": 2}, marks=pytest.mark.slow),
        ("packed_text", {"documents": "ordered"}, {"steps": 6, "accumulate": 2, "surprise_every": 1}),
    ],
)
def test_resume_is_exact(
    tiny: dict[str, Any],
    losses: Any,
    quick_train: Train,
    data: str,
    more: dict[str, Any],
    settings: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    recipe, source = {**tiny, "vocab": 256}, {**request.getfixturevalue(data), **more}
    given = {"recipe": recipe, "data": source, "checkpoint_every": 2, "valid_every": 3, **settings}
    whole = quick_train(**given, out="whole")

    class Gone(Exception):
        pass

    def leave(event: dict[str, Any]) -> None:
        if event["event"] == "tick" and event["step"] == 5:
            raise Gone

    with pytest.raises(Gone):
        quick_train(**given, on_event=leave)
    run = quick_train(recipe=None, data=None, resume=True)
    assert losses(run.history) == losses(whole.history)
    assert same_weights(run.model, whole.model) and run.best == whole.best
    assert [event["step"] for event in run.history if event["event"] == "start"] == [0, 4]
    # a finished run stays as it is
    again = quick_train(recipe=None, data=None, resume=True)
    assert same_weights(again.model, whole.model) and losses(again.history) == losses(whole.history)


MAC, MAG = "layers.mac.0.", "layers.mag.0.of.branches."
CHANGES: list[dict[str, Any]] = [
    {"steps": 2, "recipe": {f"{MAC}memory.chunk": 8, f"{MAG}1.reset": 8}},
    {"steps": 2, "recipe": {f"{MAC}memory.chunk": 1, f"{MAC}segment": 4, f"{MAG}0.window": 4}, "optimizer": "fresh"},
    {"steps": 1, "lr": 1e-4},
]


@pytest.mark.parametrize("carry", ["detach", 2])
def test_a_stage_changes_the_recipe_and_resumes_exactly(
    tiny: dict[str, Any], losses: Any, quick_train: Train, ordered_text: Any, tmp_path: Path, carry: Any
) -> None:
    given = {"recipe": {**tiny, "vocab": 256}, "data": ordered_text, "carry": carry, "ema": 0.8, "valid_every": 2}
    whole = quick_train(**given, stages=CHANGES, out="whole")
    assert whole.model is not None and tb.load_recipe(tmp_path / "whole") == tb.load_recipe(given["recipe"])
    read = [event["recipe"] for event in whole.history if event["event"] == "stage" and "recipe" in event]
    assert read == [stage["recipe"] for stage in CHANGES[:2]]
    assert [event["stage"] for event in whole.history if event["event"] == "step"] == [0, 0, 1, 1, 2]

    class Gone(Exception):
        pass

    for stop in (2, 3, 5):

        def leave(event: dict[str, Any], stop: int = stop) -> None:
            if event["event"] == "tick" and event["step"] == stop:
                raise Gone

        with pytest.raises(Gone):
            quick_train(**given, stages=CHANGES, on_event=leave, out=f"run-{stop}")
        run = quick_train(recipe=None, data=None, resume=True, out=f"run-{stop}")
        assert losses(run.history) == losses(whole.history), stop
        assert same_weights(run.model, whole.model) and run.best == whole.best


def test_a_stage_continues_from_the_weights_of_the_stage_before(tiny: dict[str, Any], quick_train: Train) -> None:
    first = quick_train(stages=CHANGES[:1], out="first")
    both = quick_train(stages=[*CHANGES[:1], {"steps": 1, "lr": 1e-12}])
    for (name, one), two in zip(first.model.named_parameters(), both.model.parameters()):  # type: ignore[union-attr]
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9, msg=name)
    assert first.model.recipe.layers["mac"][0]["memory"]["chunk"] == 8  # type: ignore[union-attr]
    assert both.model.recipe == tb.load_recipe(tiny)  # type: ignore[union-attr]


def test_state_is_carried_between_batches(
    tiny: dict[str, Any], losses: Any, quick_train: Train, ordered_text: Any
) -> None:
    recipe = {**tiny, "vocab": 256}
    runs = {
        carry: losses(quick_train(recipe=recipe, data=ordered_text, carry=carry, steps=3, out=str(carry)).history)
        for carry in ("off", "detach", 1)
    }
    assert runs["detach"] == runs[1]
    assert runs["detach"][1] == runs["off"][1] and runs["detach"][2] != runs["off"][2]


def test_packed_documents_are_told_and_validated_alone(
    tiny: dict[str, Any], quick_train: Train, packed_text: Any, tmp_path: Path, capsys: Any
) -> None:
    recipe = {**tiny, "vocab": 256}
    with Display(as_json=False) as display:
        run = quick_train(recipe=recipe, data=packed_text, steps=2, valid_every=2, valid_batches=10, on_event=display)
    start, documents = (
        next(event for event in run.history if event["event"] == kind) for kind in ("start", "documents")
    )
    described = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["data"]
    packing = start["packing"]
    assert packing["padded"] == described["padded"] and packing["padded_share"] == described["padded_share"] < 0.1
    told = f"{packing['documents']} documents ({packing['documents_cut']} longer than a row are cut) in "
    assert capsys.readouterr().out.startswith(f"{told}{packing['rows']} rows of 24 tokens; padding: ")
    # each document is read whole, from a fresh state
    lines = (tmp_path / "lines.txt").read_bytes().splitlines()
    assert run.model is not None and len(documents["documents"]) == described["files"] * 120 - packing["documents"]
    for each in documents["documents"]:
        tokens = torch.tensor([list(lines[int(each["document"].partition(":")[2]) - 1])])
        loss = run.model(tokens[:, :-1], targets=tokens[:, 1:]).loss
        assert loss is not None and each["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert each["tokens"] == tokens.shape[1] - 1
    valid = next(event for event in run.history if event["event"] == "valid")
    lengths, found = ([each[key] for each in documents["documents"]] for key in ("tokens", "loss"))
    assert valid["loss"] == pytest.approx(sum(map(operator.mul, lengths, found)) / sum(lengths))
    assert valid["document_loss"] == pytest.approx(statistics.mean(found)) and run.best == {
        key: value for key, value in valid.items() if key != "event"
    }


def test_what_packed_documents_do_not_allow(quick_train: Train, packed_text: Any, tiny: dict[str, Any]) -> None:
    recipe = {**tiny, "vocab": 256}
    for name in ("memory_loss", "write_cost", "compile"):
        value = True if name == "compile" else 0.1
        with pytest.raises(tb.RecipeError, match=f"{name}: it cannot be used with packed documents: leave out"):
            quick_train(recipe=recipe, data=packed_text, **{name: value})
    # a growing state is carried within a document of a validation, and nowhere else
    growing = {**recipe, "layers": {"mac": [{"type": "attention", "heads": 2}]}, "stack": ["mac"]}
    run = quick_train(recipe=growing, data={**packed_text, "length": 8}, steps=2, valid_every=2)
    assert run.best is not None
    with pytest.raises(tb.RecipeError, match="the model's state grows with every token"):
        quick_train(recipe=growing, data={**packed_text, "documents": "ordered"}, out="ordered")


def test_stages_train_only_their_parameters(tiny: dict[str, Any], quick_train: Train) -> None:
    stages = [{"steps": 2, "train": ["!@memory"]}, {"steps": 2, "train": ["@memory"], "optimizer": "fresh", "lr": 0.01}]
    start = tb.build(tiny)
    first = quick_train(stages=stages[:1], out="first").model
    both = quick_train(stages=stages).model
    assert first is not None and both is not None
    memory = {name for name, _ in start.named_parameters() if ".memory." in name or ".branches.1." in name}
    for name, value in start.state_dict().items():
        changed = [
            not torch.equal(value, first.state_dict()[name]),
            not torch.equal(first.state_dict()[name], both.state_dict()[name]),
        ]
        assert changed == ([False, True] if name in memory else [True, False]), name
    assert all(parameter.requires_grad for parameter in both.parameters())


def test_averaged_weights_are_validated_and_saved(quick_train: Train, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = quick_train(ema=0.5, valid_every=6, valid_batches=1)
    assert run.model is not None and run.best is not None
    (path,) = (tmp_path / "run/checkpoints/step-00000006").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        for name, value in run.model.named_parameters():
            assert torch.equal(value, file.get_tensor(f"average.{name}"))
            assert not torch.equal(value, file.get_tensor(f"model.{name}"))
    source = tb.open_source(COPY, rows=4, split="valid")
    batch = source.batch(0)
    with torch.no_grad():
        assert run.model(batch.tokens, targets=batch.targets).loss.item() == pytest.approx(run.best["loss"], rel=1e-6)


def test_training_from_saved_weights(
    tiny: dict[str, Any], quick: dict[str, Any], losses: Any, quick_train: Train, tmp_path: Path
) -> None:
    first = quick_train(lr=0.01)
    run = train(tmp_path / "run/model", COPY, {**quick, "lr": 1e-12}, tmp_path / "more", weights=tmp_path / "run/model")
    assert losses(run.history)[1] == pytest.approx(
        losses(quick_train(lr=0.01, steps=7, out="longer").history)[1], abs=0.5
    )
    assert first.model is not None and run.model is not None
    for a, b in zip(first.model.parameters(), run.model.parameters()):
        torch.testing.assert_close(a, b)
    with pytest.raises(StorageError, match="of another recipe"):
        train({**tiny, "stack": ["mag", "mac"]}, COPY, quick, tmp_path / "no", weights=tmp_path / "run/model")


def test_run_from_weights_resumes_without_a_checkpoint(
    quick: dict[str, Any], losses: Any, quick_train: Train, tmp_path: Path
) -> None:
    quick_train(lr=0.05, steps=3, out="first")
    weights = tmp_path / "first/model"
    whole = train(weights, COPY, quick, tmp_path / "whole", weights=weights)

    class Gone(Exception):
        pass

    def leave(event: dict[str, Any]) -> None:
        if event["event"] == "tick":
            raise Gone

    with pytest.raises(Gone):
        train(weights, COPY, quick, tmp_path / "left", weights=weights, on_event=leave)
    run = train(None, None, {"lr": 1e-3, "log_every": 1}, tmp_path / "left", resume=True)
    assert losses(run.history) == losses(whole.history)


def test_changed_data_is_refused(tiny: dict[str, Any], losses: Any, quick_train: Train, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What was said. " * 40, encoding="utf-8")
    spec = {"text": str(text), "length": 16}
    quick_train(recipe={**tiny, "vocab": 256}, data=spec, steps=1)
    before = text.read_bytes()
    text.write_bytes(before.replace(b"W", b"T"))
    with pytest.raises(tb.RecipeError, match=r"fingerprint: the run began with '\w+', now it is") as caught:
        quick_train(recipe=None, data=None, resume=True, steps=2)
    assert f"{str(text)!r} has changed: restore it, or start a run in another folder" in str(caught.value)
    text.write_bytes(before)
    assert len(losses(quick_train(recipe=None, data=None, resume=True, steps=2).history)) == 2


def test_run_of_an_earlier_data_order_is_not_continued(quick_train: Train, tmp_path: Path) -> None:
    quick_train(steps=2)
    path = tmp_path / "run/run.json"
    run = json.loads(path.read_text(encoding="utf-8"))
    del run["data_order"]  # version 0.1.0 recorded none
    path.write_text(json.dumps(run), encoding="utf-8")
    assert quick_train(recipe=None, data=None, resume=True, lr=0.1).model is not None
    before = [file.read_bytes() for file in (path, tmp_path / "run/train.yaml")]
    with pytest.raises(tb.RecipeError, match="begun by an earlier version, which reads the data in another order"):
        quick_train(recipe=None, data=None, resume=True, steps=3)
    assert [file.read_bytes() for file in (path, tmp_path / "run/train.yaml")] == before
    assert json.loads(before[0])["data_order"] is None


def test_bits_per_byte_of_text(tiny: dict[str, Any], quick_train: Train, ordered_text: Any) -> None:
    run = quick_train(recipe={**tiny, "vocab": 256}, data=ordered_text, valid_every=3, steps=3)
    assert run.best is not None and "exact" not in run.best
    assert run.best["bits_per_byte"] == pytest.approx(run.best["loss"] / 0.6931471805599453)


def test_tokenizer_belongs_to_the_run_and_to_the_model(
    tiny: dict[str, Any], quick: dict[str, Any], quick_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TITANS_BUILD_CACHE", str(tmp_path / "cache"))
    text = "The cat sat on the mat, and the mat lay on the floor. " * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer([text], 280)
    tokenizer.save(str(tmp_path / "tok.json"))
    recipe = {**tiny, "vocab": 300}
    spec = {"text": str(tmp_path / "text.txt"), "length": 16}
    with pytest.raises(tb.RecipeError, match=r"the model has 300 tokens, .* bytes?: give --tokenizer FILE"):
        quick_train(recipe=recipe, data=spec)
    tokenized = {**spec, "tokenizer": str(tmp_path / "tok.json")}
    with pytest.raises(tb.RecipeError, match=rf"the data has {tokenizer.get_vocab_size()} tokens, the model only 256"):
        quick_train(recipe={**tiny, "vocab": 256}, data=tokenized)
    first = quick_train(recipe=recipe, data=tokenized, steps=2, valid_every=2)
    rate = len(text) / len(tokenizer.encode(text).ids)
    assert first.best is not None
    assert first.best["bits_per_byte"] == pytest.approx(first.best["loss"] / math.log(2) / rate, rel=1e-3)
    content = (tmp_path / "tok.json").read_text(encoding="utf-8")
    out = tmp_path / "run"
    assert content == (out / "tokenizer.json").read_text(encoding="utf-8") == tb.load(out).tokenizer
    # the run goes on without the file, and a run that starts from its model reads the same tokens
    (tmp_path / "tok.json").unlink()
    assert quick_train(recipe=None, data=None, resume=True, steps=3).model is not None
    more = train(out, spec, quick, tmp_path / "more", weights=out)
    assert more.model is not None and more.model.tokenizer == content
    with pytest.raises(StorageError, match="the saved model has another tokenizer than the data"):
        train(out, {**spec, "tokenizer": "bytes"}, quick, tmp_path / "bytes", weights=out)
    # explicitly bytes; as in a run of an earlier version, which is resumed
    quick_train(recipe=recipe, data={**spec, "tokenizer": "bytes"}, steps=1, out="old")
    settings = read_file(tmp_path / "old/train.yaml")
    del settings["data"]["tokenizer"]
    (tmp_path / "old/train.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert quick_train(recipe=None, data=None, resume=True, steps=2, out="old").model is not None


def test_settings_that_a_resumed_run_can_change(
    tiny: dict[str, Any], losses: Any, quick_train: Train, tmp_path: Path
) -> None:
    quick_train(steps=3)
    run = quick_train(recipe=None, data=None, resume=True, steps=5, lr=1e-4)
    assert len(losses(run.history)) == 5
    assert [event.get("changes") for event in run.history if event["event"] == "start"] == [
        None,
        {"steps": 5, "lr": 1e-4},
    ]
    with pytest.raises(tb.RecipeError) as caught:
        quick_train(recipe=None, data=None, resume=True, batch=8, seed=1)
    assert dict(caught.value.problems) == {
        "batch": "the run began with 4 and cannot be resumed with 8",
        "seed": "the run began with 0 and cannot be resumed with 1",
    }
    with pytest.raises(tb.RecipeError, match=r"the run is of .*, not of this one"):
        quick_train(recipe={**tiny, "dim": 32}, data=None, resume=True)
    with pytest.raises(tb.RecipeError, match="the run reads 'copy:length=16' and cannot be resumed with 'mqar'"):
        quick_train(recipe=None, data="mqar", resume=True)


def test_damaged_checkpoint_is_skipped_with_a_warning(losses: Any, quick_train: Train, tmp_path: Path) -> None:
    whole = quick_train(steps=6, checkpoint_every=2)
    checkpoints = CheckpointManager(tmp_path / "run/checkpoints")
    (path,) = checkpoints.path(6).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    run = quick_train(recipe=None, data=None, resume=True)
    (warning,) = (event for event in run.history if event["event"] == "warning")
    assert "damaged: expected" in warning["message"] and "resuming from step 4" in warning["message"]
    assert losses(run.history) == losses(whole.history) and same_weights(run.model, whole.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": {"tokens": 7}}, "expected a checkpoint of step 1, got one of 0"),
        ({"progress": {"stpe": 1}}, "progress.stpe: Unexpected"),
        ({"processes": "two"}, "expected the facts of a run in its index: processes: Input should be a valid integer"),
        ({"progress": {"step": 1, "losses": "abc"}}, "progress.losses: Input should be a valid"),
        ({"progress": {"step": 1, "best": {"loss": 1.0}}}, "progress.best: Value error, expected step"),
        (
            {"progress": {"step": 1, "surprise": {"a": {"mean": 1.0}}}},
            "progress.surprise.a: Value error, expected peak",
        ),
        ({"tensors": [3]}, "tensors.0: Input should be a valid string"),
        ({"fingerprint": "0"}, "it is of another recipe: expected .*, got '0'"),
    ],
)
def test_invalid_checkpoint_facts(quick_train: Train, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    quick_train(steps=1)
    path = tmp_path / "run/checkpoints/step-00000001/checkpoint.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["facts"].update(change)
    del index["checksum"]  # as of earlier versions
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(StorageError, match=message):
        quick_train(recipe=None, data=None, resume=True, steps=2)


def test_unusable_folders(quick_train: Train, tmp_path: Path) -> None:
    quick_train(steps=1)
    with pytest.raises(StorageError, match="this folder has a run; resume it"):
        quick_train(steps=1)
    with pytest.raises(StorageError, match="this folder has no run to resume"):
        quick_train(recipe=None, data=None, resume=True, out="none")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="file/run: cannot be written: Not a directory"):
        quick_train(out="file/run")

    def intrude(event: dict[str, Any]) -> None:
        if event["event"] == "tick":
            with pytest.raises(StorageError, match="another process is training in this folder"):
                quick_train(recipe=None, data=None, resume=True)

    quick_train(recipe=None, data=None, resume=True, steps=2, on_event=intrude)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "cpoy"}, "did you mean 'copy'"),
        ({"data": "copy:vocab=99"}, "the data has 99 tokens, the model only 16"),
        ({"carry": 4}, "no state to carry"),
        ({"stages": [{"steps": 1, "train": ["@mmeory"]}]}, "stages.0.train.0: no block of this type"),
        (
            {
                "stages": [
                    {"steps": 1, "recipe": {f"{MAC}segmnt": 4}},
                    {"steps": 1, "recipe": {f"{MAC}memory.depth": 1}},
                ]
            },
            r"2 problems\n  stages.0.recipe.layers.mac.0.segmnt: unknown field of context; did you mean 'segment'.*\n"
            r"  stages.1.recipe.layers.mac.0.memory.depth: the weights do not fit this change: they are those of 2",
        ),
    ],
)
def test_invalid_run_is_refused_before_anything_is_written(
    quick_train: Train, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(tb.RecipeError, match=message):
        quick_train(**given)
    assert not (tmp_path / "run/run.json").exists()


def test_models_that_cannot_be_trained(quick_train: Train, ordered_text: Any, tiny: dict[str, Any]) -> None:
    with pytest.raises(tb.RecipeError, match="without a vocabulary"):
        quick_train(recipe={**tiny, "vocab": None})
    growing = {**tiny, "vocab": 256, "layers": {"mac": ["attention"]}, "stack": ["mac"]}
    with pytest.raises(tb.RecipeError, match="grows with every token"):
        quick_train(recipe=growing, data=ordered_text)
    assert quick_train(recipe=growing, data=ordered_text, carry="off", out="off").model is not None


@pytest.mark.parametrize("name", ["memory_loss", "write_cost"])
def test_auxiliary_loss_is_logged(losses: Any, quick_train: Train, name: str) -> None:
    plain, run = quick_train(steps=2), quick_train(steps=2, **{name: 0.5}, out="aux")
    assert all(event[name] > 0 for event in run.history if event["event"] == "step")
    assert losses(plain.history)[1] == losses(run.history)[1] and losses(plain.history)[2] != losses(run.history)[2]


def test_compiled_model_trains_the_same(
    tiny: dict[str, Any], quick_train: Train, losses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the eager backend compiles in seconds
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    recipe = {**tiny, "layers": {"lmm": [{"type": "memory", "heads": 2, "chunk": 4}]}, "stack": ["lmm"]}
    options = {"recipe": recipe, "steps": 2, "surprise_every": 2, "valid_every": 2, "valid_batches": 1}
    run = quick_train(**options, compile=True)
    assert losses(run.history) == pytest.approx(losses(quick_train(**options, out="eager").history), rel=1e-5)


def test_only_modules_that_the_caller_allowed_are_imported(
    quick_train: Train, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    (tmp_path / "mine.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    quick_train(steps=1)
    path = tmp_path / "run/recipe.yaml"
    clean = path.read_text(encoding="utf-8")
    (tmp_path / "r.yaml").write_text(clean, encoding="utf-8")
    path.write_text(clean + "imports: [evil]\n", encoding="utf-8")
    allowed = tb.load_recipe({**tiny, "imports": ["mine"]}, allow_imports=True)
    for recipe in (tb.load_recipe(tiny), allowed, tmp_path / "r.yaml", None):
        with pytest.raises(tb.RecipeError, match="the recipe asks to import evil, which runs that code"):
            quick_train(recipe=recipe, data=None, resume=True, steps=2)
    trial = Trial("a", allowed, COPY, as_settings({"steps": 1}), tmp_path / "run")
    with pytest.raises(tb.RecipeError, match="imports: the recipe asks to import evil"):
        check_trial(trial)
    assert main([str(tmp_path / "r.yaml"), "--resume", "--out", str(tmp_path / "run")]) == 2
    path.write_text(clean + "imports: [mine]\n", encoding="utf-8")
    assert quick_train(recipe=allowed, data=None, resume=True, steps=2).model is not None


def test_run_that_was_begun_meanwhile_is_not_replaced(
    quick_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[train.__module__]
    locked = module.locked  # type: ignore[attr-defined]

    def after_another(folder: Path) -> Any:
        monkeypatch.setattr(module, "locked", locked)
        quick_train(steps=1)
        return locked(folder)

    monkeypatch.setattr(module, "locked", after_another)
    with pytest.raises(StorageError, match="this folder has a run; resume it"):
        quick_train(steps=3)
    assert read_file(tmp_path / "run/train.yaml")["steps"] == 1


def test_saved_model_is_not_replaced_by_that_of_a_run(quick_train: Train, tiny: dict[str, Any], tmp_path: Path) -> None:
    tb.save(tb.build(tiny), tmp_path / "run/model")
    with pytest.raises(StorageError, match="a saved model is there, which the model of the run would replace"):
        quick_train(steps=1)


def test_closed_output_ends_the_run_with_a_checkpoint(quick_train: Train, tmp_path: Path, losses: Any) -> None:
    def closed(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError, match="the output was closed; saved after step 2 of 6: titans-train --resume"):
        quick_train(on_event=closed)
    assert CheckpointManager(tmp_path / "run/checkpoints").steps() == [2]
    whole = quick_train(out="whole")
    assert losses(quick_train(recipe=None, data=None, resume=True).history) == losses(whole.history)


def test_data_that_change_end_the_run_with_a_checkpoint(
    quick_train: Train, tiny: dict[str, Any], ordered_text: Any, tmp_path: Path
) -> None:
    text = tmp_path / "document-0.txt"
    before = text.read_bytes()

    def change(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            for path in tmp_path.glob("document-*.txt"):
                path.write_bytes(path.read_bytes() + b"more")

    given = {"recipe": {**tiny, "vocab": 256}, "data": ordered_text, "steps": 20}
    with pytest.raises(tb.RecipeError, match=r"has changed since it was opened[^$]*saved after step 3; titans-train"):
        quick_train(**given, on_event=change)
    assert CheckpointManager(tmp_path / "run/checkpoints").steps() == [3]
    for path in tmp_path.glob("document-*.txt"):
        path.write_bytes(path.read_bytes().removesuffix(b"more"))
    assert text.read_bytes() == before
    assert quick_train(recipe=None, data=None, resume=True, steps=4).model is not None


def test_names_that_are_not_valid_text(quick_train: Train, tiny: dict[str, Any], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    text = tmp_path / f"{name}.txt"
    text.write_text("What was said. " * 40, encoding="utf-8")
    recipe, data = {**tiny, "vocab": 256}, {"text": str(text), "length": 16}
    quick_train(recipe=recipe, data=data, steps=1, valid_every=1, valid_batches=1)
    assert quick_train(recipe=None, data=None, resume=True, steps=2).model is not None
    with pytest.raises(StorageError, match="expected a name in UTF-8"):
        quick_train(recipe=recipe, data=data, steps=1, out=name)


@pytest.mark.parametrize("name", ["log.jsonl", ".lock", "checkpoints/step-00000001/checkpoint.json", "model"])
def test_pipe_in_place_of_a_file_is_refused(quick_train: Train, tmp_path: Path, name: str) -> None:
    quick_train(steps=1)
    path = tmp_path / "run" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(StorageError, match=r"not a regular file|cannot be written: File exists"):
        quick_train(recipe=None, data=None, resume=True, steps=2)

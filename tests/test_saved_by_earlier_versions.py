"""What earlier versions saved is read, and computes the same numbers. ``data/make_saved.py`` made the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import titans_build as tb
from titans_build.huggingface import from_pretrained

SAVED = Path(__file__).parent / "data" / "saved_0_1_0"
EXPECTED = load_file(SAVED / "expected.safetensors")
NUMBERS = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
MODELS = sorted(path.name for path in (SAVED / "models").iterdir() if path.is_dir())
TOKENS = EXPECTED["tokens"]
READ = 13  # tokens that the saved states have read
OTHER_DATA_ORDER: frozenset[str] = frozenset(["ordered", "shuffled", "task"])
"""Runs whose data come in another order since 0.1.0: resuming them has to be refused."""


def expect_equal(actual: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of what was computed then, relative to the largest number."""
    expected = EXPECTED[name]
    torch.testing.assert_close(
        actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written to, which is also the current folder: the runs name their text relative to it."""
    monkeypatch.chdir(shutil.copytree(SAVED, tmp_path / "saved"))
    return tmp_path / "saved"


def test_models_of_every_kind_are_there() -> None:
    assert MODELS == ["bfloat16", "hf", "hybrid", "lmm", "mac", "mag", "mal"]


@pytest.mark.parametrize("name", MODELS)
def test_model_computes_the_same(name: str) -> None:
    model = tb.load(SAVED / "models" / name, dtype=torch.float64)
    with torch.no_grad():
        out = model(TOKENS, targets=TOKENS.roll(-1, 1))
    # the module of transformers computes parts of it in float32
    tolerance = 1e-5 if name == "hf" else 1e-10
    expect_equal(out.logits, f"{name}.logits", tolerance)
    expect_equal(out.loss, f"{name}.loss", tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_state_continues_the_same(name: str) -> None:
    model = tb.load(SAVED / "models" / name)
    assert next(model.parameters()).dtype == (torch.bfloat16 if name == "bfloat16" else torch.float32)
    state = tb.load_state(SAVED / "models" / f"{name}.state.safetensors", model)
    with torch.no_grad():
        out = model(TOKENS[:, READ:], state)
    expect_equal(out.logits, f"{name}.continued", 2**-7 if name == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bfloat16"])
def test_generated_tokens_are_the_same(name: str) -> None:
    model = tb.load(SAVED / "models" / name)
    assert torch.equal(model.generate(TOKENS[:, :READ], max_new_tokens=8).tokens, EXPECTED[f"{name}.generated"])


@pytest.mark.parametrize("name", MODELS)
def test_state_of_today_has_the_names_of_the_saved_one(name: str, tmp_path: Path) -> None:
    model = tb.load(SAVED / "models" / name)
    with torch.no_grad():
        tb.save_state(model(TOKENS[:, :READ]).state, tmp_path / "state", model)
    then, now = load_file(SAVED / "models" / f"{name}.state.safetensors"), load_file(tmp_path / "state")
    assert now.pop("state.document").dtype == torch.int64  # not in states of version 0.1
    assert {key: (value.shape, value.dtype) for key, value in now.items()} == {
        key: (value.shape, value.dtype) for key, value in then.items()
    }


def test_pretrained_model_computes_the_same() -> None:
    model = from_pretrained(SAVED / "pretrained").eval()
    with torch.no_grad():
        expect_equal(model(TOKENS).logits, "pretrained.logits")


def test_swapped_model_computes_the_same() -> None:
    model = from_pretrained(SAVED / "llama").eval()
    with torch.no_grad():
        expect_equal(model(TOKENS).logits, "llama.logits")
        with tb.memory(model) as carried:
            carried.load(SAVED / "llama.state.safetensors")
            expect_equal(model(TOKENS[:, READ:]).logits, "llama.continued")
    answer = model.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(answer, EXPECTED["llama.generated"])


def test_adapter_of_a_swapped_model_computes_the_same() -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(from_pretrained(SAVED / "llama"), SAVED / "adapter").eval()
    with torch.no_grad():
        expect_equal(model(input_ids=TOKENS).logits, "adapter.logits")


def test_swap_record_and_state_dict_compute_the_same() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    tb.swap(network, **json.loads((SAVED / "network.json").read_text(encoding="utf-8")))
    network.load_state_dict(load_file(SAVED / "network.safetensors"))
    with torch.no_grad(), tb.memory(network) as carried:
        carried.load(SAVED / "network.state.safetensors")
        expect_equal(network(EXPECTED["network.x"][:, READ:]), "network.continued")


@pytest.mark.parametrize("name", sorted(NUMBERS["losses"]))
def test_interrupted_run_resumes_to_the_same_losses(name: str, saved: Path) -> None:
    run = saved / "runs" / name
    if name in OTHER_DATA_ORDER:
        with pytest.raises(tb.RecipeError, match=r"run.*begun"):
            tb.train(None, None, None, run, resume=True)
        return
    history = tb.train(None, None, None, run, resume=True).history
    assert [event["step"] for event in history if event["event"] == "start"] == [0, 5]
    losses = {str(event["step"]): event["loss"] for event in history if event["event"] == "step"}
    assert losses == pytest.approx(NUMBERS["losses"][name], rel=1e-9)


def test_finished_comparison_is_not_run_again(saved: Path) -> None:
    events: list[Any] = []
    given = NUMBERS["comparison"]
    found = tb.compare(
        given["recipes"],
        given["data"],
        given["settings"],
        saved / "comparison",
        told=lambda *event: events.append(event),
    )
    assert not events
    expected = json.loads((SAVED / "comparison/comparison.json").read_text(encoding="utf-8"))
    settings = found.pop("settings")  # later versions have more of them
    assert settings == settings | expected.pop("settings") and found == expected


def test_finished_search_is_not_run_again(saved: Path) -> None:
    events: list[Any] = []
    given = NUMBERS["search"]
    found = tb.search(
        given["recipe"],
        given["data"],
        given["settings"],
        given["space"],
        saved / "search",
        told=lambda *event: events.append(event),
    )
    lines = (SAVED / "search/trials.jsonl").read_text(encoding="utf-8").splitlines()
    assert not events
    assert found == sorted(map(json.loads, lines), key=lambda result: result["loss"])
    assert tb.load_recipe(SAVED / "search/best-recipe.yaml").dim == 8

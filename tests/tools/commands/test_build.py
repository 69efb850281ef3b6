"""``titans-build RECIPE``: its table and JSON, saved models, and the smoke test of ``--try``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import titans_build as tb
from titans_build.kernels.cpu_runtime import library
from titans_build.registry import scratch
from titans_build.tools.commands import smoke_test

Run = Callable[..., Any]


def test_the_table_shows_every_part_once(small: Path, titans_build: Run) -> None:
    result = titans_build(small)
    assert result.status == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0] == "small: dim 32, vocab 256, 3 layers (cpu, float32, seed 0)"
    figures = r"  ([\d,.]+[MG]?|-) +([\d,.]+[MG]?|-) +(-|[\d.]+ (B|KiB|MiB))$"
    names = [re.sub(figures, "", line).rstrip() for line in lines[3:-2] if re.search(figures, line)]
    assert names == [
        "embedding",
        "mag ×2",
        "├ persistent",
        "│ └ of: gate",
        "│   ├ branches.0: attention",
        "│   └ branches.1: memory",
        "└ ffn",
        "mac",
        "├ context",
        "│ ├ memory: memory",
        "│ ├ attend: attention",
        "│ └ snapshot, position",
        "└ ffn",
        "norm: rms_norm",
        "head",
        "recipe",
        "total",
    ]
    said = "A part marked ×N occurs N times in the stack; its row shows one. The state does not grow.\n"
    assert result.out.endswith(said)
    assert "marked ×N" not in titans_build("lmm", "--set", "dim=32", "--set", "stack.0.repeat=1").out


def test_costs_allocate_no_weights(titans_build: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tb.recipes, "build", lambda *args, **named: pytest.fail("the model is built"))
    assert "1.30G" in titans_build("mac-1.3b").out


def test_one_layer_is_singular(small: Path, titans_build: Run) -> None:
    words = ["lmm", "--set", "dim=32", "--set", "stack.0.repeat=1"]
    assert "vocab 256, 1 layer, " in titans_build(*words).out
    assert "fine (1 layer, " in titans_build("check", *words).out


def test_a_plain_build_compiles_nothing(small: Path, monkeypatch: pytest.MonkeyPatch, titans_build: Run) -> None:
    def refuse(dtype: torch.dtype) -> str:
        raise AssertionError("the kernels are asked for, and would be built")

    monkeypatch.setattr(library, "_library", refuse)
    for command in ([], ["check"], ["diagram"]):
        assert titans_build(*command, small).status == 0
    assert titans_build("list").status == titans_build("describe", "memory").status == 0
    assert titans_build("schema").status == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_summary_on_the_meta_device_equals_the_model(dtype: str, small: Path, titans_build: Run) -> None:
    report = titans_build(small, "--dtype", dtype, "--json").json
    assert report["totals"]["state_bytes_per_row"] == tb.build(small, dtype=dtype).state_bytes()
    assert report["dtype"] == dtype


def test_a_block_whose_state_needs_values_is_summarized(small: Path, titans_build: Run) -> None:
    with scratch():

        @tb.register("valued")
        class Valued(tb.Block):
            """Its fresh state is a number that only values can give."""

            def __init__(self, dim: int) -> None:
                super().__init__(dim)
                self.size = torch.nn.Parameter(torch.empty(1))

            def reset_parameters(self) -> None:
                torch.nn.init.constant_(self.size, 5)

            def init_state(self, batch_size: int) -> torch.Tensor:
                return torch.zeros(batch_size, int(self.size.item()))

            def forward(self, x, state=None, *, mask=None):  # type: ignore[no-untyped-def]
                return x, self.init_state(x.shape[0]) if state is None else state

        small.write_text("version: 1\ndim: 32\nlayers: {a: [valued]}\nstack: [a]\n", encoding="utf-8")
        result = titans_build(small, "--json")
        assert result.status == 0, result.err
        assert result.json["parts"][0]["state_bytes_per_row"] == 20
        assert titans_build("diagram", small).status == 0


def test_json_adds_up_to_what_the_model_says(small: Path, titans_build: Run) -> None:
    report = titans_build(small, "--json").json
    model = tb.build(tb.load_recipe(small))
    totals, parts = report["totals"], report["parts"]
    assert (
        totals["parameters"]
        == sum(p.numel() for p in model.parameters())
        == sum(p["parameters"] * p["count"] for p in parts)
    )
    assert (
        totals["state_bytes_per_row"]
        == model.state_bytes()
        == sum(p["state_bytes_per_row"] * p["count"] for p in parts)
    )
    assert totals["flops_per_token"] * totals["flops_length"] == pytest.approx(model.flops(totals["flops_length"]))
    assert totals["state_grows"] is False
    assert report["recipe"]["fingerprint"] == tb.load_recipe(small).fingerprint


def test_changed_values_are_shown_and_recorded(small: Path, tmp_path: Path, titans_build: Run) -> None:
    out = tmp_path / "model"
    words = ["--set", "layers.mac.0.segment=8", "--set", "tie=true", "--seed", "3", "--dtype", "bfloat16", "--out", out]
    result = titans_build(small, *words)
    assert result.status == 0
    assert "layers.mac.0.segment = 8" in result.out and "seed 3" in result.out and f"saved to {out}" in result.out
    model = tb.load(out)
    assert model.recipe.overrides == {"layers.mac.0.segment": 8, "tie": True}
    same = tb.build(tb.load_recipe(small, {"layers.mac.0.segment": 8, "tie": True}), dtype=torch.bfloat16, seed=3)
    ours = dict(same.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[name])


@pytest.fixture
def saved(small: Path, tmp_path: Path, titans_build: Run) -> Path:
    """A model with weights that no seed gives, in bfloat16."""
    folder = tmp_path / "saved"
    model = tb.build(small, dtype="bfloat16", seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    tb.save(model, folder)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    theirs = dict(tb.load(b).named_parameters())
    return all(torch.equal(parameter, theirs[name]) for name, parameter in tb.load(a).named_parameters())


def test_a_saved_model_keeps_its_weights(saved: Path, tmp_path: Path, titans_build: Run) -> None:
    result = titans_build(saved, "--out", tmp_path / "copy")
    assert result.status == 0 and f"(cpu, bfloat16, weights of {saved})" in result.out
    assert same_weights(saved, tmp_path / "copy")
    report = titans_build(saved, "--json").json
    assert report["weights"] == str(saved) and report["seed"] is None and report["dtype"] == "bfloat16"
    assert titans_build(saved, "--json", "--dtype", "float64").json["dtype"] == "float64"
    assert report["recipe"]["fingerprint"] == tb.load(saved).recipe.fingerprint


def test_a_seed_draws_fresh_weights(saved: Path, small: Path, tmp_path: Path, titans_build: Run) -> None:
    result = titans_build(saved, "--seed", "5", "--out", tmp_path / "fresh", "--json")
    assert result.json["weights"] is None and result.json["seed"] == 5 and result.json["dtype"] == "float32"
    ours = dict(tb.build(small, seed=5).named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in tb.load(tmp_path / "fresh").named_parameters())


def test_a_saved_model_is_tried_with_its_weights(saved: Path, small: Path, text: Path, titans_build: Run) -> None:
    trained = tb.load(saved, dtype="float32")
    batch = torch.tensor(list(text.read_bytes()[: 4 * 257])).view(4, 257)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        trained(batch[:, :-1], targets=batch[:, 1:]).loss.backward()
        optimizer.step()
    tb.save(trained, saved)
    before = titans_build(saved, "--try", text, "--json").json["try"]["bits_before"]
    fresh = titans_build(saved, "--try", text, "--seed", "0", "--json").json["try"]["bits_before"]
    assert before < fresh - 2


def test_overrides_that_saved_weights_do_not_fit_are_refused(saved: Path, titans_build: Run) -> None:
    assert titans_build(saved, "--set", "layers.mac.0.segment=8").status == 0
    result = titans_build(saved, "--set", "layers.mac.0.memory.depth=3")
    assert result.status == 2 and result.out == ""
    assert "layers.mac.0.memory.depth: the weights do not fit" in result.err and "--seed N" in result.err
    assert titans_build(saved, "--set", "layers.mac.0.memory.depth=3", "--seed", "0").status == 0


def test_a_saved_model_is_replaced_only_when_asked(saved: Path, small: Path, titans_build: Run) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    result = titans_build(small, "--out", saved)
    assert result.status == 2 and result.out == ""
    assert f"--out {saved}: a saved model is there; --force replaces it" in result.err
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert titans_build(small, "--out", saved, "--force").status == 0
    assert tb.load(saved).recipe.fingerprint == tb.load_recipe(small).fingerprint
    assert len(list(saved.iterdir())) == 2 and not set(before) >= {path.name for path in saved.iterdir()}
    # other files are no model: nothing of theirs is touched
    result = titans_build(small, "--out", small.parent)
    assert result.status == 0 and small.exists()


def test_a_closed_pipe_does_not_lose_the_saved_model(small: Path, tmp_path: Path, in_process: Any) -> None:
    out = tmp_path / "model"
    assert in_process("cli", small, "--out", out, reader="head -c 1")[0].status == 0
    assert tb.load(out).recipe.name == "small"


def test_growing_state_is_marked(titans_build: Run) -> None:
    words = ["transformer", "--set", "dim=32", "--set", "layers.plain.0.window=null"]
    result = titans_build(*words)
    assert "State marked + grows" in result.out
    assert titans_build(*words, "--json").json["totals"]["state_grows"] is True


def test_a_model_without_a_vocabulary(titans_build: Run) -> None:
    result = titans_build("lmm", "--set", "dim=32", "--set", "vocab=null")
    assert result.status == 0
    assert "vectors in, vectors out" in result.out and "embedding" not in result.out


def test_try_on_text(small: Path, text: Path, tmp_path: Path, titans_build: Run) -> None:
    out = tmp_path / "model"
    result = titans_build(small, "--try", text, "--out", out, "--json")
    assert result.status == 0, result.err
    trial = result.json["try"]
    assert trial["bits_after"] < trial["bits_before"] < 9
    assert trial["learns"] and trial["streams"] and trial["difference"] <= trial["allowed"]
    assert trial["difference_float64"] < 1e-6
    assert sum(trial["cuts"]) == 384 and 1 in trial["cuts"] and len(set(trial["cuts"])) > 3
    assert trial["prefill"] > 0 and trial["decode"] > 0 and trial["generated"]
    # the weights that --try trained are not saved
    fresh = dict(tb.build(tb.load_recipe(small)).named_parameters())
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in tb.load(out).named_parameters())


def test_try_prints_its_results(small: Path, text: Path, titans_build: Run) -> None:
    result = titans_build(small, "--try", text)
    assert result.status == 0 and result.err == ""
    found = {line.split()[0] for line in result.out.splitlines() if line}
    assert {"text", "learns", "streams", "speed", "says"} <= found
    # a line before each part that takes long
    assert {"training", "reading", "the", "generating"} <= found
    assert "bits per byte after 6 steps" in result.out and result.out.count("  ok") == 2


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_try_in_every_dtype(dtype: str, small: Path, text: Path, titans_build: Run) -> None:
    result = titans_build(small, "--try", text, "--dtype", dtype, "--json")
    assert result.status == 0, result.err
    assert result.json["try"]["learns"]


@pytest.mark.parametrize("size", [8, 9, 100])
def test_try_on_short_text(size: int, small: Path, tmp_path: Path, titans_build: Run) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(range(200, 200 + min(size, 50))) * 2)
    path.write_bytes(path.read_bytes()[:size])
    result = titans_build(small, "--try", path, "--json")
    assert result.status == 0, result.err
    assert result.json["try"]["bytes_read"] == size


def test_try_on_a_named_pipe_is_refused(small: Path, tmp_path: Path, titans_build: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = titans_build(small, "--try", tmp_path / "pipe")
    assert result.status == 2 and "--try" in result.err and "a named pipe; expected a file" in result.err


def test_try_on_too_little_text_is_refused(small: Path, tmp_path: Path, titans_build: Run) -> None:
    path = tmp_path / "tiny.txt"
    path.write_bytes(b"")
    result = titans_build(small, "--try", path)
    assert result.status == 2 and "0 bytes are too few" in result.err


def test_a_model_that_streams_wrongly_fails(small: Path, text: Path, titans_build: Run) -> None:
    with scratch():

        @tb.register("forgetful")
        class Forgetful(tb.Block):
            """A running mean that starts anew with every call: it has no state to carry."""

            def forward(self, x, state=None, *, mask=None):  # type: ignore[no-untyped-def]
                return x.cumsum(dim=1), None

        small.write_text(
            "version: 1\ndim: 32\nvocab: 256\nlayers: {a: [forgetful, ffn]}\nstack: [a]\n", encoding="utf-8"
        )
        result = titans_build(small, "--try", text)
        assert result.status == 1
        assert "streaming differs from one pass" in result.err and "WRONG" in result.out
        report = titans_build(small, "--try", text, "--json")
        assert report.status == 1
        assert report.json["try"]["streams"] is False


def test_a_folder_that_cannot_be_written_is_refused_early(small: Path, tmp_path: Path, titans_build: Run) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    result = titans_build(small, "--out", tmp_path / "taken")
    assert result.status == 2 and result.out == ""
    assert "taken is a file, not a folder" in result.err


def test_try_that_needs_too_much_memory_is_refused(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, titans_build: Run
) -> None:
    monkeypatch.setenv("TITANS_BUILD_BACKEND", "reference")
    monkeypatch.setattr(smoke_test, "machine_memory", lambda: 2**26)
    result = titans_build(small, "--try", text)
    assert result.status == 2 and result.out == ""
    assert "--try takes at least" in result.err and "this machine has 0.1 GiB" in result.err
    assert "TITANS_BUILD_BACKEND=reference,memory=torch" in result.err


def test_try_that_needs_most_of_the_memory_gives_a_warning(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, titans_build: Run
) -> None:
    need = 16 * sum(p.numel() for p in tb.build(small).parameters())
    monkeypatch.setattr(smoke_test, "machine_memory", lambda: need * 3 // 2)
    result = titans_build(small, "--try", text)
    assert result.status == 0 and "titans-build: warning: --try takes at least" in result.err
    monkeypatch.setattr(smoke_test, "machine_memory", lambda: need * 3)
    assert titans_build(small, "--try", text).err == ""

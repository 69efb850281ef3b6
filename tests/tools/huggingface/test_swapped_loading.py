"""Swapped models in folders: read back with their swaps, and refused by readers that do not know of swaps."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import titans_build as tb
from titans_build.huggingface import from_pretrained
from titans_build.recipes import StorageError
from titans_build.tools.swapping import SwapError, swaps
from titans_build.tools.swapping.config_record import FIELDS

HOWS = {"beside": ("beside",), "replaced": ("replace",), "both": ("before", "replace")}


@pytest.mark.parametrize("how", HOWS)
def test_save_and_load(family: Any, tokens: Tensor, tmp_path: Path, how: str) -> None:
    model = family.swapped(*HOWS[how])
    model.save_pretrained(tmp_path)
    for again in (from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(again) is type(model) and not again.training
        for (name, mine), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(mine, other), name
        with torch.no_grad():
            assert_close(again(tokens).logits, model(tokens).logits)
        assert [plan.record for plan in swaps(again)] == [plan.record for plan in swaps(model)]
        assert again.config.to_diff_dict() == model.config.to_diff_dict()
    # and once more, from what was read
    again.save_pretrained(tmp_path / "again")
    third = from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert third.dtype == torch.float32
    with torch.no_grad():
        assert_close(third.to("cpu")(tokens).logits, model(tokens).logits.float(), atol=1e-4, rtol=1e-4)


def test_readers_that_do_not_know_of_swaps_fail(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path)
    code = f"""
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "has model type `titans_build_swapped` but Transformers does not recognize this" in done.stdout
    with pytest.raises(AttributeError, match=r"this model has swaps in it: read it with titans_build\.huggingface"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(tmp_path)


def test_replaced_modules_are_not_saved(llama: Any, tmp_path: Path) -> None:
    model = llama.swapped("beside", "replace")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    with pytest.raises(SwapError, match="the replaced module was not saved with this model"):
        tb.unswap(again)
    # what stood beside others goes
    llama.swapped("beside").save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    tb.unswap(again)
    assert type(again.config).__name__ == "LlamaConfig"
    for (name, mine), (_, other) in zip(again.named_parameters(), llama.plain().named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_frozen_parameters_stay_frozen(llama: Any, tmp_path: Path) -> None:
    model = llama.plain()
    tb.swap(model, llama.attention, {"type": "memory", "heads": 2}, "beside", train="memory")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".titans." in name for name in trained)


def test_copies_of_the_config(llama: Any, tmp_path: Path) -> None:
    model = llama.swapped("beside")
    for config in (copy.deepcopy(model).config, copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert isinstance(config, type(llama.config()))
        assert config.to_dict() == model.config.to_dict()
        assert type(config) is type(model.config)
    model.save_pretrained(tmp_path / "swapped")
    read = type(model.config).from_pretrained(tmp_path / "swapped")
    assert type(read) is type(model.config) and read.hidden_size == 16
    llama.plain().save_pretrained(tmp_path / "plain")
    assert type(type(model.config).from_pretrained(tmp_path / "plain")).__name__ == "LlamaConfig"
    assert model.config.model_type == "llama"
    assert "_titans_build_swaps" not in model.config.to_dict()


def test_another_model_of_the_same_config_is_unchanged(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    config = llama.config()
    swapped, plain = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    tb.swap(swapped, llama.attention, "memory", "beside")
    assert type(config) is type(plain.config) is type(llama.config())
    swapped.save_pretrained(tmp_path / "swapped")
    from_pretrained(tmp_path / "swapped")  # from here on the Auto classes know of configurations with swaps
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(again.config) is type(config) and not swaps(again)
    assert_close(again(tokens).logits, plain.eval()(tokens).logits)
    assert not swaps(AutoModelForCausalLM.from_config(config))
    # all parts of a model look at one configuration, still
    swapped.config.use_cache = False
    assert swapped(tokens).past_key_values is None


def test_swaps_without_a_record_are_not_saved(llama: Any, tmp_path: Path) -> None:
    model = llama.plain()
    tb.swap(model, llama.attention, tb.build_block("memory", dim=16), "beside")
    with pytest.raises(SwapError, match=r"save_pretrained: the block \(NeuralMemory\) was given as a module"):
        model.save_pretrained(tmp_path)
    model = llama.plain()
    tb.swap(model.model, "layers.*.self_attn", "memory", "beside")
    with pytest.raises(SwapError, match="the LlamaModel that is part of this LlamaForCausalLM: swap into the whole"):
        model.save_pretrained(tmp_path)


def test_damaged_folders_are_refused(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert set(written) == {"model_type", "architectures", "dtype", "titans_build", "config"}

    def changed(**changes: Any) -> None:
        file.write_text(json.dumps(written | {"titans_build": written["titans_build"] | changes}))

    changed(version=2)
    with pytest.raises(StorageError, match="a later one needs a later titans-build"):
        from_pretrained(tmp_path)
    changed(into="lama")
    with pytest.raises(StorageError, match=r"'lama' .* which this transformers does not have"):
        from_pretrained(tmp_path)
    changed(swaps=None)
    with pytest.raises(StorageError, match="expected the swaps of a titans_build_swapped model"):
        from_pretrained(tmp_path)
    changed(swaps=[])
    with pytest.raises(StorageError, match=r"titans.* is not part of the model"):
        from_pretrained(tmp_path)
    swap = written["titans_build"]["swaps"][0]
    assert set(swap) == set(FIELDS)
    changed(swaps=[swap | {"block": {"type": "memroy"}}])
    with pytest.raises(SwapError, match="memory"):
        from_pretrained(tmp_path)
    for odd in ({**swap, "dry_run": True}, {"where": "*"}, "all"):
        changed(swaps=[odd])
        with pytest.raises(StorageError, match="swaps: expected each with the keys where, block, how"):
            from_pretrained(tmp_path)
    first = swap["where"][0]
    changed(swaps=[swap | {"where": [first]}])
    with pytest.raises(SwapError, match=r"dim: 'model\.layers\.1\.self_attn' is no module of this swap"):
        from_pretrained(tmp_path)
    changed(swaps=[swap | {"where": [first], "dim": {first: swap["dim"][first]}}])
    with pytest.raises(StorageError, match=r"layers\.1\.self_attn\.titans.* is not part of the model"):
        from_pretrained(tmp_path)


def test_trainer_checkpoints_hold_the_swap(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = llama.plain(torch.float32)
    tb.swap(model, llama.attention, {"type": "memory", "heads": 2, "chunk": 4}, "beside", train="memory")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=3, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=3, gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < first
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(".titans." in name for name in moved)
    again = from_pretrained(tmp_path / "checkpoint-3")
    with torch.no_grad():
        assert_close(again(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)

"""Swapped models in folders: read back with their swaps, and refused by readers that do not know of swaps."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import titans_build as tb
from titans_build.huggingface import from_pretrained
from titans_build.recipes import StorageError
from titans_build.tools.swapping import SwapError, swaps
from titans_build.tools.swapping.plan import FIELDS

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


def test_a_process_without_the_library_is_told_what_to_import(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Unknown quantization type, got titans_build.huggingface" in done.stderr
    assert "UNEXPECTED" in done.stderr


SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SOUND = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
SOUND |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
PARTS = {
    "text_config": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0},
    "vision_config": {"model_type": "clip_vision_model", **SMALL, **IMAGE},
}
PIXELS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 39, (2, 9), generator=torch.Generator().manual_seed(0))
HEADS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    name: ("Llama", name, {}, "model.layers.*.self_attn", {"input_ids": IDS})
    for name in ("ForSequenceClassification", "ForTokenClassification")
} | {
    "ForQuestionAnswering": ("Llama", "ForQuestionAnswering", {}, "transformer.layers.*.self_attn", {"input_ids": IDS}),
    "Model": ("Llama", "Model", {}, "layers.*.self_attn", {"input_ids": IDS}),
    "DoubleHeads": ("GPT2", "DoubleHeadsModel", {"n_embd": 16, "n_head": 4, "n_layer": 2}, "transformer.h.*.attn",
                    {"input_ids": IDS.unsqueeze(1)}),
    "Bert": ("Bert", "ForSequenceClassification", {}, "bert.encoder.layer.*.attention", {"input_ids": IDS}),
    "ViT": ("ViT", "ForImageClassification", IMAGE, "vit.layers.*.attention", {"pixel_values": PIXELS}),
    "Wav2Vec2": ("Wav2Vec2", "ForCTC", SOUND, "wav2vec2.encoder.layers.*.attention",
                 {"input_values": torch.rand(2, 200, generator=torch.Generator().manual_seed(0))}),
    "Llava": ("Llava", "ForConditionalGeneration", {**PARTS, "image_token_index": 39},
              "model.language_model.layers.*.self_attn", {"input_ids": IDS}),
}  # fmt: skip


@pytest.mark.parametrize("tower", ["clip_vision_model", "vit", "dinov2"])
def test_a_swap_in_a_vision_tower_is_saved_with_the_whole(tower: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"model_type": tower, **SMALL, **IMAGE}
    config = transformers.LlavaConfig(**PARTS | {"vision_config": vision}, image_token_index=39)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    part = model.model.vision_tower
    where = next(
        name for name, _ in part.named_modules() if name.endswith("layers.0" if tower != "dinov2" else "layer.0")
    )
    tb.swap(part, where, "memory", "beside", gate=0.5)
    shown = repr(model.config)
    assert "titans" not in shown + model.config.to_json_string() + str(copy.deepcopy(model.config).to_dict())
    for number, outer in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        outer.save_pretrained(tmp_path / f"{number}")
        assert "titans" not in repr(outer.config)
        again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / f"{number}").eval()
        assert_close(again.model.vision_tower(PIXELS)[0], part(PIXELS)[0])
        assert swaps(again)[0].paths == [f"model.vision_tower.{where}"]
    for inner in (part, copy.deepcopy(part), again.model.vision_tower):  # and alone
        inner.save_pretrained(tmp_path / "tower")
        assert_close(AutoModel.from_pretrained(tmp_path / "tower").eval()(PIXELS)[0], part(PIXELS)[0])
    tb.unswap(part)
    model.save_pretrained(tmp_path / "plain")
    assert not swaps(from_pretrained(tmp_path / "plain"))


def test_swaps_in_parts_and_in_the_whole_are_saved_together(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = llama.plain()
    tb.swap(model.model.layers, "0.self_attn", "memory", "beside", gate=0.5)  # a part that is no model of transformers
    tb.swap(model.get_decoder(), "layers.1.self_attn", "memory", "after", gate=0.5)
    tb.swap(model, "model.layers.1.mlp", "memory", "beside", gate=0.5)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert len(swaps(again)) == 3
    assert_close(again(tokens).logits, model(tokens).logits)
    with pytest.raises(SwapError, match="continuous batching"):
        model.init_continuous_batching()
    model.model.save_pretrained(tmp_path / "part")
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "part").model(tokens)[0], model.model(tokens)[0])
    # at one module, in the order in which they were made
    tb.swap(model, "model.layers.*.self_attn", "memory", "replace")
    tb.swap(model.model.layers, "0.self_attn", "memory", "beside", gate=0.5)
    for saved, path in ((model, "both"), (model.model, "its part")):
        saved.save_pretrained(tmp_path / path)
        again = from_pretrained(tmp_path / path).to(model.dtype)
        assert_close(again(tokens)[0], saved(tokens)[0])
    assert [plan.how for plan in swaps(again)] == ["beside", "after", "beside", "replace", "beside"]


@pytest.mark.slow
def test_a_model_that_was_unpickled_in_a_new_process_saves_its_swaps(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(pickle.dumps(llama.swapped("beside")))
    code = f"import pickle; pickle.load(open({str(tmp_path / 'model')!r}, 'rb')).save_pretrained({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert swaps(from_pretrained(tmp_path))


def test_a_swapped_model_that_is_put_into_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = transformers.ViTModel(transformers.ViTConfig(**SMALL, **IMAGE))
    text = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=40))
    for part in (vision, text):
        tb.swap(part, "**.*.attention", {"type": "memory", "heads": 2}, "beside", gate=0.5)
    both = transformers.VisionTextDualEncoderModel(vision_model=vision, text_model=text).eval()
    both.save_pretrained(tmp_path)
    again = transformers.VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    for got, expected in zip(again(IDS, PIXELS)[:4], both(IDS, PIXELS)[:4], strict=True):
        assert_close(got, expected)


def test_a_plain_model_made_with_the_configuration_of_a_swapped_one(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path / "swapped")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "swapped"))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(StorageError, match=r"no block at all.*del model.config.quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    del plain.config.quantization_config
    plain.save_pretrained(tmp_path / "plain")
    assert not any("titans" in name for name in from_pretrained(tmp_path / "plain").state_dict())


@pytest.mark.parametrize("how", ["beside", "replace"])
@pytest.mark.parametrize("head", HEADS)
def test_any_class_is_read_back(head: str, how: str, tmp_path: Path) -> None:
    name, kind, values, where, inputs = HEADS[head]
    kept = {} if name == "GPT2" else {**SMALL, **({"pad_token_id": 0} if name == "Llama" else {})}
    torch.manual_seed(0)
    plain = getattr(transformers, f"{name}Config")(vocab_size=40, **(kept | values))
    model = getattr(transformers, name + kind)(plain).eval()
    tb.swap(model, where, {"type": "memory", "heads": 2, "chunk": 4}, how, **({"gate": 0.5} if how == "beside" else {}))
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert type(model.config) is type(plain)
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.to_dict().keys() >= before.keys()
    config = copy.deepcopy(model.config)
    for again in (
        from_pretrained(tmp_path),
        from_pretrained(tmp_path, config=config),
        type(model).from_pretrained(tmp_path),
    ):
        assert type(again) is type(model)
        assert "quantization_config" not in again.config.to_dict()
        with torch.no_grad():
            for got, expected in zip(again(**inputs).to_tuple(), model(**inputs).to_tuple()):
                if isinstance(got, Tensor):
                    assert_close(got, expected)


def test_swaps_follow_the_weights_to_another_head_and_out_of_a_part(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = llama.swapped("beside")
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert swaps(body)[0].paths == ["layers.0.self_attn", "layers.1.self_attn"]
    assert_close(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=2)
    assert_close(judge.model(tokens).last_hidden_state, body(tokens).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert_close(again.model(tokens).last_hidden_state, body(tokens).last_hidden_state)
    # a swap in a part of a model is saved with the whole
    whole = llama.plain()
    tb.swap(whole.get_decoder(), "layers.*.self_attn", "memory", "beside", gate=0.5)
    whole.save_pretrained(tmp_path / "part")
    assert_close(from_pretrained(tmp_path / "part")(tokens).logits, whole(tokens).logits)


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


def test_the_config_is_that_of_the_model_without_swaps(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    config = llama.config()
    swapped, plain = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    before = config.to_dict()
    tb.swap(swapped, llama.attention, "memory", "beside")
    swapped.save_pretrained(tmp_path / "swapped")
    again = from_pretrained(tmp_path / "swapped")
    for other in (swapped.config, again.config, copy.deepcopy(again).config, pickle.loads(pickle.dumps(again.config))):
        assert type(other) is type(config) and other.dtype in (torch.float32, "float32")
        same = {name for name, value in other.to_dict().items() if value == before.get(name)}
        assert before.keys() - same <= {"dtype", "architectures", "_name_or_path"}
        made = AutoModelForCausalLM.from_config(copy.deepcopy(other)).eval()
        assert not swaps(made)
        made.save_pretrained(tmp_path / "made")
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "made")(tokens).logits, made(tokens).logits)
    plain.save_pretrained(tmp_path / "plain")
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens).logits, plain(tokens).logits)
    # copies of a model save their own swaps
    twin = copy.deepcopy(again)
    tb.unswap(again)
    again.save_pretrained(tmp_path / "again")
    assert not swaps(from_pretrained(tmp_path / "again"))
    twin.save_pretrained(tmp_path / "twin")
    assert_close(from_pretrained(tmp_path / "twin")(tokens).logits, twin(tokens).logits)
    pickle.loads(pickle.dumps(twin)).save_pretrained(tmp_path / "pickled")
    assert swaps(from_pretrained(tmp_path / "pickled"))


def test_a_config_with_swaps_and_weights_without(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path / "swapped")
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "swapped"))
    assert not swaps(made)
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(StorageError, match=r"titans.* is missing in 2 of 2 places"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")


def test_swaps_without_a_record_are_not_saved(llama: Any, tmp_path: Path) -> None:
    model = llama.plain()
    tb.swap(model, llama.attention, tb.build_block("memory", dim=16), "beside")
    with pytest.raises(SwapError, match=r"save_pretrained: the block \(NeuralMemory\) was given as a module"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = llama.plain()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    tb.swap(model, llama.attention, "memory", "beside")
    with pytest.raises(SwapError, match="a quantized model is not saved with its memories"):
        model.save_pretrained(tmp_path)


def test_damaged_folders_are_refused(llama: Any, tmp_path: Path) -> None:
    llama.swapped("beside").save_pretrained(tmp_path)
    with pytest.raises(SwapError, match=r"not quantized when it is loaded: .* tb.save_swaps"):
        from_pretrained(tmp_path, quantization_config=transformers.QuantoConfig(weights="int8"))
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    assert written["model_type"] == "llama" and written["dtype"] == "float64"
    file.write_text(json.dumps({name: value for name, value in written.items() if name != "quantization_config"}))
    with pytest.raises(StorageError, match=r"titans.* is not part of the model"):
        from_pretrained(tmp_path)

    def changed(**changes: Any) -> None:
        file.write_text(json.dumps(written | {"quantization_config": written["quantization_config"] | changes}))

    changed(version=2)
    with pytest.raises(StorageError, match="a later one needs a later titans-build"):
        from_pretrained(tmp_path)
    changed(swaps=None)
    with pytest.raises(StorageError, match="expected the swaps of a model"):
        from_pretrained(tmp_path)
    changed(swaps=[])
    with pytest.raises(StorageError, match=r"titans.* is not part of the model"):
        from_pretrained(tmp_path)
    swap = written["quantization_config"]["swaps"][0]
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
    with pytest.raises(StorageError, match=r"titans\.block\.controls\.bias is not part of the model"):
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
    assert json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        assert_close(again(tokens).logits, model.eval()(tokens).logits, atol=1e-5, rtol=1e-5)


def test_trainer_resumes_and_loads_its_best_model(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    def run(resume: bool | None) -> Any:
        model = llama.plain(torch.float32)
        tb.swap(model, llama.attention, {"type": "memory", "heads": 2, "chunk": 4}, "beside", gate=0.5)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
            report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 4
        return model.eval()

    once = run(None)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for (name, mine), (_, other) in zip(once.named_parameters(), run(True).named_parameters(), strict=True):
        assert_close(mine, other, msg=name)

"""Make ``saved_0_1_0``: small files of each kind that titans-build saves, with the numbers that belong to them.

    PYTHONPATH=FOLDER_WITH_THE_VERSION python tests/data/make_saved.py tests/data/saved_0_1_0

It was run with version 0.1.0 at commit 49e33c1 (Python 3.11, torch 2.13, transformers 5.23). A later version makes a
folder of its own: what an earlier version saved is never made again. It uses public names only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import titans_build as tb
from titans_build.huggingface import as_pretrained

READ, TIME = 13, 24  # a state after 13 tokens is inside of a segment of 8 and of a chunk of 4
MEMORY = {"type": "memory", "heads": 2, "chunk": 4, "expansion": 2}
CONTEXT = {
    "type": "context",
    "segment": 8,
    "persistent": 2,
    "memory": MEMORY,
    "attend": {"type": "attention", "heads": 2},
}
ATTENTION = {"type": "attention", "heads": 2, "window": 8}
LAYERS: dict[str, Any] = {
    "mac": [CONTEXT, "ffn"],
    "mag": [{"type": "persistent", "tokens": 2, "of": {"type": "gate", "branches": [ATTENTION, MEMORY]}}, "ffn"],
    "mal": [{"type": "persistent", "tokens": 2, "of": [MEMORY, ATTENTION]}, "ffn"],
    "lmm": [MEMORY, "ffn"],
    "delta": [{**MEMORY, "depth": 1, "chunk": 1, "activation": "identity", "norm": False, "momentum": False}, "ffn"],
    "full": [{"type": "attention", "heads": 2, "kv_heads": 1}, "ffn"],
    "hf": [{"type": "hf_gated_deltanet", "heads": 2, "key_dim": 8, "value_dim": 8}, "ffn"],
}
STACKS = {name: [name] for name in ("mac", "mag", "mal", "lmm", "hf")} | {"hybrid": ["delta", "mag", "mac", "full"]}


def recipe(*stack: str, dim: int = 16, vocab: int = 64) -> dict[str, Any]:
    """A small recipe with these layers."""
    layers = {name: LAYERS[name] for name in stack}
    return {"version": 1, "dim": dim, "vocab": vocab, "layers": layers, "stack": list(stack)}


SETTINGS = {"steps": 12, "batch": 4, "log_every": 1, "tensorboard": False, "keep": 1, "lr": 0.01}
RUN = {**SETTINGS, "dtype": "float64", "surprise_every": 5}
TEXT = {"text": ["text/document-*.txt"], "length": 16, "valid": 0.2}
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # name: (recipe, data, settings)
    "task": (recipe("mac", dim=8, vocab=16), "copy:length=16", {"valid_every": 4, "valid_batches": 2}),
    "ordered": (
        recipe("mag", dim=4, vocab=256),
        {**TEXT, "documents": "ordered"},
        {"valid_every": None, "carry": 2, "ema": 0.9},
    ),
    "shuffled": (
        recipe("lmm", dim=4, vocab=256),
        {**TEXT, "documents": "shuffled"},
        {"valid_every": None, "accumulate": 2},
    ),
}
COMPARED = {"mac": recipe("mac", dim=8, vocab=16), "lmm": recipe("lmm", dim=8, vocab=16)}
SPACE = {"train": {"lr": [0.001, 0.01]}}
TRIED = {**SETTINGS, "steps": 2, "valid_every": 2, "valid_batches": 1, "surprise_every": None}


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(64, (rows, TIME), generator=torch.Generator().manual_seed(rows))


def save_models(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Models of recipes, their states, and what they compute from them."""
    for name, dtype in [*((name, torch.float32) for name in STACKS), ("bfloat16", torch.bfloat16)]:
        model = tb.build(recipe(*STACKS.get(name, ["mac"])), dtype=dtype, seed=0)
        read = tokens()
        with torch.no_grad():
            for parameter in model.parameters():  # also those that begin as zeros
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            state = model(read[:, :READ]).state
            expected[f"{name}.continued"] = model(read[:, READ:], state).logits.float()
        tb.save(model, folder / "models" / name)
        tb.save_state(state, folder / "models" / f"{name}.state.safetensors", model)
        expected[f"{name}.generated"] = model.generate(read[:, :READ], max_new_tokens=8).tokens
        with torch.no_grad():
            out = model.double()(read, targets=read.roll(-1, 1))
        expected[f"{name}.logits"], expected[f"{name}.loss"] = out.logits, out.loss


def llama() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, eos_token_id=None)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def save_swapped(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """A Llama with a memory beside one attention and in the place of the other, a LoRA adapter, and their state."""
    from peft import LoraConfig, get_peft_model

    model, read = llama(), tokens()
    tb.swap(model, "model.layers.0.self_attn", MEMORY, "beside", gate=0.5, train="memory")
    tb.swap(model, "model.layers.1.self_attn", MEMORY, "replace")
    with torch.no_grad(), tb.memory(model) as carried:
        model(read[:, :READ])
        carried.save(folder / "llama.state.safetensors")
        expected["llama.continued"] = model(read[:, READ:]).logits
    expected["llama.logits"] = model(read).logits.detach()
    expected["llama.generated"] = model.generate(read, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.save_pretrained(folder / "llama")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["titans"]))
    with torch.no_grad():
        for parameter in (parameter for parameter in lora.parameters() if parameter.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        expected["adapter.logits"] = lora(input_ids=read).logits
    lora.save_pretrained(folder / "adapter")

    # a network of one's own: a state dict, and the record of the swap
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    plan = tb.swap(network, ["0", "2"], MEMORY, "after", dim=8, gate=0.5)
    x = torch.randn(2, TIME, 8)
    (folder / "network.json").write_text(json.dumps(plan.record, indent=1) + "\n", encoding="utf-8")
    save_file(network.state_dict(), folder / "network.safetensors")
    with torch.no_grad(), tb.memory(network) as carried:
        network(x[:, :READ])
        carried.save(folder / "network.state.safetensors")
        expected["network.x"], expected["network.continued"] = x, network(x[:, READ:])


def save_runs(folder: Path, scratch: Path) -> dict[str, Any]:
    """Runs that were interrupted, a comparison and a search; returns what they come to when they go on."""
    (folder / "text").mkdir()
    for number in range(6):
        lines = "".join(f"{number}: line {line} of a text that goes on. " for line in range(20 + number))
        (folder / f"text/document-{number}.txt").write_text(lines, encoding="utf-8")
    os.chdir(folder)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C: saves a checkpoint and raises KeyboardInterrupt

    losses: dict[str, Any] = {}
    for name, (made_of, data, more) in RUNS.items():
        whole = tb.train(made_of, data, {**RUN, **more}, scratch / name)
        losses[name] = {event["step"]: event["loss"] for event in whole.history if event["event"] == "step"}
        try:
            tb.train(made_of, data, {**RUN, **more}, Path("runs") / name, on_event=interrupt)
        except KeyboardInterrupt:
            pass
        else:
            raise RuntimeError(f"{name}: the run was not interrupted")
    tb.compare(COMPARED, "copy:length=16", TRIED, "comparison")
    tb.search(COMPARED["lmm"], "copy:length=16", TRIED, SPACE, "search")
    for extra in [*folder.rglob(".lock"), *folder.rglob("*.png"), *folder.rglob("*.svg"), folder / "adapter/README.md"]:
        extra.unlink()
    for file in folder.rglob("run.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        run["versions"]["platform"] = "Linux-x86_64"
        file.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    for extra in [folder / "comparison", folder / "search"]:
        for checkpoints in extra.rglob("checkpoints"):
            shutil.rmtree(checkpoints)
    return losses


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    scratch = folder.with_name("scratch")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "models").mkdir(parents=True)
    torch.set_num_threads(1)
    expected: dict[str, torch.Tensor] = {}
    save_models(folder, expected)
    save_swapped(folder, expected)
    torch.manual_seed(0)
    model = as_pretrained(tb.build(recipe("mac"), seed=0)).eval()
    model.save_pretrained(folder / "pretrained")
    expected["pretrained.logits"] = model(tokens()).logits.detach()
    numbers = {
        "losses": save_runs(folder, scratch),
        "comparison": {"recipes": COMPARED, "data": "copy:length=16", "settings": TRIED},
        "search": {"recipe": COMPARED["lmm"], "data": "copy:length=16", "settings": TRIED, "space": SPACE},
    }
    (folder / "expected.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    expected |= {"tokens": tokens()}
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()

"""Memories in models of transformers: perplexity and cost.

python benchmarks/hf_swap.py [--quick] [--json FILE]

Models are built from their configurations and trained on the sources of the Python standard library, first without and
then with a memory beside attention. Nothing is downloaded. Needs titans-build[hf].
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import measure
import torch

import titans_build as tb

MEMORY = {"type": "memory", "heads": 4, "chunk": 16}
FAMILIES = ("llama", "qwen", "mistral", "gpt2")
WINDOW = 64
"""The attention window of the Mistral model, shorter than its texts."""
SECONDS = 20.0
"""Seconds for the rounds of one kind of step."""


def built(family: str, dim: int, layers: int, length: int) -> Any:
    """A model over bytes."""
    import transformers

    torch.manual_seed(0)
    tokens = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_embd": dim, "n_layer": layers, "n_head": 4, "n_positions": length}
        config = transformers.GPT2Config(**sizes, **tokens, **drop)
    else:
        sizes = {"hidden_size": dim, "intermediate_size": 3 * dim, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": length}
        kinds = {"llama": "LlamaConfig", "qwen": "Qwen2Config", "mistral": "MistralConfig"}
        window = {"sliding_window": WINDOW} if family == "mistral" else {}
        config = getattr(transformers, kinds[family])(**sizes, **tokens, **window)
    return transformers.AutoModelForCausalLM.from_config(config)


# -- perplexity --------------------------------------------------------------------------------------------------------


def text(split: Any, rows: int, length: int) -> Any:
    """Rows of bytes; whole files are held out for each split."""
    return tb.open_source("stdlib", rows=rows, length=length, split=split)


def fit(model: Any, steps: int, rows: int, length: int) -> None:
    """Train for ``steps`` of AdamW, on the same rows for every model."""
    source, trained = text("train", rows, length), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        batch = source.batch(step).tokens
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def perplexity(model: Any, batches: int, rows: int, length: int) -> float:
    """On held-out files, each row from a fresh state."""
    held = [text("test", rows, length).batch(index).tokens for index in range(batches)]
    return math.exp(sum(float(model(input_ids=batch, labels=batch).loss) for batch in held) / batches)


def family_row(family: str, quick: bool) -> measure.Result:
    dim, layers, length, steps, rows, batches = (32, 2, 48, 3, 2, 1) if quick else (128, 4, 256, 200, 8, 16)
    model = built(family, dim, layers, 2 * length)
    fit(model, steps, rows, length)
    before = perplexity(model, batches, rows, length)
    attention = "transformer.h.*.attn" if family == "gpt2" else "model.layers.*.self_attn"
    tb.swap(model, attention, MEMORY, "beside", every=2, start=1, train="memory")
    fit(model, steps, rows, length)
    live = perplexity(model, batches, rows, length)
    memories = [module for module in model.modules() if isinstance(module, tb.NeuralMemory)]
    for memory in memories:
        memory.use = "read"
    return {
        "family": family,
        "perplexity": {"before": before, "live": live, "frozen": perplexity(model, batches, rows, length)},
        "memories": len(memories),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": steps,
    }


# -- the cost of a swap ------------------------------------------------------------------------------------------------

CASES = {"as it was": None, "memory beside attention": "beside", "memory in attention's place": "replace"}


def layer_steps(case: str, quick: bool) -> dict[str, Callable[[], Any]]:
    """Training and reading of a Llama model of one layer without a head, swapped or not."""
    dim, length = (32, 64) if quick else (512, 1024)
    model = built("llama", dim, 1, length).model
    if (how := CASES[case]) is not None:
        tb.swap(model, "layers.*.self_attn", MEMORY, how, gate=0.0)
    tokens = torch.randint(256, (1 if quick else 2, length), generator=torch.Generator().manual_seed(0))

    def train() -> None:
        model.zero_grad()
        model(tokens, use_cache=False).last_hidden_state.sum().backward()

    return {"training step": train, "reading": torch.no_grad()(lambda: model(tokens, use_cache=False))}


def overhead(quick: bool) -> list[measure.Result]:
    steps = {case: layer_steps(case, quick) for case in CASES}
    return [
        {**row, "peak": measure.alone(__file__, [row["case"], kind], quick)}
        for kind in steps["as it was"]
        for row in measure.compare(kind, {case: steps[case][kind] for case in CASES}, 0 if quick else SECONDS)
    ]


def tables(results: measure.Result) -> dict[str, str]:
    when = {"before": "perplexity before", "live": "memory live", "frozen": "memory frozen"}
    rows = [[row["family"], *(f"{row['perplexity'][key]:.3f}" for key in when)] for row in results["families"]]
    return {
        "families": measure.table(["family", *when.values()], rows),
        "overhead": measure.comparison_table(results["overhead"]),
        "machine": measure.machine_table(results),
    }


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["environment"]["versions"]["transformers"] = version("transformers")
    families = []
    for family in FAMILIES:
        families.append(family_row(family, arguments.quick))
        measure.say(families[-1])
    return {"families": families, "overhead": overhead(arguments.quick)}


def alone(case: list[str], quick: bool) -> measure.Result:
    return measure.peak_memory(lambda: layer_steps(case[0], quick)[case[1]])


if __name__ == "__main__":
    measure.benchmark("hf_swap", __doc__, "15 minutes", measured, tables, alone=alone)

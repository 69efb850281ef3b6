"""Memories in models of transformers: equality with and without a cache, perplexity, and cost.

python benchmarks/hf_swap.py [--quick] [--json FILE]

Models are built from their configurations and trained on the sources of the Python standard library, first without and
then with a memory beside attention. Nothing is downloaded. Needs titans-build[hf].
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import measure
import torch

import titans_build as tb
from titans_build.blocks.freezing import freeze
from titans_build.tools.data.files import standard_library
from titans_build.tools.gpu.report import installed

MEMORY = {"type": "memory", "heads": 4, "chunk": 16}
FAMILIES = ("llama", "qwen", "mistral", "gpt2")
WINDOW = 64
"""The attention window of the Mistral model, shorter than its texts."""
SECONDS = 20.0
"""Seconds for the rounds of one kind of step."""


def config(family: str, dim: int, layers: int, length: int) -> Any:
    """The configuration of a model over bytes, padded with byte 0."""
    import transformers

    tokens = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2Config(n_embd=dim, n_layer=layers, n_head=4, n_positions=length, **tokens, **drop)
    sizes = {"hidden_size": dim, "intermediate_size": 3 * dim, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": length, **tokens}
    if family == "mistral":
        return transformers.MistralConfig(**sizes, sliding_window=WINDOW)
    return {"llama": transformers.LlamaConfig, "qwen": transformers.Qwen2Config}[family](**sizes)


def attention(family: str) -> str:
    return "transformer.h.*.attn" if family == "gpt2" else "model.layers.*.self_attn"


def built(family: str, dim: int, layers: int, length: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(family, dim, layers, length))


# -- equality and perplexity -----------------------------------------------------------------------------------------


def text(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and bytes of held-out files."""
    files = [file for file in standard_library() if file.size > 2000]
    parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for index, file in enumerate(files):
        part = parts[index % 4 == 3]
        if len(part) < tokens:
            part += file.path.read_bytes()
    return tuple(torch.frombuffer(part[:tokens], dtype=torch.uint8).long() for part in parts)  # type: ignore[return-value]


def fit(model: Any, data: torch.Tensor, steps: int, rows: int, length: int) -> None:
    """Train for ``steps`` of AdamW on random windows, the same for every model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(data) - length, (rows,), generator=generator)
        batch = torch.stack([data[start : start + length] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def loss(model: Any, data: torch.Tensor, length: int) -> float:
    """Nats per token over all windows, each from a fresh state, in batches of eight."""
    windows = data[: len(data) // length * length].view(-1, length)
    parts = windows.split(8)
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in parts) / len(windows)


@torch.no_grad()
def parity(model: Any, prompts: torch.Tensor, new: int) -> measure.Result:
    """Whether generation is the same with and without a cache, and with and without padding."""
    rows, time = prompts.shape

    def speak(tokens: torch.Tensor, mask: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
        torch.manual_seed(1)
        mask = torch.ones_like(tokens) if mask is None else mask
        return model.generate(tokens, attention_mask=mask, max_new_tokens=new, **{"do_sample": False, **how})

    ways = {"greedy": {}, "sampling": {"do_sample": True, "top_k": 50}, "beams": {"num_beams": 3}}
    same = {
        name: bool(torch.equal(speak(prompts, **how), speak(prompts, use_cache=False, **how)))
        for name, how in ways.items()
    }
    lengths = [max(time - 3 * row, 1) for row in range(rows)]
    padded, mask = torch.zeros_like(prompts), torch.zeros_like(prompts)
    for row, length in enumerate(lengths):
        padded[row, time - length :], mask[row, time - length :] = prompts[row, :length], 1
    together = speak(padded, mask)
    alone = [speak(prompts[row : row + 1, :length])[0, length:] for row, length in enumerate(lengths)]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=places).logits
    apart = max(
        float((logits[row, time - length :] - model(prompts[row : row + 1, :length]).logits[0]).abs().max())
        for row, length in enumerate(lengths)
    )
    padding = all(torch.equal(together[row, time:], own) for row, own in enumerate(alone))
    return {"generate": same, "padding": padding, "padding_difference": apart}


def family_row(family: str, quick: bool) -> measure.Result:
    dim, layers, length = (32, 2, 48) if quick else (128, 4, 256)
    steps, rows, tokens = (3, 2, 2000) if quick else (200, 8, 400_000)
    train, held = text(tokens)
    held = held[: 4 * length if quick else 32_768]
    model = built(family, dim, layers, 2 * length)
    fit(model, train, steps, rows, length)
    with torch.no_grad():
        sample = held[:length].unsqueeze(0)
        before = model(sample).logits
        tb.swap(model, attention(family), MEMORY, "beside", every=2, start=1, train="memory")
        step_0 = float((model(sample).logits - before).abs().max())
    base = loss(model, held, length)
    fit(model, train, steps, rows, length)
    live = loss(model, held, length)
    with freeze(model) as frozen:
        still = loss(model, held, length)
    prompts = held[: 4 * 16].view(4, 16).clamp(min=1)
    return {
        "family": family,
        "step_0": step_0,
        **parity(model, prompts, 6 if quick else 24),
        "perplexity": {"before": math.exp(base), "live": math.exp(live), "frozen": math.exp(still)},
        "memories": len(frozen.names),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": steps,
    }


# -- the cost of a swap ------------------------------------------------------------------------------------------------

CASES = ("as it was", "memory beside attention", "memory in attention's place")


def layer_of(case: str, quick: bool) -> tuple[Any, torch.Tensor]:
    """A Llama model of one layer without a head, swapped or not, and its input."""
    dim, length = (32, 64) if quick else (512, 1024)
    model = built("llama", dim, 1, length).model
    if case != CASES[0]:
        tb.swap(model, "layers.*.self_attn", MEMORY, "beside" if case == CASES[1] else "replace", gate=0.0)
    tokens = torch.randint(256, (1 if quick else 2, length), generator=torch.Generator().manual_seed(0))
    return model, tokens


def layer_steps(case: str, quick: bool) -> dict[str, Callable[[], Any]]:
    model, tokens = layer_of(case, quick)

    def train() -> None:
        model.zero_grad()
        model(tokens, use_cache=False).last_hidden_state.sum().backward()

    @torch.no_grad()
    def read() -> None:
        model(tokens, use_cache=False)

    return {"training step": train, "reading": read}


def overhead(quick: bool) -> list[measure.Result]:
    steps = {case: layer_steps(case, quick) for case in CASES}
    return [
        {"kind": kind, "case": case, **row, "peak": measure.peak_memory(__file__, [case, kind], quick)}
        for kind in steps[CASES[0]]
        for case, row in measure.compare({case: steps[case][kind] for case in CASES}, 0 if quick else SECONDS).items()
    ]


# -- the tables --------------------------------------------------------------------------------------------------------


def yes(met: bool) -> str:
    return "yes" if met else "NO"


def tables(results: measure.Result) -> dict[str, str]:
    head = ("family", "difference at step 0", "greedy", "sampling", "beams", "padded", "logits, padded and alone")
    head += ("perplexity before", "memory live", "memory frozen")
    rows = [
        (
            row["family"],
            f"{row['step_0']:.1g}",
            *(yes(row["generate"][way]) for way in ("greedy", "sampling", "beams")),
            yes(row["padding"]),
            f"{row['padding_difference']:.1g}",
            *(f"{row['perplexity'][when]:.3f}" for when in ("before", "live", "frozen")),
        )
        for row in results["families"]
    ]
    cost_head = ("step", "layer", "ms", "over the layer as it was", "peak MB above the model", "rounds")
    costs = [
        (
            row["kind"],
            row["case"],
            measure.milliseconds(row["seconds"]),
            f"{row['ratio']:.2f}",
            measure.megabytes(row["peak"]["peak"] - row["peak"]["inputs"]),
            row["rounds"],
        )
        for row in results["overhead"]
    ]
    return {
        "families": measure.table(head, rows),
        "overhead": measure.table(cost_head, costs),
        "machine": measure.machine_table(results, []),
    }


def measured(arguments: argparse.Namespace, results: measure.Result) -> measure.Result:
    results["environment"]["versions"]["transformers"] = installed("transformers")
    families = []
    for family in FAMILIES:
        families.append(family_row(family, arguments.quick))
        measure.say(families[-1])
    return {"families": families, "overhead": overhead(arguments.quick)}


def peak_case(case: list[str], quick: bool) -> Callable[[], Callable[[], Any]]:
    return lambda: layer_steps(case[0], quick)[case[1]]


if __name__ == "__main__":
    measure.benchmark("hf_swap", __doc__, "15 minutes", measured, tables, peak_case=peak_case)

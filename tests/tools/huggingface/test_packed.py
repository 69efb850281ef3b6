"""Packed rows of several documents, as the collators of transformers make them, equal their documents apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import BloomConfig, BloomForCausalLM, DataCollatorWithFlattening, DynamicCache

import titans_build as tb
from titans_build.tools.swapping import SwapError

LENGTHS = [5, 1, 1, 7, 4, 3]
HOWS = ("beside", "attention", "layer")


@pytest.fixture(scope="module")
def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 40, (1, length), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def batch(documents: list[Tensor]) -> dict[str, Any]:
    """One row, with everything that says where its documents begin."""
    collate = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)
    return dict(collate([{"input_ids": document[0].tolist()} for document in documents]))


def only(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", *names)}


def block_diagonal(lengths: list[int]) -> Tensor:
    return torch.block_diag(*[torch.ones(n, n).tril() for n in lengths])[None, None].bool()


def apart(model: Any, documents: list[Tensor]) -> Tensor:
    return torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)


def gradients(model: nn.Module, logits: Tensor, labels: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def put_in(family: Any, how: str, **changes: Any) -> Any:
    if how != "layer":
        return family.swapped("replace" if how == "attention" else how, **changes)
    model = family.plain(**changes)
    tb.swap(model, family.layer, {"type": "memory", "heads": 2, "chunk": 4}, "replace")
    return model


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "gemma", "neox", pytest.param("qwen3", marks=pytest.mark.slow)]
)
def test_a_swapped_model(families: Any, documents: Any, batch: Any, name: str, how: str) -> None:
    if (name, how) == ("neox", "layer"):
        how = "after"  # its layers return a value that a block does not
    model = put_in(families(name), how).train()
    expected = apart(model, documents)
    grads = gradients(model, expected, batch["labels"])
    for names in (
        ["position_ids"],
        ["seq_idx"],
        ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"],
        [name for name in batch if name not in ("input_ids", "labels")],
    ):
        out = model(**only(batch, *names))  # the configuration has use_cache=True
        assert out.get("past_key_values") is None
        assert_close(out.logits, expected, atol=1e-10, rtol=1e-10)
    rounding = 1e-6 if name == "gemma" else 1e-10  # its norms compute in float32
    for mine, other in zip(gradients(model, out.logits, batch["labels"]), grads):
        assert (mine is None) == (other is None)
        assert mine is None or (mine - other).abs().max() < rounding


@pytest.mark.parametrize("name", ["mac", "mag", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recipe_model(small: Any, documents: Any, batch: Any, name: str, checkpointing: bool) -> None:
    model = small(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = apart(model, documents)
    grads = gradients(model, expected, batch["labels"])
    mask = block_diagonal(LENGTHS)
    everything = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    for given in (
        {"position_ids": batch["position_ids"] + 3},
        {"cu_seq_lens_q": batch["cu_seq_lens_q"]},
        {"seq_idx": batch["seq_idx"]},
        {"attention_mask": mask},
        {"attention_mask": (mask.double() - 1) * 1e9},
        everything,
    ):
        out = model(batch["input_ids"], labels=batch["input_ids"], **given)
        assert_close(out.logits, expected, atol=1e-10, rtol=1e-10)
        # the first token of a document is not predicted, whatever its label
        assert_close(out.loss, cross_entropy(expected[0, :-1], batch["labels"][0, 1:]))
        assert out.past_key_values is None
    for mine, other in zip(gradients(model, out.logits, batch["labels"]), grads):
        assert mine is None or (mine - other).abs().max() < 1e-10
    model.zero_grad()
    model(**only(batch, "labels"), **everything).loss.backward()
    for parameter, other in zip(model.parameters(), grads):
        assert other is None or (parameter.grad - other).abs().max() < 1e-10


@torch.no_grad()
def test_rows_with_different_documents_and_padding(small: Any, llama: Any) -> None:
    tokens = torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(5))
    positions = torch.tensor(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
            [7, 8, 9, 2, 3, 4, 5, 6, 30, 31, 0, 0],  # documents that begin at other numbers; two tokens of padding
            [0, 0, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7],
        ]
    )
    rows = [[12], [3, 5, 2, 1, 1], [1, 1, 2, 8]]
    for model in (small(), llama.swapped("beside"), llama.swapped("replace")):
        logits = model(tokens, position_ids=positions, use_cache=False).logits
        for row, lengths in enumerate(rows):
            each = tokens[row : row + 1].split(lengths, dim=1), positions[row : row + 1].split(lengths, dim=1)
            expected = torch.cat([model(ids, position_ids=places).logits for ids, places in zip(*each)], dim=1)
            assert_close(logits[row : row + 1], expected, atol=1e-10, rtol=1e-10)
            one = model(tokens[row : row + 1], position_ids=positions[row : row + 1], attention_mask=None).logits
            assert_close(logits[row : row + 1], one, atol=1e-10, rtol=1e-10)
        # a mask without padding says nothing
        for mask in (torch.ones(3, 12, dtype=torch.long), torch.ones(3, 12, dtype=torch.bool)):
            given = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
            assert_close(model(tokens, **given).logits, logits, atol=1e-10, rtol=1e-10)
        ends = torch.tensor([0, 12, 15, 20, 22, 23, 24, 25, 26, 28, 36], dtype=torch.int32)
        # rotary embeddings in float32 round otherwise at other positions
        assert_close(model(tokens, cu_seq_lens_q=ends, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_recipe_model_with_padding_between_documents(small: Any) -> None:
    model, tokens = small(), torch.randint(1, 40, (1, 9), generator=torch.Generator().manual_seed(6))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0]])
    for given in (
        {"position_ids": torch.tensor([[0, 0, 1, 2, 1, 1, 0, 1, 1]])},
        {"seq_idx": torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]])},
    ):
        logits = model(tokens, attention_mask=mask, **given).logits
        assert_close(logits[:, [1, 2, 3, 6, 7]], apart(model, [tokens[:, 1:4], tokens[:, 6:8]]), atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_block_diagonal_masks(families: Any, documents: Any, batch: Any, name: str, attention: str) -> None:
    model = families(name).swapped("beside", attn_implementation=attention)
    given, mask = only(batch, "position_ids"), block_diagonal(LENGTHS)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    expected = apart(model, documents)
    for each in (additive, mask):  # eager attention of transformers itself adds a bool mask as it is
        logits = model(**given, attention_mask=each, use_cache=False).logits
        assert_close(logits, expected, atol=1e-5, rtol=1e-5)  # eager attention of llama has a softmax in float32
    if name == "opt":  # its masks do not follow position_ids
        with pytest.raises(SwapError, match=r"OPTDecoderLayer: several documents .* does not keep apart in attention"):
            model(**given)


def test_gradient_checkpointing(llama: Any, documents: Any, batch: Any) -> None:
    model = llama.swapped("beside").train()
    expected = gradients(model, apart(model, documents), batch["labels"])
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        logits = model(**only(batch, "position_ids")).logits
        for mine, other in zip(gradients(model, logits, batch["labels"]), expected):
            assert (mine - other).abs().max() < 1e-10
    model.gradient_checkpointing_disable()
    whole = torch.utils.checkpoint.checkpoint(
        lambda ids, seq_idx: model(ids, seq_idx=seq_idx).logits,
        batch["input_ids"],
        batch["seq_idx"],
        use_reentrant=False,
    )
    for mine, other in zip(gradients(model, whole, batch["labels"]), expected):
        assert (mine - other).abs().max() < 1e-10


class Around(nn.Module):
    """A model of transformers inside of another, which passes on what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Any], **named: Any) -> Tensor:
        return self.inner(**batch, **named).logits


@torch.no_grad()
def test_a_model_inside_of_another(llama: Any, documents: Any, batch: Any) -> None:
    model = Around(llama.plain())
    tb.swap(model, "inner.model.layers.*.self_attn", {"type": "memory", "heads": 2, "chunk": 4}, "beside", gate=0.5)
    expected = torch.cat([model({"input_ids": document}) for document in documents], dim=1)
    assert_close(model(only(batch, "seq_idx")), expected, atol=1e-10, rtol=1e-10)
    mask = torch.ones_like(batch["input_ids"])
    logits = model(only(batch), position_ids=batch["position_ids"], attention_mask=mask)
    assert_close(logits, expected, atol=1e-10, rtol=1e-10)


class Backwards(nn.Module):
    """A module that is no block, and looks ahead."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of = nn.GRU(dim, dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x.flip(1))[0].flip(1)


@torch.no_grad()
def test_modules_that_are_no_blocks(llama: Any, documents: Any, batch: Any) -> None:
    model = llama.plain()
    tb.swap(model, llama.attention, Backwards, "beside", gate=0.5)
    assert_close(model(**only(batch, "position_ids")).logits, apart(model, documents), atol=1e-10, rtol=1e-10)


Change = Callable[[dict[str, Any]], dict[str, Any]]
AHEAD = block_diagonal(LENGTHS).clone()
AHEAD[0, 0, 20, 0] = True  # a token that attends to another document
REFUSED: dict[str, tuple[Change, str]] = {
    "cache": (lambda b: only(b, "position_ids") | {"use_cache": True}, "and a cache"),
    "given cache": (lambda b: only(b, "seq_idx") | {"past_key_values": DynamicCache()}, "and a cache"),
    "padding": (
        lambda b: only(b, "position_ids") | {"attention_mask": torch.tensor([[1] * 20 + [0]])},
        "an attention_mask with padding",
    ),
    "two kinds": (
        lambda b: only(b, "position_ids") | {"seq_idx": b["seq_idx"] // 2},
        "seq_idx and position_ids have different documents",
    ),
    "one document": (
        lambda b: only(b, "seq_idx") | {"position_ids": torch.arange(21)[None]},
        "seq_idx and position_ids have different documents",
    ),
    "lengths": (
        lambda b: only(b) | {"cu_seq_lens_q": torch.tensor([0, 5, 20])},
        r"from 0 to the number of tokens, 21, that do not decrease, got \[0, 5, 20\]",
    ),
    "shape": (lambda b: only(b) | {"seq_idx": b["seq_idx"][:, 1:]}, r"seq_idx: expected .* \[1, 21\], got \[1, 20\]"),
    "numbers": (lambda b: only(b) | {"attention_mask": b["seq_idx"] + 1}, "numbers of documents, expected 1 or 0"),
    "mask": (
        lambda b: only(b) | {"attention_mask": AHEAD},
        "not block-diagonal: in row 0, token 20 attends to token 0",
    ),
    "images": (
        lambda b: only(b, "seq_idx") | {"position_ids": b["position_ids"].expand(3, 1, 21)},
        "no position_ids .* that tell attention",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_refused(llama: Any, batch: Any, wrong: str) -> None:
    model, (change, message) = llama.swapped("beside"), REFUSED[wrong]
    expected = model(batch["input_ids"], use_cache=False).logits
    with pytest.raises(SwapError, match=message):
        model(**change(batch))
    with pytest.raises(SwapError, match=message):
        model.model(**change(batch))
    assert torch.equal(model(batch["input_ids"], use_cache=False).logits, expected)


@torch.no_grad()
def test_states_are_of_one_document(llama: Any, small: Any, batch: Any) -> None:
    model = llama.swapped("beside")
    with tb.memory(model) as m, pytest.raises(SwapError, match=r"and tb\.memory: a carried state is of one document"):
        model(**only(batch, "position_ids"), use_cache=False)
    assert m.state is None
    for each in (model, small()):
        with pytest.raises(ValueError, match=r"several documents in one row.*and a cache"):
            each.generate(**only(batch, "position_ids"), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"seq_idx and position_ids have different documents"):
        small()(batch["input_ids"], position_ids=torch.arange(21)[None], seq_idx=batch["seq_idx"])


@torch.no_grad()
def test_observed_models(llama: Any, small: Any, batch: Any) -> None:
    model, recipe = llama.swapped("beside"), small()
    observed = model.model.layers[1].self_attn.titans.block
    for inside, call in ((observed, model), (recipe.model, recipe)):
        with tb.observe(inside), pytest.raises(ValueError, match="packed documents cannot be observed"):
            call(**only(batch, "position_ids"))
    with tb.observe(small().model):  # another one
        assert model(**only(batch, "position_ids")).logits.shape == (1, 21, 40)


@torch.no_grad()
def test_a_model_without_positions(batch: Any) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)).eval()
    tb.swap(model, "transformer.h.*", {"type": "memory", "heads": 2, "chunk": 4}, "after", gate=0.5)
    with pytest.raises(SwapError, match=r"BloomForCausalLM: several .* no position_ids .* give attention_mask as"):
        model(**only(batch, "seq_idx"))


@torch.no_grad()
def test_one_document_is_not_refused(llama: Any, batch: Any) -> None:
    model, row = llama.swapped("beside"), batch["input_ids"]
    real = torch.ones_like(row)
    real[:, :3] = 0
    alone = {
        "position_ids": (real.cumsum(-1) - 1).masked_fill(real == 0, 1),
        "cu_seq_lens_q": torch.tensor([0, row.shape[1]], dtype=torch.int32),
        "seq_idx": torch.zeros_like(row),
        "attention_mask": torch.ones(1, 1, row.shape[1], row.shape[1]).tril().bool() & (real[:, None, None] == 1),
    }
    expected = model(row, attention_mask=real, position_ids=alone["position_ids"]).logits[:, 3:]
    assert_close(model(row, **alone).logits[:, 3:], expected)

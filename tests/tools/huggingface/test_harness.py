"""Pipelines and the evaluation harness, on models whose tokens are bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from titans_build.huggingface import TitansBuildForCausalLM, byte_tokenizer

Make = Callable[..., TitansBuildForCausalLM]

QUESTIONS = [
    {"question": "abab", "choices": ["ab", "cd", "xyz"], "answer": 0},
    {"question": "12 13", "choices": [" a", " 14"], "answer": 1},
    {"question": "the end", "choices": [".", " of", "less"], "answer": 0},
    {"question": "é", "choices": ["é", "e"], "answer": 1},
]


@pytest.fixture(scope="module")
def reader(small: Make) -> TitansBuildForCausalLM:
    return small("mac", torch.float32, vocab=256)


def test_the_pipeline_with_texts_of_unequal_lengths(reader: TitansBuildForCausalLM) -> None:
    speak = pipeline("text-generation", model=reader, tokenizer=byte_tokenizer(), batch_size=2)
    texts = ["once upon a time", "twice"]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_tensors": True}
    for text, spoken in zip(texts, speak(texts, **settings), strict=True):
        prompt = torch.tensor([list(text.encode())])
        expected = reader.model.generate(prompt, 6).tokens[0].tolist()
        said = spoken[0]["generated_token_ids"]
        said = said if isinstance(said, list) else said.tolist()
        assert said[-len(expected) :] == expected


def log_likelihood(model: TitansBuildForCausalLM, context: str, continuation: str) -> float:
    """Of ``continuation``, token by token, with the language model alone."""
    before, after = list(context.encode()), list(continuation.encode())
    with torch.no_grad():
        logits = model.model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(before) - 1 + index, token]) for index, token in enumerate(after))


def test_the_evaluation_harness(
    reader: TitansBuildForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    task: dict[str, Any] = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    harnessed = HFLM(pretrained=reader, tokenizer=byte_tokenizer(), batch_size=3, max_length=64, device="cpu")
    found = lm_eval.simple_evaluate(
        harnessed, tasks=[task], task_manager=TaskManager(include_defaults=False), log_samples=True, bootstrap_iters=0
    )
    right = 0
    for sample, question in zip(
        sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"]), QUESTIONS, strict=True
    ):
        expected = [log_likelihood(reader, question["question"], choice) for choice in question["choices"]]
        assert [answer[0] for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == question["answer"]
    assert found["results"]["questions"]["acc,none"] == right / len(QUESTIONS)

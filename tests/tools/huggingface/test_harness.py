"""Pipelines and the evaluation harness, on models whose tokens are bytes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

import titans_build as tb
from titans_build.huggingface import TitansBuildForCausalLM, byte_tokenizer
from titans_build.tools.lm_eval import register, run

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


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of multiple choice, from a file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return {
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


def accuracy(model: TitansBuildForCausalLM, samples: list[dict[str, Any]]) -> float:
    """The likelihoods in ``samples`` are those of the language model; returns the share of right answers."""
    right = 0
    for sample, question in zip(sorted(samples, key=lambda sample: sample["doc_id"]), QUESTIONS, strict=True):
        expected = [log_likelihood(model, question["question"], choice) for choice in question["choices"]]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.parametrize("saved", ["by transformers", "by tb.save"])
def test_the_evaluation_harness(
    reader: TitansBuildForCausalLM, task: dict[str, Any], tmp_path: Path, saved: str
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if saved == "by tb.save":
        tb.save(reader.model, tmp_path / "model")
    else:
        reader.save_pretrained(tmp_path / "model")
    found = lm_eval.simple_evaluate(
        "titans",
        {"pretrained": str(tmp_path / "model"), "max_length": 64},
        tasks=[task],
        batch_size=3,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found["results"]["questions"]["acc,none"] == accuracy(reader, found["samples"]["questions"])


@pytest.mark.slow  # the command reads the harness's thousands of tasks
def test_the_command_of_the_harness(
    reader: TitansBuildForCausalLM, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tb.save(reader.model, tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.yaml").write_text(json.dumps(task), encoding="utf-8")
    given = f"titans-lm-eval --model titans --model_args pretrained={tmp_path}/model,max_length=64 --tasks questions"
    given += f" --include_path {tmp_path}/tasks --output_path {tmp_path}/out --log_samples --device cpu"
    monkeypatch.setattr(sys, "argv", given.split())
    run()
    (samples,) = (tmp_path / "out").rglob("samples_questions*.jsonl")
    (results,) = (tmp_path / "out").rglob("results*.json")
    share = accuracy(reader, [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()])
    assert json.loads(results.read_text(encoding="utf-8"))["results"]["questions"]["acc,none"] == share

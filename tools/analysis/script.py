"""What ``titans-analyze`` takes, and what it writes: the page, the plots and the numbers."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...blocks.language_model import LanguageModel
from ...recipes import StorageError, load_recipe, packaged_names
from ...recipes.atomic_write import atomic_write, making_folder
from ...recipes.parse import read_file
from ..inference.session import MODEL, find_model, open_model
from ..inference.tokenizer import Tokenizer
from ..options import add_placement, whole_number, writable_folder
from ..plotting import need_matplotlib
from ..terminal import Columns, UsageError, progress, say, say_columns, say_json
from ..training.run_folder import TRAIN, data_of_model, data_of_run, is_run
from . import plots
from .analysis import Plan, analyse, rounded
from .page import COUNTED, need_plotly, render
from .sample import Sample, from_data, from_file

SUMMARY = "What did a model's memory do with a text? An interactive page, plots and numbers."
EXAMPLES = (
    "titans-analyze runs/mine --out what                     on held-out data of the run",
    "titans-analyze models/mine book.txt --out what          on the first bytes of a text; open what/index.html",
    "titans-analyze models/mine book.txt --tokens 200000 --out what --force",
    "titans-analyze runs/mqar --data mqar:pairs=8 --out what on rows of a generated task",
    "titans-analyze models/mine book.txt --json              the verdict and the sums alone, for machines",
)
PAGE, NUMBERS, PLOTS = "index.html", "analysis.json", "plots"
MOST_PAIRS = 1000
"""Pairs at each place."""
TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what it reads, how much of it, and where the result goes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of a saved model, or of a titans-train run")
    add("text", nargs="?", metavar="TEXTFILE", help="what it reads (default: held-out data of the run)")
    add("--data", metavar="SPEC", help="read held-out rows of this, as titans-train takes it, in place of a file")
    add("--out", metavar="DIR", help=f"write {PAGE}, {NUMBERS} and {PLOTS}/ here; may be left out with --json")
    add("--force", action="store_true", help="let --out replace an analysis that is there")
    add("--tokenizer", metavar="FILE", help="bytes, ids (numbers), or a tokenizer.json (default: the run's, or bytes)")
    add("--tokens", type=whole_number, default=TOKENS, metavar="N", help=f"most tokens to read (default: {TOKENS:,})")
    add("--reset", type=whole_number, metavar="N", help="tokens between resets (default: an eighth of the text)")
    add("--pairs", type=whole_number, default=8, metavar="N", help="pairs to plant at each of 4 places (default: 8)")
    add("--seed", type=whole_number, default=0, metavar="N", help="of the planted pairs (default: 0)")
    add("--no-plots", action="store_true", help="write no PNG and SVG")
    add_placement(parser, dtype=None)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments first, then analyse, write the files and print the verdict."""
    out = _check(arguments)
    model, tokenizer = open_model(arguments.model, arguments.tokenizer, arguments.device, arguments.dtype)
    sample = _sample(arguments, model, tokenizer).to(arguments.device)
    time = sample.tokens.shape[1]
    if arguments.reset is not None and not 1 <= arguments.reset < time:
        raise UsageError(f"--reset {arguments.reset}: expected 1 to {time - 1:,}, fewer than the {time:,} tokens read")
    plan = Plan(model, sample, arguments.reset)
    if not plan.memories:
        raise UsageError(f"{arguments.model}: {_no_memory(model)}")
    with progress(f"analysing {arguments.model}", plan.steps + 1) as advance:
        analysis = {
            "model": _describe(model, arguments.model),
            **analyse(model, sample, plan, pairs=arguments.pairs, seed=arguments.seed, advance=advance),
        }
        if out is not None:
            _write(analysis, out, draw=not arguments.no_plots)
        advance()
    if arguments.json:
        written = {} if out is None else {"out": os.path.abspath(out)}
        say_json(rounded({**summary(analysis), **written}))
        return 0
    say(*analysis["check"]["verdict"], "")
    say_columns(_table(analysis))
    say("", COUNTED)
    if out is not None:
        say("", f"open {out / PAGE}")
    return 0


def summary(analysis: dict[str, Any]) -> dict[str, Any]:
    """What ``--json`` prints: everything but the values along the text and by distance."""
    check = {k: v for k, v in analysis["check"].items() if k not in ("positions", "counts", "losses", "errors")}
    text = {key: value for key, value in analysis["text"].items() if key != "excerpts"}
    gates = [{k: v for k, v in gate.items() if not isinstance(v, np.ndarray)} for gate in analysis["gates"]]
    lives = [recall["half_life"] for recall in analysis["recall"]["memories"]]
    lives += [None] * (len(analysis["memories"]) - len(lives))
    memories = []
    for index, (memory, drift, half_life) in enumerate(zip(analysis["memories"], analysis["drift"], lives)):
        mean = {
            quantity: [float(np.nanmean(row)) for row in kinds["mean"][index]]
            for quantity, kinds in analysis["tokens"].items()
        }
        last = {"moved": [row[-1] for row in drift["distance"]], "norm": [row[-1] for row in drift["norm"]]}
        memories.append({**memory, "mean": mean, **last, "half_life": half_life})
    head = {key: analysis[key] for key in ("format", "version", "model")}
    return {**head, "text": text, "check": check, "memories": memories, "gates": gates}


def _check(arguments: argparse.Namespace) -> Path | None:
    """The folder to write to. Raises ``UsageError`` before any work for what would fail after it."""
    if arguments.text is not None and arguments.data is not None:
        raise UsageError("a TEXTFILE and --data: expected one of them")
    for option, value, least in (("--tokens", arguments.tokens, 1), ("--pairs", arguments.pairs, 2)):
        if value < least:
            raise UsageError(f"{option}: expected at least {least}")
    if arguments.pairs > MOST_PAIRS:
        raise UsageError(f"--pairs {arguments.pairs}: expected at most {MOST_PAIRS:,}")
    if arguments.out is None and not arguments.json:
        raise UsageError("--out DIR: where the page is written to is missing (it may be left out with --json)")
    out = writable_folder(arguments.out, arguments.force, (PAGE, NUMBERS), "an analysis")
    if out is None:
        return None
    need_plotly()
    if not arguments.no_plots:
        need_matplotlib("analyze", "drawing PNG and SVG plots (--no-plots leaves them out)")
    return out


def _sample(arguments: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer) -> Sample:
    assert model.vocab is not None
    if arguments.text is not None:
        return from_file(arguments.text, tokenizer, model.vocab, arguments.tokens)
    if arguments.data is not None:
        return from_data(data_of_model(arguments.model, arguments.data), model.vocab, arguments.tokens)
    folder = find_model(arguments.model)
    if folder.name != MODEL or not is_run(folder.parent):
        raise UsageError(f"{arguments.model}: a saved model, not a titans-train run: give a TEXTFILE or --data SPEC")
    recorded = read_file(folder.parent / TRAIN)
    data = recorded.get("data") if isinstance(recorded, dict) else None
    if not isinstance(data, (str, list, dict)):
        raise UsageError(f"{folder.parent / TRAIN}: no data is named there: give a TEXTFILE or --data SPEC")
    return from_data(data_of_run(folder.parent, data), model.vocab, arguments.tokens, recorded.get("length"))


def _describe(model: LanguageModel, source: str) -> dict[str, Any]:
    recipe: Any = model.recipe
    return {
        "name": recipe.name or Path(source).name,
        "source": source,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(model.layers),
        "dim": model.dim,
        "vocab": model.vocab,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _no_memory(model: nn.Module) -> str:
    frozen = [name for name, child in model.named_modules() if getattr(child, "use", None) in ("read", "write")]
    if frozen:
        return f"its memories are only read or only written ({frozen[0]}: use): there is nothing to analyse"
    bases = [name for name in packaged_names() if not re.search(r"-\d[\d.]*[mb]$", name)]
    having = [name for name in bases if '"memory"' in json.dumps(load_recipe(name).to_dict())]
    return f"the model has no memory; of the packaged recipes these have one: {', '.join(having)}"


def _write(analysis: dict[str, Any], out: Path, *, draw: bool) -> None:
    """Write each file atomically; the page is the last, so all files are there where it is."""
    numbers = json.dumps(rounded(analysis), ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with making_folder(out):
            if draw:
                with making_folder(out / PLOTS):
                    for name, content in plots.draw(analysis):
                        _put(out / PLOTS / name, content)
            # names of files that are not valid text are escaped
            _put(out / NUMBERS, numbers.encode("utf-8", "backslashreplace"))
            _put(out / PAGE, render(analysis).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror or error}") from error


def _put(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def _table(analysis: dict[str, Any]) -> Columns:
    """A row for each head."""
    table = Columns("memory", "head", "surprise", "step", "moved", "half-life of a pair")
    recalls = analysis["recall"]["memories"]
    longest = recalls[0]["distances"][-1] if recalls else 0
    for memory in summary(analysis)["memories"]:
        for head in range(memory["heads"]):
            life = memory["half_life"][head] if memory["half_life"] else None
            tokens = f"over {longest:,} tokens" if life is None else f"{life:,.0f} tokens"
            surprise, step = (f"{memory['mean'][quantity][head]:.3g}" for quantity in ("surprise", "step"))
            table.add(memory["label"], str(head), surprise, step, f"{memory['moved'][head]:.1%}", tokens)
    return table

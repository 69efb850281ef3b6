"""``python -m titans_build.tools.gpu_check``: tests the kernels on this GPU, and measures their speed.

A run ends by itself after ``--seconds``. Every case is a process of its own (``runner``); rows are written as they
come, to ``rows.jsonl``, and at the end with versions, goals and what was left out to ``results.json``. The most
important cases come first (``plan``). A fault of a kernel shows in its own rows: the others are measured all the same.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..terminal import Columns, CommandFailed, UsageError, complain, prepare_streams, say, say_columns
from .goals import goals, shares
from .report import environment, write_json

PACKAGES = ("titans-build", "torch", "triton", "numpy", "xformers", "fla-core", "titans-pytorch")
CLOSING = 6.0
"""Seconds that are kept for ending processes and writing results."""
WORST = ("write_backward_kernel", "write_kernel", "read_backward_kernel")
"""Kernels that a second run looks into unless a first one names them."""


def main(words: Sequence[str] | None = None) -> int:
    """0; 1 if a case failed; 2 for bad use."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_build.tools.gpu_check",
        description="Check the kernels against their references on this GPU, and measure them.",
    )
    # fmt: off
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="FOLDER", help="default: gpu-results")
    parser.add_argument("--seconds", type=_seconds, default=500.0, help="of the whole run (default: 500)")
    parser.add_argument("--second", action="store_true",
                        help="after a first run into the same --out: tiles, ncu, all lengths, compiled models, graphs")
    parser.add_argument("--dry-run", action="store_true",
                        help="on the CPU with tiny shapes; among the cases are a crash, a hang and a wrong number")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these, such as parity or models")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER",
                        help="put into a folder what a GPU machine without network needs, and run nothing")
    # fmt: on
    parser.add_argument("--python", default="3.12", help="of that machine, with --prepare (default: 3.12)")
    # of the program in a prepared folder: the folder, and the time at which it was started
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    prepare_streams()
    try:
        if arguments.prepare is not None:
            from .prepare import prepare

            say("about a minute: fetching wheels and computing references")
            say(f"{arguments.prepare}: {', '.join(prepare(arguments.prepare, arguments.python))}",
                f"on the machine: python3 {arguments.prepare.name}/gpu_check.py --out results")  # fmt: skip
            return 0
        try:
            return _run(arguments)
        finally:
            faulthandler.cancel_dump_traceback_later()
    except (UsageError, CommandFailed) as error:
        complain(str(error))
        return 2


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not CLOSING < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above {CLOSING:g}, got {text!r}")
    return seconds


def _run(arguments: argparse.Namespace) -> int:
    began = time.monotonic() - (0.0 if arguments.began is None else max(0.0, time.time() - arguments.began))
    end = began + arguments.seconds - CLOSING
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # whatever hangs; what was measured is in rows.jsonl
    left = max(1.0, began + arguments.seconds - time.monotonic())
    faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
    # asked in this way, whether there is a GPU does not start CUDA, which a process that is forked later could not use
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from . import runner

    runner.start_server()
    from . import plan  # which imports PyTorch, as the server does meanwhile

    device = "cpu" if arguments.dry_run else "cuda"
    _expect_gpu(device)
    prepared: Path | None = arguments.prepared
    answers, about = None, environment(PACKAGES)
    if prepared is not None:
        packed = json.loads((prepared / "about.json").read_text(encoding="utf-8"))
        about |= {name: packed[name] for name in ("commit", "modified")}
        answers = None if arguments.dry_run else str(prepared / "references.pt")
    file = arguments.out / "results.json"
    worst = json.loads(file.read_text(encoding="utf-8"))["worst"] if arguments.second and file.is_file() else WORST
    background = None
    if arguments.second:
        stages = plan.second(device, arguments.dry_run, worst)
        arguments.out /= "second"
    else:
        stages, background = plan.first(device, arguments.dry_run, answers)
    known = [stage.name for stage in stages]
    if wrong := set(arguments.stages or ()) - set(known):
        raise UsageError(f"--stages {' '.join(wrong)}: no such stage; expected some of {', '.join(known)}")
    if arguments.stages:
        stages = [stage for stage in stages if stage.name in arguments.stages]
    if arguments.dry_run:
        stages[0] = stages[0]._replace(cases=[*plan.faults(device), *stages[0].cases])
    _expect_no_results(arguments.out)
    try:
        results = runner.Results(arguments.out, lambda line: say(f"{time.monotonic() - began:5.0f} s  {line}"))
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror}") from None
    try:
        probe = runner.Case("start", "CUDA in a process that was forked", plan.start, {"device": device}, 60)
        runner.run([runner.Stage("start", 60, [probe])], results, end)
        # else every process imports PyTorch, which takes seconds
        start = "spawn" if results.rows[-1].get("failed") else "forkserver"
        runner.run(stages, results, end, background, start)
    except KeyboardInterrupt:
        complain("stopped", "note")
    summary = summarized(results.rows, results.left_out)
    write_json(arguments.out / "results.json", {
        "environment": about, "seconds": round(time.monotonic() - began, 1), "limit": arguments.seconds,
        "dry_run": arguments.dry_run, **summary, "rows": results.rows, "left_out": results.left_out,
    })  # fmt: skip
    _say(summary, results.left_out)
    say("", f"written: {arguments.out / 'results.json'}")
    return 1 if summary["red"] else 0


def _expect_gpu(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA GPU that PyTorch can use; --dry-run runs on the CPU")


def _expect_no_results(folder: Path) -> None:
    """Those of a dry run may be overwritten."""
    file = folder / "results.json"
    dry = file.is_file() and json.loads(file.read_text(encoding="utf-8"))["dry_run"]
    if (folder / "rows.jsonl").is_file() and not dry:
        raise UsageError(f"--out {folder}: has the rows of another run; name a new folder")


def summarized(rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> dict[str, Any]:
    """Goals; the cases that failed; backends that no case ran on; the kernels that take the most time."""
    shares(rows)
    ran = {(row["operation"], row["backend"]) for row in rows if "passed" in row and "backend" in row}
    refused = {
        (row["operation"], row["backend"]): row["refused"]
        for row in rows
        if row.get("refused") and "operation" in row and "native" not in row["backend"]
    }
    kernels: dict[str, float] = {}
    for row in rows:
        if row.get("what") == "kernel" and row["name"].isidentifier() and row["name"].endswith("_kernel"):
            kernels[row["name"]] = kernels.get(row["name"], 0.0) + row["seconds"]
    return {
        "goals": [goal._asdict() for goal in goals(rows)],
        "red": [
            {name: row.get(name) for name in ("stage", "case", "backend", "where", "error", "at_most", "failed")}
            for row in rows
            if row.get("failed") or row.get("passed") is False
        ],
        "never_ran": {f"{o}, {b}": why for (o, b), why in refused.items() if (o, b) not in ran},
        "worst": sorted(kernels, key=lambda name: -kernels[name])[:3] or list(WORST),
    }


def _say(summary: dict[str, Any], left_out: Sequence[str]) -> None:
    table = Columns("goal", "wanted", "reached", "met")
    for goal in summary["goals"]:
        table.add(goal["what"], goal["wanted"], goal["reached"], {None: "", True: "yes", False: "no"}[goal["met"]])
    say("")
    say_columns(table)
    for row in summary["red"]:
        complain("  ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    for backend, why in summary["never_ran"].items():
        complain(f"no case ran on {backend}: {why}", "note")
    for case in left_out:
        complain(f"left out: {case}", "note")

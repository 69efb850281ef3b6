"""``python -m titans_build.tools.gpu_check``: tests the kernels on this GPU, then measures their speed.

Parity comes first: the outputs and gradients of every backend of every operation against the reference in float64.
A backend that fails is not timed, nor is any case that may run it. The most important cases are timed first, and the
results are written after every measurement, so that an interrupted run keeps them. Most of the time goes into
compiling, on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..options import placement
from ..terminal import Columns, UsageError, complain, in_bytes, prepare_streams, progress, say, say_columns
from . import goals, parity, speed, timing, workers
from .report import environment, write_json

PACKAGES = (
    "titans-build", "torch", "triton", "xformers", "titans-pytorch", "flash-linear-attention", "fla-core"
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """0; 1 when a backend failed its parity; 2 for bad use."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_build.tools.gpu_check",
        description="Check the kernels against their references on this device, then measure them.",
    )
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda); cpu is for trying this command")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of what is timed"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    parser.add_argument("--only", choices=("parity", "speed"), help="one of the two; speed alone proves nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be checked and timed, without running it"
    )
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="stop measuring after so many (default: 9)")
    parser.add_argument(
        "--processes", type=int, metavar="N",
        help="that compile and check at a time, 0 for none but this one (default: one for each core; 0 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/gpu-NAME.json, or none on a CPU"
    )
    arguments = parser.parse_args(words)
    prepare_streams()
    try:
        return _dry_run(arguments) if arguments.dry_run else _run(arguments)
    except UsageError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was measured until now is in the file", file=sys.stderr)
        return 130


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return minutes


def _dry_run(arguments: argparse.Namespace) -> int:
    """List the cases, on any machine; the backends are those that this machine has."""
    device, dtype = placement(arguments.device if torch.cuda.is_available() else "cpu", arguments.dtype)
    if arguments.only != "speed":
        table = Columns("operation", "backends", "precisions", "cases")
        tasks = parity.tasks(device)
        for operation in dict.fromkeys(task.operation for task in tasks):
            of = [task for task in tasks if task.operation == operation]
            distinct = [", ".join(dict.fromkeys(names)) for names in zip(*((t.backend, t.precision) for t in of))]
            table.add(operation, *distinct, f"{len({task.case for task in of})}")
        say(f"parity: {len(tasks)} checks")
        say_columns(table)
    if arguments.only != "parity":
        table = Columns("what", "backend", "shape", "passes")
        timings = speed.timings(device, dtype, _sizes(arguments))
        for each in timings:
            table.add(*each[:4])
        say(f"speed: {len(timings)} cases, the most important first")
        say_columns(table)
    return 0


def _sizes(arguments: argparse.Namespace) -> timing.Sizes:
    return timing.QUICK if arguments.quick else timing.FULL


def _run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    device, dtype = placement(arguments.device, arguments.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    target = arguments.json
    if target is None and device.type == "cuda":
        target = Path("benchmarks/results") / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    report = Report(target)
    # before the work, so that a file that cannot be written is reported first
    where = {**environment(PACKAGES), "cuda": torch.version.cuda, "device": name}
    report.add(environment=where, quick=arguments.quick, dtype=arguments.dtype)
    processes = arguments.processes
    if processes is None:
        processes = min(16, os.cpu_count() or 1) if device.type == "cuda" else 0
    failed: dict[str, set[str]] = {}
    if arguments.only != "speed":
        found = check_parity(device, processes, report)
        say_columns(parity_table(found))
        for each in found:
            if not each.passed:
                complain(
                    f"{each.operation}, {each.backend}, {each.case}, {each.precision}: "
                    + (each.failed or f"{each.where}: error {each.error:.1e}, at most {each.tolerance:.0e} is right")
                )
        failed = parity.failed_backends(found)
    if arguments.only != "parity":
        rows = measure_speed(device, dtype, processes, failed, arguments, report, began)
        for table in (speed_table(rows), trend_table(goals.trends(rows)), goal_table(goals.goals(rows))):
            say("")
            say_columns(table)
    if target is not None:
        say("", f"written: {target}")
    return 1 if failed else 0


class Report:
    """The results. Every addition writes them to the file, if there is one."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.results: dict[str, Any] = {}

    def add(self, **results: Any) -> None:
        self.results |= results
        if self.file is not None:
            try:
                write_json(self.file, self.results)
            except (OSError, ValueError) as error:
                raise UsageError(f"--json {self.file}: {getattr(error, 'strerror', None) or error}") from None


# -- parity ------------------------------------------------------------------------------------------------------------


def check_parity(device: torch.device, processes: int, report: Report) -> list[parity.Outcome]:
    """The outcome of every task; memory that a kernel does not write holds NaN."""
    tasks = parity.tasks(device)
    found: list[parity.Outcome] = []
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with progress("parity", len(tasks)) as step:
            for outcome in workers.outcomes(tasks, device, processes):
                found.append(outcome)
                report.add(parity=[each._asdict() | {"passed": each.passed} for each in found])
                step()
    finally:
        torch.use_deterministic_algorithms(before)
    order = {task: number for number, task in enumerate(tasks)}
    return sorted(found, key=lambda each: order[each.task])


def parity_table(found: Sequence[parity.Outcome]) -> Columns:
    """A line for every backend and precision."""
    table = Columns("operation", "backend", "precision", "cases", "worst error", "at most", "refused")
    groups: dict[tuple[str, str, str], list[parity.Outcome]] = {}
    for outcome in found:
        groups.setdefault((outcome.operation, outcome.backend, outcome.precision), []).append(outcome)
    for (operation, backend, precision), group in sorted(groups.items(), key=lambda group: group[0][:2]):
        ran = [outcome for outcome in group if not outcome.refused]
        reasons = ", ".join(dict.fromkeys(outcome.refused for outcome in group if outcome.refused))
        worst = max(ran, key=lambda o: (math.isnan(o.error), o.error / o.tolerance), default=None)
        passed = f"{sum(o.passed for o in ran)} of {len(ran)}" if ran else "none"
        numbers = ["", ""] if worst is None else [f"{worst.error:.1e}", f"{worst.tolerance:.0e}"]
        table.add(operation, backend, precision, passed, *numbers, reasons)
    return table


# -- speed -------------------------------------------------------------------------------------------------------------


def measure_speed(
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
    failed: Mapping[str, set[str]],
    arguments: argparse.Namespace,
    report: Report,
    began: float,
) -> list[timing.Measurement]:
    """Time as many cases as fit into ``--minutes``, the most important first."""
    sizes = _sizes(arguments)
    late = lambda: time.monotonic() - began > 60 * arguments.minutes  # noqa: E731
    if processes and not arguments.quick and not late():
        warmed = workers.warm(device, dtype, processes)
        with progress("compiling", len(speed.warmups(device, dtype))) as step:
            for _ in itertools.takewhile(lambda _: not late(), warmed):
                step()
    ceiling = timing.ceiling(device, dtype, sizes)
    say("", f"measured here: {ceiling.product / 1e12:.3g} TFLOP/s in {arguments.dtype}, {ceiling.copy / 1e9:.4g} GB/s")
    cases, untimed = speed.without_failed(speed.timings(device, dtype, sizes), failed)
    report.add(ceiling=ceiling._asdict(), untimed=untimed)
    for reason in untimed:
        complain(f"not timed: {reason}")
    rows: list[timing.Measurement] = []
    with progress("speed", len(cases)) as step:
        for case in cases:
            if late():
                break
            rows.append(timing.measure(case, device, sizes, ceiling))
            report.add(
                speed=[row._asdict() for row in rows],
                trends=[trend._asdict() for trend in goals.trends(rows)],
                goals=[goal._asdict() for goal in goals.goals(rows)],
            )
            step()
    left_out = [f"{case.what}, {case.backend}, {case.shape}, {case.direction}" for case in cases[len(rows) :]]
    report.add(left_out=left_out)
    if left_out:
        complain(f"{len(left_out)} of {len(cases)} cases did not fit into --minutes {arguments.minutes:g}", "note")
    return rows


def speed_table(rows: Sequence[timing.Measurement]) -> Columns:
    """A line for every measurement."""
    table = Columns("what", "backend", "shape", "passes", "ms", "rate", "share", "tokens/s", "peak", "failed")
    for row in rows:
        if row.failed:
            table.add(*row[:4], "", "", "", "", "", row.failed)
            continue
        rate = row.flops / row.seconds / 1e12 if row.flops else row.bytes / row.seconds / 1e9
        unit = "TFLOP/s" if row.flops else "GB/s"
        table.add(
            *row[:4], f"{1e3 * row.seconds:.3g}",
            f"{rate:.3g} {unit}" if row.flops or row.bytes else "",
            f"{row.share:.0%}" if row.flops or row.bytes else "",
            f"{row.tokens / row.seconds:,.0f}" if row.tokens else "",
            in_bytes(row.peak) if row.peak else "",
            "",
        )  # fmt: skip
    return table


def trend_table(trends: Sequence[goals.Trend]) -> Columns:
    """A line for every case that was measured at several lengths."""
    table = Columns("what", "backend", "shape", "passes", "time", "exponent", "peak of a token")
    for trend in trends:
        lengths = f"{trend.lengths[0]:,} to {trend.lengths[-1]:,}"
        peaks = " to ".join(in_bytes(x) for x in (trend.bytes[0], trend.bytes[-1])) if trend.bytes else ""
        table.add(*trend[:4], lengths, f"{trend.exponent:.2f}", peaks)
    return table


def goal_table(goals: Sequence[goals.Goal]) -> Columns:
    """A line for every goal."""
    table = Columns("goal", "wanted", "reached", "met")
    for goal in goals:
        table.add(*goal.cells)
    return table

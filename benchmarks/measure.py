"""What the benchmarks share: the command line, interleaved timing, peak memory, tables, and the environment."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

# the library is imported where it is needed: before_after.py imports another version of it

TITANS_PYTORCH = "titans-pytorch"

Result = dict[str, Any]


def say(*words: object) -> None:
    """Progress, on standard error: standard output is for the tables."""
    print(*words, file=sys.stderr, flush=True)


# -- the command line --------------------------------------------------------------------------------------------------


def benchmark(
    name: str,
    description: str,
    takes: str,
    measured: Callable[[argparse.Namespace, Result], Result],
    tables: Callable[[Result], dict[str, str]],
    *,
    alone: Callable[[Any, bool], Result] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """The command line of a benchmark: measure, write the results to ``--json``, and print the tables.

    ``measured(arguments, results)`` returns the results to add; it may also change those that are given.
    ``alone(case, quick)`` measures a case for which :func:`alone` has started this process.
    Ctrl-C ends a run without a stack trace and without a result file.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    if add_options is not None:
        add_options(parser)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, seconds: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    if alone is not None and sys.argv[1:2] == ["--alone"]:
        print(json.dumps(alone(json.loads(sys.argv[2]), "--quick" in sys.argv)))
        return
    arguments = parser.parse_args()
    began = time.perf_counter()
    try:
        say("seconds" if arguments.quick else f"{takes}, on a machine with nothing else to do; Ctrl-C stops it")
        results = {"program": name, "quick": arguments.quick, "environment": environment(), "skipped": {}}
        results |= measured(arguments, results)
    except KeyboardInterrupt:
        say("\nstopped: nothing was written")
        sys.exit(130)
    results["environment"]["load"].append(os.getloadavg()[0])
    results["seconds"] = round(time.perf_counter() - began)
    if arguments.json is not None:
        from titans_build.tools.gpu import report

        report.write_json(arguments.json, results)
        say(f"written: {arguments.json}")
    say(f"took {results['seconds']} s")
    for title, text in tables(results).items():
        print(f"\n{title}\n\n{text}")


# -- where it ran ------------------------------------------------------------------------------------------------------


def environment() -> Result:
    """Versions, commit and machine."""
    from titans_build.tools.gpu import report

    return {
        **report.environment(("titans-build", "torch", TITANS_PYTORCH)),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [os.getloadavg()[0]],
    }


def missing() -> dict[str, str]:
    """The libraries to compare with that are not installed: ``{name: reason}``."""
    try:
        import titans_pytorch  # noqa: F401
    except ImportError as error:
        return {TITANS_PYTORCH: f"{error}; pip install titans-pytorch==0.5.5"}
    return {}


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):  # not Linux; not x86
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


# -- time --------------------------------------------------------------------------------------------------------------


def interleave(
    cases: dict[Any, Callable[[], Any]],
    seconds: float,
    least: int | None = None,
    most: int = 30,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds of each case. Every round runs all cases once, so that other load on the machine affects all of them.

    One round to ``warm`` up, then ``least`` to ``most`` rounds, as many as fit into ``seconds``. ``least`` is 3 by
    default, and 1 without ``seconds``. Every other round runs in reverse order, so that no case always follows the same
    one.
    """
    least = least or (3 if seconds else 1)
    for case in cases.values() if warm else ():
        case()
    samples: dict[Any, list[float]] = {name: [] for name in cases}
    began = time.perf_counter()
    for count in range(most):
        if count >= least and (time.perf_counter() - began) * (count + 1) / count > seconds:
            break
        for name in list(cases)[:: -1 if count % 2 else 1]:
            gc.collect()
            start = clock()
            cases[name]()
            samples[name].append(clock() - start)
    return samples


def interleave_with_rate(
    cases: dict[Any, Callable[[], Any]], seconds: float, size: int, **how: Any
) -> tuple[dict[Any, list[float]], float]:
    """:func:`interleave`, and the FLOP/s of a product of float32 matrices of this size, measured in the same rounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    samples = interleave({"matrix product": lambda: a @ b, **cases}, seconds, **how)
    return samples, 2 * size**3 / statistics.median(samples.pop("matrix product"))


def compare(kind: str, cases: dict[str, Callable[[], Any]], seconds: float, **how: Any) -> list[Result]:
    """For each case its median seconds, and the median over the rounds of its time over that of the first case.

    ``how``: arguments of :func:`interleave`.
    """
    samples = interleave(cases, seconds, **how)
    first = next(iter(samples.values()))
    return [
        {
            "kind": kind,
            "case": case,
            "seconds": statistics.median(taken),
            "ratio": statistics.median(a / b for a, b in zip(taken, first)),
            "rounds": len(taken),
        }
        for case, taken in samples.items()
    ]


def summary(samples: Sequence[float]) -> Result:
    """Median, quartiles, minimum and number of the samples."""
    ordered = sorted(samples)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    return {"median": statistics.median(ordered), "low": low, "high": high, "best": ordered[0], "count": len(ordered)}


def medium(function: Callable[[], Any]) -> Callable[[], Any]:
    """``function`` with float32 matrix products of ``"medium"`` precision, which may round operands to bfloat16."""

    def run() -> Any:
        torch.set_float32_matmul_precision("medium")
        try:
            return function()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


# -- memory ------------------------------------------------------------------------------------------------------------


def alone(script: str, case: object, quick: bool, **variables: str) -> Result:
    """Start ``script`` for one case, with these environment variables, and return what it measures."""
    command = [sys.executable, script, "--alone", json.dumps(case)] + ["--quick"] * quick
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip()[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory(make: Callable[[], Callable[[], Any]]) -> Result:
    """Create a case, run it twice, and return the resident bytes of this new process at each stage.

    ``imports``: after imports and a first matrix product. ``inputs``: with inputs and parameters. ``peak``: the maximum
    while the case ran, outputs included.
    """
    x = torch.ones(256, 256, requires_grad=True)
    (x @ x).sum().backward()
    del x
    import titans_build.recipes  # noqa: F401 - every case needs it

    stages = {"imports": resident()}
    case = make()
    gc.collect()
    stages["inputs"] = resident()
    with contextlib.suppress(OSError):  # not Linux: the peak of the imports is lower than that of every large case
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    for _ in range(2):
        case()
    stages["peak"] = max(resident("VmHWM"), stages["inputs"])
    return stages


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process: now, or with ``VmHWM`` the maximum."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: only the peak is known
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# -- tables ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns. ``None`` is an empty cell."""
    cells = [list(head), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    numeric = [i > 0 and all(row[i][:1].isdigit() or not row[i] for row in cells[1:]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-:"[n]) for w, n in zip(widths, numeric)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def comparison_table(rows: Sequence[Result]) -> str:
    """What :func:`compare` found, with the peak memory above the inputs where it was measured."""
    peaks = [[megabytes(row["peak"]["peak"] - row["peak"]["inputs"])] if "peak" in row else [] for row in rows]
    cells = [
        [row["kind"], row["case"], milliseconds(row["seconds"]), f"{row['ratio']:.2f}", *peak, row["rounds"]]
        for row, peak in zip(rows, peaks)
    ]
    return table(["step", "case", "ms", "over the first", *["peak MB"] * any(peaks), "rounds"], cells)


def machine_table(results: Result, rates: Sequence[float] = ()) -> str:
    """Where and how a result file was measured."""
    env = results["environment"]
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in env["versions"].items())
    commit = (env["commit"] or "unknown")[:12] + (" with changes" if env["modified"] else "")
    done = results.get("done_before", [])
    rows = [
        ("date, commit", f"{env['date']}, {commit}"),
        ("versions", f"Python {env['python']}, {versions}"),
        ("machine", f"{env['cpu']} ({env['instructions']}), {env['cores']} cores, {env['threads']} threads"),
        ("float32 matrix rate", f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s" if rates else None),
        ("load before, after", ", ".join(f"{load:.1f}" for load in env["load"])),
        ("duration", f"{results['seconds']} s"),
        ("done before, by this program", f"{len(done)} runs" if len(done) > 6 else ", ".join(done)),
        *((f"left out: {name}", reason) for name, reason in results["skipped"].items()),
    ]
    return table(("measured", "quick run: not figures to quote" if results["quick"] else ""), (r for r in rows if r[1]))


def goal(
    what: str, wanted: str, values: Iterable[float], met: Callable[[float], bool], form: str = "{:.2f}"
) -> tuple[str, ...]:
    """A row of a table of goals: the range of the measured values, and whether all of them meet the goal."""
    from titans_build.tools.gpu.goals import goal_of

    return goal_of(what, wanted, values, met, form).cells


GOALS = ("goal", "wanted", "measured", "met")


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"

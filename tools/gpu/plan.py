"""The cases of a run, in the order of their importance, with the seconds that each stage may take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import cases as gpu_cases
from . import parity, speed
from .runner import Case, Row, Stage

SHAPES: tuple[Row, ...] = (
    {"d": 64, "expansion": 2, "layers": 2, "chunk": 64},
    {"d": 128, "expansion": 2, "layers": 2, "chunk": 64},
    {"d": 128, "expansion": 1, "layers": 1, "chunk": 64},
)
"""Memories whose operation is timed. The last has a state as large as that of the linear memories."""
FLAT: Row = {"d": 64, "expansion": 1, "layers": 1, "chunk": 64}
"""A memory that has all schedules."""
FURTHER: tuple[Row, ...] = (
    {"d": 128, "expansion": 2, "layers": 2, "chunk": 512},
    {"d": 48, "expansion": 4, "layers": 2, "chunk": 64},
)
"""With large chunks, for which there is a goal, and the memories of the packaged 170m."""
KINDS: tuple[Row, ...] = tuple(SHAPES[0] | {"kind": kind} for kind in ("gated", "channels", "window", "thresholds"))
"""Memories that go beyond the paper's."""
TILES: tuple[dict[str, int], ...] = ({"TOKENS": 64, "BLOCK": 64}, {"TOKENS": 64, "BLOCK": 32}, {"BLOCK": 64})
MODELS = ("transformer", "mag", "lmm", "mac")
RULES = ("gated delta rule", "TTT-Linear")
"""Memories of flash-linear-attention."""
REPEATED = (
    "two layers, streamed", "two layers, resident", "one layer, streamed", "one layer, fused",
    "masked, inside chunks, clipped",
)  # fmt: skip


def first(device: str, small: bool, answers: str | None) -> tuple[list[Stage], Stage]:
    """The stages of a first run, and what compiles kernels beside them. ``small``: to try this, not to measure."""
    time_ = 0.0 if small else 0.4
    size = "" if small else "-170m"
    shapes = [_small(shape) for shape in SHAPES[:1]] if small else SHAPES
    rows, length = ((2,), 32) if small else ((128, 16, 256), 2048)
    texts = (64,) if small else (2048, 8192, 32768)
    on = {"device": device}

    def stage(name: str, seconds: float, cases: Sequence[tuple[str, Any, Row, float]], at_once: int = 1) -> Stage:
        limits = 60.0 if small else None  # of a machine that may be busy
        made = [Case(name, case, function, on | given, limits or limit) for case, function, given, limit in cases]
        return Stage(name, seconds, made, at_once)

    checked = [case.name for case in gpu_cases.cases(small)]
    operation = [(_named(shape, rows=n), shape | {"rows": n}) for n in rows for shape in shapes]
    operation += [
        (_named(FLAT, rows=rows[0], schedule=schedule), FLAT | {"rows": rows[0], "schedule": schedule})
        for schedule in (() if small else ("fused", "resident", "streamed"))
    ]
    operation += [
        (
            _named(shapes[0], rows=rows[0], **tiles),
            shapes[0] | {"rows": rows[0], "tiles": tiles, "schedule": "streamed"},
        )
        for tiles in (() if small else TILES)
    ]
    common = {"length": length, "seconds": time_}
    models = [
        (f"{name}{size}, {text} tokens", {"name": name + size, "length": text}) for text in texts for name in MODELS
    ]
    one_layer = {name: {"stack.0.repeat": 1} for name in ("mac", "lmm")}
    d, states = (16, 4) if small else (128, 128)
    rules = [(rule, n, d) for n in texts[:2] for rule in RULES]
    rules += [(RULES[0], texts[0], FLAT["d"])] * (not small)
    ceiling = (
        {"side": 64, "copied": 2**16, "seconds": time_} if small else {"side": 8192, "copied": 2**32, "seconds": 0.5}
    )
    generated = {"prompt": texts[0], "tokens": 2 if small else 64, "seconds": time_}
    repeated = checked[:1] if small else REPEATED
    sanitized = {"name": checked[0], "small": True}
    stages = [
        stage("ceilings", 25, [("ceilings", speed.ceilings, ceiling, 25)]),
        stage("parity", 100, [
            (name, parity.check, {"name": name, "small": small, "answers": answers}, 60) for name in checked
        ], 2 if small else 8),
        stage("repeats", 40, [
            *((name, parity.repeat, {"name": name, "small": small}, 30) for name in repeated),
            *((tool, sanitize, {"tool": tool, **sanitized}, 40) for tool in ("memcheck", "racecheck")),
        ], 2 if small else 6),
        stage("operation", 100, [
            *((name, speed.memory, given | common, 45) for name, given in operation),
        ]),
        stage("profile", 35, [
            (f"one layer of {name}", speed.profile_step,
             {"name": name + size, "length": texts[0], "changes": changes}, 30)
            for name, changes in one_layer.items()
        ]),
        stage("models", 90, [
            *((name, speed.train_step, given | {"seconds": time_}, 40) for name, given in models),
            *((f"mac, graphs, {text} tokens", speed.train_step,
               {"name": "mac" + size, "length": text, "seconds": time_, "graphs": True}, 40) for text in texts),
        ]),
        stage("decoding", 30, [
            ("a step of the memory", speed.memory_step,
             {"rows": 2048 if not small else 4, "d": d, "expansion": 2, "layers": 2, "seconds": time_}, 15),
            *((name + ", graphs" * graphs, speed.decode, generated | {"name": name + size, "graphs": graphs}, 25)
              for graphs in (False, True) for name in MODELS[1:]),
        ]),
        stage("linear memories", 40, [
            (f"{rule}, {n} tokens, heads of {width}", speed.linear_memory,
             {"rule": rule, "rows": states, "length": n, "d": width, "seconds": time_}, 60) for rule, n, width in rules
        ]),
        stage("further", 0, [
            *((_named(shape), speed.memory, _small(shape) if small else shape | {"rows": 128}, 30)
              for shape in (*FURTHER, *KINDS)),
            ("attention, window", speed.attentions, {"length": texts[-1], "window": 16 if small else 1024}, 40),
            ("attention", speed.attentions, {"length": texts[0], "window": None}, 40),
            ("norms and gates", speed.elementwise, {"rows": texts[-1], "width": 32 if small else 1024}, 30),
        ]),
    ]  # fmt: skip
    for case in stages[-1].cases:
        case.arguments.update({"seconds": time_} if case.function is not speed.memory else {"rows": rows[0], **common})
    ahead = [("memory", given | common) for _, given in operation]
    ahead += [("train_step", {"name": name + size}) for name in MODELS[1:]]
    ahead += [("memory", shape | {"rows": rows[0]} | common) for shape in (*FURTHER, *KINDS)]
    # these try many settings of each kernel
    others = {"rows": states, "length": 256, "d": d, "seconds": time_, **on}
    compiling = [Case("compiling", rule, speed.linear_memory, {"rule": rule, **others}, 200) for rule in RULES]
    compiling += [
        Case("compiling", f"{what} {number}", speed.compile_ahead, {"function": what, **given}, 200)
        for number, (what, given) in enumerate(ahead)
    ]
    return stages, Stage("compiling", 0, [] if device == "cpu" else compiling, 8)


def second(device: str, small: bool, worst: Sequence[str]) -> list[Stage]:
    """A second run: tiles, ``ncu`` on the ``worst`` kernels, all lengths, compiled models and graphs."""
    time_, size = (0.0, "") if small else (0.3, "-170m")
    shapes = [_small(SHAPES[0])] if small else [*SHAPES, *FURTHER]
    common = {"device": device, "rows": 2 if small else 128, "length": 32 if small else 2048, "seconds": time_}
    swept = [
        {"TOKENS": tokens, "BLOCK": block, "num_warps": warps}
        for tokens in (16, 32, 64, 128) for block in (16, 32, 64) for warps in (4, 8)
    ]  # fmt: skip
    texts = (64,) if small else (2048, 4096, 8192, 16384, 32768, 65536, 131072)
    trained = {"device": device, "seconds": time_}
    return [
        Stage("kernels", 100, [
            Case("kernels", f"{kernel}, {_named(shape)}", count_hardware, {"kernel": kernel, **shape}, 60)
            for kernel in worst for shape in shapes[:1]
        ]),
        Stage("tiles", 130, [
            Case("tiles", _named(shape, **tiles), speed.memory,
                 shape | common | {"tiles": tiles, "schedule": "streamed"}, 20)
            for shape in shapes for tiles in (swept[:1] if small else swept)
        ]),
        Stage("lengths", 120, [
            Case("lengths", f"{name}{size}, {text} tokens", speed.train_step,
                 trained | {"name": name + size, "length": text}, 60)
            for text in texts for name in ("transformer", "mag", "lmm", "mac")
        ]),
        Stage("compiled", 100, [
            Case("compiled", f"{name}{size}", speed.train_step,
                 trained | {"name": name + size, "length": texts[0], "compiled": True}, 120)
            for name in ("transformer", "mag")
        ]),
        Stage("graphs", 20, [
            Case("graphs", _named(shape), speed.replay, shape | common, 20) for shape in ([] if small else shapes[:2])
        ]),
    ]  # fmt: skip


def _small(shape: Row) -> Row:
    return shape | {"d": 16, "chunk": 16}


def _named(shape: Row, **more: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in {**shape, **more}.items())


def start(device: str) -> Iterator[Row]:
    """Start CUDA."""
    began = time.perf_counter()
    yield {"sum": torch.ones(4, device=device).sum().item(), "seconds": time.perf_counter() - began}


# -- programs of CUDA that look into a case ----------------------------------------------------------------------------


def sanitize(device: str, tool: str, name: str, small: bool) -> Iterator[Row]:
    """A parity case under a tool of ``compute-sanitizer``."""
    code = f"from titans_build.tools.gpu.parity import run_once; run_once({name!r}, {device!r}, {small})"
    found = _program("compute-sanitizer", ["--tool", tool, "--error-exitcode", "9"], code)
    if found is None:
        yield {"tool": tool, "refused": "compute-sanitizer is not installed"}
        return
    done, seconds = found
    summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    said = "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    yield {"tool": tool, "passed": done.returncode == 0, "exit": done.returncode, "summary": summary,
           "seconds": seconds, "output": said}  # fmt: skip


def count_hardware(kernel: str, **shape: Any) -> Iterator[Row]:
    """The first launch of a kernel of the memory under ``ncu``: what limits it."""
    code = (
        "from titans_build.tools.gpu import speed; "
        f"list(speed.memory('cuda', rows=128, length=2048, seconds=0.0, **{shape!r}))"
    )
    options = ["--csv", "--set", "basic", "--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
    options += ["--clock-control", "none", "--kernel-name", f"regex:^{kernel}", "--launch-count", "1"]
    found = _program("ncu", options, code)
    if found is None:
        yield {"kernel": kernel, "refused": "ncu is not installed"}
        return
    done, seconds = found
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    yield {"kernel": kernel, **shape, "passed": done.returncode == 0, "seconds": seconds, "csv": lines,
           "output": "" if lines else (done.stdout + done.stderr)[-1500:]}  # fmt: skip


def _program(program: str, options: Sequence[str], code: str) -> tuple[subprocess.CompletedProcess[str], float] | None:
    """Run Python code under a program, and the seconds that this took; ``None`` where it is not installed."""
    found = shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")
    if found is None:
        return None
    began = time.perf_counter()
    command = [found, *options, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    return done, time.perf_counter() - began


# -- faults, to try the runner -----------------------------------------------------------------------------------------


def faults(device: str) -> list[Case]:
    """A case that crashes, one that hangs and one whose kernel gives a wrong number."""
    return [
        Case("parity", "injected crash", crash, {}, 10),
        Case("parity", "injected hang", hang, {}, 2),
        Case("parity", "injected wrong number", wrong_number, {"device": device}, 20),
    ]


def crash() -> Iterator[Row]:
    yield {"sent": "before the crash"}
    os.abort()


def hang() -> Iterator[Row]:
    yield {"sent": "before the hang"}
    time.sleep(3600)


def wrong_number(device: str) -> Iterator[Row]:
    """The gate, times 1.01."""
    case = gpu_cases.named("gate", small=True)
    wrong = case._replace(run=lambda backend, **inputs: [y * 1.01 for y in case.run(backend, **inputs)])
    yield parity.compare(wrong, "torch", parity.answer(case), device)

"""``--perplexity FILE``: how well a text is predicted, by position, with the memory live or frozen."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...recipes.atomic_write import atomic_write
from ...registry import show
from ..plotting import COLORS, draw
from ..terminal import Columns, CommandFailed, UsageError, count, say, say_columns, say_json
from .reading import DOUBLING, Bucket, Perplexity, perplexity
from .session import Reading, Session, Text, reading_progress, usage_errors

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def measure(session: Session, text: Text, edges: tuple[int, ...], arguments: argparse.Namespace) -> int:
    """Measure, print, plot, and save the state after the text to the session's target. Returns the exit status."""
    start = time.perf_counter()
    live, lengths = _perplexity(session, text, edges)
    seconds = time.perf_counter() - start
    if live.tokens == 0:
        raise UsageError(
            f"--perplexity {arguments.perplexity}: a text of one token or none: there is nothing to predict"
        )
    if not math.isfinite(live.loss):
        raise CommandFailed("the loss is not finite: the model has diverged on this text")
    frozen = None
    if arguments.compare_frozen:
        with usage_errors("--compare-frozen"), session.model.freeze_memory():
            frozen, _ = _perplexity(session, Text(text.files, [], text.option), edges)
    read = live.tokens + 1  # the first token is not predicted
    report: dict[str, Any] = {
        "model": os.path.abspath(arguments.model),
        "file": arguments.perplexity,
        "bytes": text.read,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(read / max(seconds, 1e-9), 1),
        "position_before": session.position,
        "memory_frozen": arguments.no_write,
        **report_of(live, lengths),
        "state": None if session.target is None else os.path.abspath(session.target),
    }
    if frozen is not None:
        report["frozen"] = report_of(frozen, lengths)
    if session.target is not None:
        session.reading = Reading(live.state, None, read)
        session.save(session.target)
    if arguments.plot is not None:
        _plot(report, arguments.plot)
    if arguments.json:
        say_json(report)
        return 0
    _print_table(report)
    say("", f"{read:,} tokens read, {report['tokens_per_second']:,.0f} per second")
    if arguments.plot is not None:
        say(f"wrote {arguments.plot}")
    return 0


def parse_edges(text: str | None) -> tuple[int, ...]:
    """``"1k,16k,1M"`` -> ``(1024, 16384, 1048576)``. Raises ``UsageError``."""
    if text is None:
        return DOUBLING
    edges = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d{1,15})([kKmM]?)", word.strip())
        if not found:
            raise UsageError(f"--buckets: expected positions as in 128,1k,1M (k is 1,024), got {show(word)}")
        edges.append(int(found[1]) * UNITS[found[2].lower()])
    if any(b <= a for a, b in zip([0, *edges], edges)):
        raise UsageError(f"--buckets {text}: expected increasing positions from 1 on")
    return tuple(edges)


class ByteCounts:
    """The bytes of the predicted tokens by bucket. The first token of a text is not predicted."""

    def __init__(self, edges: tuple[int, ...]) -> None:
        self.edges = torch.tensor(edges, dtype=torch.int64)
        self.sums = torch.zeros(len(edges) + 1, dtype=torch.int64)
        self.tokens = 0

    def __call__(self, lengths: Tensor) -> None:
        """Count the next tokens, with these bytes."""
        if not self.tokens:
            lengths = torch.cat([lengths.new_zeros(1), lengths[1:]])[: len(lengths)]
        positions = torch.arange(self.tokens, self.tokens + len(lengths))
        self.sums.index_add_(0, torch.bucketize(positions, self.edges, right=True), lengths)
        self.tokens += len(lengths)

    def of(self, part: Perplexity | Bucket) -> int:
        """The bytes of a bucket, or of the whole text; 0 where ids stand for no text."""
        if isinstance(part, Perplexity):
            return int(self.sums.sum())
        return int(self.sums[int(torch.bucketize(torch.tensor(part.start), self.edges, right=True))])


def _perplexity(session: Session, text: Text, edges: tuple[int, ...]) -> tuple[Perplexity, ByteCounts]:
    lengths = ByteCounts(edges)
    with reading_progress(text, "measuring") as update:
        pieces = session.pieces(text, lengths)
        return perplexity(session.model, pieces, session.reading.state, edges=edges, on_piece=update), lengths


def report_of(found: Perplexity, lengths: ByteCounts) -> dict[str, Any]:
    """The numbers of a text and of its buckets, as JSON."""

    def numbers(part: Perplexity | Bucket) -> dict[str, Any]:
        size = lengths.of(part)
        bits = part.loss * part.tokens / math.log(2) / size if size else math.nan
        values = {"tokens": part.tokens, "loss": part.loss, "perplexity": part.perplexity, "bits_per_byte": bits}
        # JSON has neither NaN nor infinity
        return {key: value if math.isfinite(value) else None for key, value in values.items()}

    buckets = [{"start": bucket.start, "stop": bucket.stop, **numbers(bucket)} for bucket in found.buckets]
    return {**numbers(found), "buckets": buckets}


def _print_table(report: dict[str, Any]) -> None:
    has_bytes, frozen = report["bits_per_byte"] is not None, report.get("frozen")
    headings = ["loss", *(["bits/byte"] if has_bytes else []), "perplexity"]
    table = Columns("position", "tokens", *headings, *([f"{name}, frozen" for name in headings] if frozen else []))

    def cells(part: dict[str, Any]) -> list[str]:
        loss, bits, ppl = (
            math.nan if part[key] is None else part[key] for key in ("loss", "bits_per_byte", "perplexity")
        )
        return [f"{loss:.4f}", *([f"{bits:.3f}"] if has_bytes else []), f"{ppl:,.2f}" if ppl < 1e9 else "> 1e9"]

    for index, bucket in enumerate(report["buckets"]):
        span = f"{bucket['start']:,} - " + (f"{bucket['stop'] - 1:,}" if bucket["stop"] is not None else "")
        other = cells(frozen["buckets"][index]) if frozen else []
        table.add(span.rstrip(), count(bucket["tokens"]), *cells(bucket), *other)
    table.add("all", count(report["tokens"]), *cells(report), *(cells(frozen) if frozen else []))
    say_columns(table)


def steps_of(report: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Edges and values of the buckets as steps over a logarithmic axis, which has no position 0."""
    key = "loss" if report["bits_per_byte"] is None else "bits_per_byte"
    buckets, end = report["buckets"], report["tokens"] + 1
    stops = [min(bucket["stop"] or end, end) for bucket in buckets]
    values = [math.nan if bucket[key] is None else bucket[key] for bucket in buckets]
    return [max(buckets[0]["start"], stops[0] // 2, 1), *stops], values


def _plot(report: dict[str, Any], path: str) -> None:
    unit = "nats per token" if report["bits_per_byte"] is None else "bits per byte"
    name = os.path.basename(report["file"])
    title = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    curves = {"memory frozen" if report["memory_frozen"] else "memory live": report}
    if "frozen" in report:
        curves["memory frozen"] = report["frozen"]

    def plot(axes: Any) -> None:
        for (label, curve), color in zip(curves.items(), COLORS):
            edges, values = steps_of(curve)
            axes.stairs(values, edges, baseline=None, color=color, linewidth=2, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="position in the text (tokens)", ylabel=unit)
        axes.set_title(f"{title}: {unit}", parse_math=False)
        axes.legend()

    picture = draw(plot, formats=["svg"], size=(7.2, 4.0))["svg"]
    with usage_errors(f"--plot {path}"), atomic_write(Path(path)) as temporary:
        temporary.write_bytes(picture)

"""``--perplexity FILE``: how well a text is predicted, by position, with the memory live or frozen."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from ...recipes.atomic_write import atomic_write
from ...registry import show
from ..plotting import COLOURS, draw
from ..terminal import Columns, CommandFailed, UsageError, count, say, say_columns, say_json
from .reading import DOUBLING, Bucket, Perplexity, Reading, perplexity
from .session import Session, Text, reading_progress
from .tokenizer import IdTokenizer

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def measure(
    session: Session, text: Text, edges: tuple[int, ...], arguments: argparse.Namespace, target: Path | None
) -> int:
    """Measure, print, plot, and save the state after the text to ``target``, if given. Returns the exit status."""
    state, position_before = session.reading.state, session.position
    start = time.perf_counter()
    live = _perplexity(session, text, edges)
    seconds = time.perf_counter() - start
    if live.tokens == 0:
        raise CommandFailed(f"{arguments.perplexity}: a text of one token or none: there is nothing to predict")
    if not math.isfinite(live.loss):
        raise CommandFailed("the loss is not finite: the model has diverged on this text")
    frozen = None
    if arguments.compare_frozen:
        session.reading = Reading(state, None, 0)
        try:
            with session.model.freeze_memory():
                frozen = _perplexity(session, Text(text.files, [], text.option), edges)
        except ValueError as error:
            raise UsageError(f"--compare-frozen: {error}") from None
    read = live.tokens + 1  # the first token is not predicted
    if target is not None:
        session.reading = Reading(live.state, None, read)
        session.save(target)
    # ids that stand for no text have no bytes
    bytes_per_token = None if isinstance(session.tokenizer, IdTokenizer) else text.read / read
    if arguments.plot is not None:
        _plot(arguments, live, frozen, bytes_per_token)
    if arguments.json:
        report: dict[str, Any] = {
            "model": os.path.abspath(arguments.model),
            "file": arguments.perplexity,
            "bytes": text.read,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(read / max(seconds, 1e-9), 1),
            "position_before": position_before,
            "memory_frozen": arguments.no_write,
            **_report(live, bytes_per_token),
            "state": None if target is None else os.path.abspath(target),
        }
        if frozen is not None:
            report["frozen"] = _report(frozen, bytes_per_token)
        say_json(report)
        return 0
    _print_table(live, frozen, bytes_per_token)
    say("", f"{read:,} tokens read, {read / max(seconds, 1e-9):,.0f} per second")
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


def _perplexity(session: Session, text: Text, edges: tuple[int, ...]) -> Perplexity:
    with reading_progress(text, "measuring") as update:
        return perplexity(session.model, session.pieces(text), session.reading.state, edges=edges, on_piece=update)


def _bits(loss: float, bytes_per_token: float) -> float:
    return loss / math.log(2) / bytes_per_token


def _numbers(part: Perplexity | Bucket, bytes_per_token: float | None) -> dict[str, Any]:
    numbers = {
        "tokens": part.tokens,
        "loss": part.loss,
        "perplexity": part.perplexity,
        "bits_per_byte": None if bytes_per_token is None else _bits(part.loss, bytes_per_token),
    }
    # JSON has no infinity
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in numbers.items()
    }


def _report(found: Perplexity, bytes_per_token: float | None) -> dict[str, Any]:
    buckets = [
        {"start": bucket.start, "stop": bucket.stop, **_numbers(bucket, bytes_per_token)} for bucket in found.buckets
    ]
    return {**_numbers(found, bytes_per_token), "buckets": buckets}


def _print_table(live: Perplexity, frozen: Perplexity | None, bytes_per_token: float | None) -> None:
    headings = ["position", "tokens", "loss", *(["bits/byte"] if bytes_per_token is not None else []), "perplexity"]
    if frozen is not None:
        headings += [f"{name}, frozen" for name in headings[2:]]
    table = Columns(*headings)

    def cells(part: Perplexity | Bucket) -> list[str]:
        bits = [] if bytes_per_token is None else [f"{_bits(part.loss, bytes_per_token):.3f}"]
        return [f"{part.loss:.4f}", *bits, f"{part.perplexity:,.2f}" if part.perplexity < 1e9 else "> 1e9"]

    for index, bucket in enumerate(live.buckets):
        span = f"{bucket.start:,} - {bucket.stop - 1:,}" if bucket.stop is not None else f"{bucket.start:,} -"
        other = [] if frozen is None else cells(frozen.buckets[index])
        table.add(span, count(bucket.tokens), *cells(bucket), *other)
    table.add("all", count(live.tokens), *cells(live), *([] if frozen is None else cells(frozen)))
    say_columns(table)


def steps_of(found: Perplexity, bytes_per_token: float | None) -> tuple[list[int], list[float]]:
    """Edges and values of the buckets as steps over a logarithmic axis, which has no position 0."""
    end = found.tokens + 1
    stops = [min(bucket.stop or end, end) for bucket in found.buckets]
    first = max(found.buckets[0].start, stops[0] // 2, 1)
    values = [b.loss if bytes_per_token is None else _bits(b.loss, bytes_per_token) for b in found.buckets]
    return [first, *stops], values


def _plot(
    arguments: argparse.Namespace, live: Perplexity, frozen: Perplexity | None, bytes_per_token: float | None
) -> None:
    unit = "nats per token" if bytes_per_token is None else "bits per byte"
    name = os.path.basename(arguments.perplexity)
    title = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    curves = {"memory frozen" if arguments.no_write else "memory live": live}
    if frozen is not None:
        curves["memory frozen"] = frozen

    def plot(axes: Any) -> None:
        for (label, found), colour in zip(curves.items(), COLOURS):
            edges, values = steps_of(found, bytes_per_token)
            axes.stairs(values, edges, baseline=None, color=colour, linewidth=2, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda position, _: _short(position))
        axes.set(xlabel="position in the text (tokens)", ylabel=unit)
        axes.set_title(f"{title}: {unit}", parse_math=False)
        axes.legend()

    try:
        with atomic_write(Path(arguments.plot)) as temporary:
            temporary.write_bytes(draw(plot, formats=["svg"], size=(7.2, 4.0))["svg"])
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {arguments.plot}: {getattr(error, 'strerror', None) or error}") from None


def _short(position: float) -> str:
    """``512``, ``16k``, ``1M``."""
    size, unit = next(((s, u) for s, u in ((2**20, "M"), (2**10, "k")) if position >= s), (1, ""))
    return f"{position / size:g}{unit}"

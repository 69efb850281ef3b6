"""``titans-infer MODEL --perplexity FILE``: how well a text is predicted, by position, memory live or frozen."""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import Any

from ...recipes.replacing import replacing
from ...registry import show
from ..terminal import Columns, CommandFailed, UsageError, count, say, say_columns, say_json
from .bar import reading_bar
from .codec import Numbers
from .perplexity import DOUBLING, Bucket, Perplexity, perplexity
from .plot import Curve, draw
from .reading import Reading
from .session import Session
from .sources import Text

UNITS = {"": 1, "k": 2**10, "m": 2**20}


def measure(
    session: Session, text: Text, edges: tuple[int, ...], arguments: argparse.Namespace, target: Path | None
) -> int:
    """Measure, show, and save the state that has read the text to ``target``, if there is one."""
    state, before = session.at.state, session.position
    started = time.perf_counter()
    live = _read(session, text, edges)
    seconds = time.perf_counter() - started
    if live.tokens == 0:
        raise CommandFailed(f"{arguments.perplexity}: a text of one token or none: there is nothing to predict")
    if not math.isfinite(live.loss):
        raise CommandFailed("the loss is not finite: the model has diverged on this text")
    frozen = None
    if arguments.compare_frozen:
        session.at = Reading(state, None, 0)
        try:
            with session.model.freeze_memory():
                frozen = _read(session, Text(text.files, [], text.option), edges)
        except ValueError as error:
            raise UsageError(f"--compare-frozen: {error}") from None
    read = live.tokens + 1  # nothing predicts the first
    if target is not None:
        session.at = Reading(live.state, None, read)
        session.save(target)
    # of ids that stand for no text there are no bytes
    bytes_per_token = None if isinstance(session.codec, Numbers) else text.read / read
    if arguments.plot is not None:
        _plot(arguments, live, frozen, bytes_per_token)
    if arguments.json:
        report: dict[str, Any] = {
            "model": os.path.abspath(arguments.model),
            "file": arguments.perplexity,
            "bytes": text.read,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(read / max(seconds, 1e-9), 1),
            "position_before": before,
            "memory_frozen": arguments.no_write,
            **_report(live, bytes_per_token),
            "state": None if target is None else os.path.abspath(target),
        }
        if frozen is not None:
            report["frozen"] = _report(frozen, bytes_per_token)
        say_json(report)
        return 0
    _show(live, frozen, bytes_per_token)
    say("", f"{read:,} tokens read, {read / max(seconds, 1e-9):,.0f} per second")
    if arguments.plot is not None:
        say(f"wrote {arguments.plot}")
    return 0


def edges_of(text: str | None) -> tuple[int, ...]:
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


def _read(session: Session, text: Text, edges: tuple[int, ...]) -> Perplexity:
    with reading_bar(text, "measuring") as advance:
        return perplexity(session.model, session.pieces(text), session.at.state, edges=edges, on_piece=advance)


def _bits(loss: float, bytes_per_token: float) -> float:
    return loss / math.log(2) / bytes_per_token


def _numbers(part: Perplexity | Bucket, bytes_per_token: float | None) -> dict[str, Any]:
    numbers = {
        "tokens": part.tokens,
        "loss": part.loss,
        "perplexity": part.perplexity,
        "bits_per_byte": None if bytes_per_token is None else _bits(part.loss, bytes_per_token),
    }
    # infinity has no place in JSON
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in numbers.items()
    }


def _report(found: Perplexity, bytes_per_token: float | None) -> dict[str, Any]:
    buckets = [
        {"start": bucket.start, "stop": bucket.stop, **_numbers(bucket, bytes_per_token)} for bucket in found.buckets
    ]
    return {**_numbers(found, bytes_per_token), "buckets": buckets}


def _show(live: Perplexity, frozen: Perplexity | None, bytes_per_token: float | None) -> None:
    unit = ["bits/byte"] if bytes_per_token is not None else []
    headings = ["position", "tokens", "loss", *unit, "perplexity"]
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


def _plot(
    arguments: argparse.Namespace, live: Perplexity, frozen: Perplexity | None, bytes_per_token: float | None
) -> None:
    def curve(name: str, found: Perplexity) -> Curve:
        values = (b.loss if bytes_per_token is None else _bits(b.loss, bytes_per_token) for b in found.buckets)
        end = found.tokens + 1
        return Curve(name, [(b.start, min(b.stop or end, end), value) for b, value in zip(found.buckets, values)])

    curves = [
        curve("memory frozen" if arguments.no_write else "memory live", live),
        *([] if frozen is None else [curve("memory frozen", frozen)]),
    ]
    unit = "nats per token" if bytes_per_token is None else "bits per byte"
    picture = draw(curves, f"{os.path.basename(arguments.perplexity)}: {unit}")
    try:
        with replacing(Path(arguments.plot)) as temporary:
            temporary.write_text(picture, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {arguments.plot}: {getattr(error, 'strerror', None) or error}") from None

"""What is seen of a run while it runs: a line for each event and a bar under them, or lines of JSON."""

from __future__ import annotations

import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..terminal import complain, console, say, say_json
from .journal import Event


class Display:
    """Told of every event. The bar is on standard error, and only where a person is looking."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Display:
        if not self.as_json and not self.quiet and sys.stderr.isatty():
            parts = (
                TextColumn("loss {task.fields[loss]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*parts, console=console(sys.stderr), transient=True)
            self._task = self._bar.add_task("", total=None, loss="-", speed="-")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "tick":
            if self._bar is not None:
                speed = f"{event['tokens_per_second']:,.0f}"
                done, total = event["step"], event["steps"]
                self._bar.update(self._task, completed=done, total=total, loss=_number(event["loss"]), speed=speed)
        elif self.as_json:
            say_json(event, in_one_line=True)
            sys.stdout.flush()
        elif kind == "warning":
            complain(event["message"], "warning")
        elif (line := _line(event)) is not None:
            self._print(line)

    def _print(self, line: str) -> None:
        if self._bar is not None and sys.stdout.isatty():
            # above the bar, which would otherwise be torn
            self._bar.console.print(Text(line), soft_wrap=True)
        else:
            say(line)
            sys.stdout.flush()


def _line(event: Event) -> str | None:
    """An event in a line of text; ``None`` for one that is said elsewhere."""
    step = f"step {event['step']:>7,}  "
    match event["event"]:
        case "start" if event["step"]:
            return f"going on after step {event['step']:,} of {event['steps']:,}" + _changes(event.get("changes"))
        case "step":
            return (
                f"{step}loss {_number(event['loss'])}  {event['tokens_per_second']:,.0f} tokens/s  "
                f"lr {event['lr']:.2e}  gradient {_number(event['gradient'])}"
            )
        case "valid":
            kept = {key: value for key, value in event.items() if key not in ("event", "step")}
            said = (f"{key.replace('_', ' ')} {_number(value)}" for key, value in kept.items())
            return f"{step}validation: " + "  ".join(said)
        case "surprise":
            means = (f"{path} {_number(memory['mean'])}" for path, memory in event["memories"].items())
            return f"{step}surprise: " + "  ".join(means)
        case "stage":
            return f"{step}stage {event['number'] + 1}: {event['steps']:,} steps of {', '.join(event['train'])}"
        case "skip":
            return f"{event['message']}; {event['why']}"
        case "end":
            best = event["best"]
            seen = "" if best is None else f"; best validation: loss {_number(best['loss'])} at step {best['step']:,}"
            return f"done: {event['step']:,} steps; saved to {event['model']}{seen}"
    return None


def _changes(changes: dict[str, Any] | None) -> str:
    return f", with {', '.join(f'{key} = {value}' for key, value in changes.items())}" if changes else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

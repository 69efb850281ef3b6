"""``titans-train RECIPE --data SPEC --out RUN``: options, and what is shown while a run trains."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.text import Text

from ...recipes.parse import read_value
from ...registry import RecipeError, show
from ..data.open_source import with_tokenizer
from ..options import add_recipe, load, overrides, saved_folder
from ..terminal import UsageError, complain, console, first_process_first, say_json
from .log import Event
from .run_folder import RECIPE, is_run, write_file
from .settings import Settings, fields, read_settings
from .train import train

SUMMARY = "Train the model of a recipe on data, in a folder that records everything about the run."
EXAMPLES = (
    "titans-train mac --data copy --out runs/copy               a generated task (titans-train tasks lists them)",
    "titans-train mag --data 'src/**/*.py' --out runs/code --steps 2000 --lr 1e-3",
    "titans-train mac --data '{text: corpus.jsonl, pack: documents}' --out runs/packed     several documents in a row",
    "titans-train mac --set dim=64 --data mqar:pairs=8 --out runs/mqar -t warmup=0.1 -t ema=0.99",
    "titans-train mac --train my.yaml --out runs/mine           settings, and data:, from a file",
    "titans-train --resume --out runs/copy                      resume from the last checkpoint",
    "torchrun --nproc-per-node 2 -m titans_build.tools.train mac --data copy --out runs/two",
)

OPTIONS = ("steps", "batch", "length", "lr", "seed", "device", "valid_every", "checkpoint_every")
"""Settings that also are options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Recipe, data, folder and settings."""
    add_recipe(parser, optional=True, saved="a saved folder, whose weights are the initial ones")
    add = parser.add_argument
    add("--data", metavar="SPEC", help="a task (mqar:pairs=8,length=64), a text file, a folder, or a glob in quotes")
    add("--out", required=True, metavar="RUN", help="the run's folder; the model is saved in RUN/model")
    add_unquoted(parser)
    add("--resume", action="store_true", help="resume the run in RUN, if there is one")
    add_settings(parser)


def add_unquoted(parser: argparse.ArgumentParser) -> None:
    """Takes words that are no arguments, so that ``refuse_unquoted`` can say what they are."""
    parser.add_argument("unquoted", nargs="*", help=argparse.SUPPRESS)


def refuse_unquoted(arguments: argparse.Namespace) -> None:
    """Raise ``UsageError`` for words that are no arguments, as after a wildcard that the shell has expanded."""
    if not arguments.unquoted:
        return
    message = f"unrecognized arguments: {' '.join(arguments.unquoted)}"
    if arguments.data is not None and any(map(os.path.exists, arguments.unquoted)):
        message += "\n  --data takes one SPEC: put a wildcard in quotes, as in --data 'texts/*.md'"
    raise UsageError(message)


def add_settings(parser: argparse.ArgumentParser, *, several_lr: bool = False) -> None:
    """A file of settings, single settings, and options for the most common ones. ``several_lr``: --lr is a list."""
    add, settings = parser.add_argument, fields(Settings)
    add("--tokenizer", metavar="FILE", help="of text: a tokenizer.json, a folder or cached name with one, or bytes")
    add("--train", metavar="FILE", help="settings, and data:, from a YAML or JSON file")
    text = "change one setting; may be given many times: " + ", ".join(settings)
    add("-t", "--train-set", action="append", default=[], metavar="KEY=VALUE", help=text)
    for name in OPTIONS:
        field = settings[name]
        text = field.description + ("" if field.default is None else f" (default: {field.default})")
        metavar = {"integer": "N", "number": "X"}.get(field.type_text.split()[0], "NAME")
        if name == "lr" and several_lr:
            text, metavar = text + "; the best of several is kept", "X,X,..."
        add(_option(name), dest=name, metavar=metavar, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Train, and show the events."""
    with first_process_first():
        refuse_unquoted(arguments)
        if not arguments.out:
            raise UsageError("--out: expected the name of a folder, got none")
        out = Path(arguments.out)
        resuming = arguments.resume and is_run(out)
        source = arguments.recipe
        if source is None:
            if not resuming:
                if arguments.train is not None:
                    read_settings(arguments.train)  # says so if the file is the recipe
                if arguments.resume:
                    raise UsageError(f"--resume --out {out}: no run is there; a RECIPE and --data start one")
                raise UsageError("expected a RECIPE; only --resume works without one")
            if arguments.set:
                raise UsageError("--set: the recipe of a run cannot be changed when it is resumed")
            source = str(out / RECIPE)
        if resuming and arguments.tokenizer is not None and arguments.data is None:
            raise UsageError("--tokenizer: the tokenizer of a run cannot be changed when it is resumed")
        settings, data = settings_and_data(arguments, need_data=not resuming)
        recipe, weights = load(source, arguments), saved_folder(source)
    with Display(as_json=arguments.json, quiet=os.environ.get("RANK", "0") != "0") as display:
        try:
            train(recipe, data, settings, out, on_event=display, resume=arguments.resume, weights=weights)
        except BrokenPipeError as error:
            complain(str(error))
            raise
    return 0


def settings_and_data(arguments: argparse.Namespace, *, need_data: bool) -> tuple[dict[str, Any], Any]:
    """The settings and the data. Options and ``-t`` override the file."""
    given = {} if arguments.train is None else read_settings(arguments.train)
    data = given.pop("data", None)
    if arguments.data is not None:
        data = arguments.data
    if data is None and need_data:
        raise UsageError("--data: expected training data: a task (titans-train tasks), a file, a folder or a glob")
    if arguments.tokenizer is not None and data is not None:
        data = with_tokenizer(data, arguments.tokenizer)
    single = overrides(arguments.train_set, "-t", "KEY=VALUE, as in -t lr=1e-3")
    for name in OPTIONS:
        text = getattr(arguments, name)
        if text is None:
            continue
        value = read_option(_option(name), text)
        if single.get(name, value) != value:
            raise UsageError(f"{_option(name)} {text} and -t {name}={show(single[name])}: expected one of them")
        single[name] = value
    return given | single, data


def read_option(option: str, text: str) -> Any:
    """The value of an option, read like one in a YAML file. Raises ``RecipeError`` that names the option."""
    try:
        return read_value(text)
    except RecipeError as error:
        raise RecipeError(error.problems, option) from None


def read_rates(text: str) -> list[float]:
    """The different learning rates of ``--lr a,b,...``, in order."""
    found = [read_option("--lr", part.strip()) for part in text.split(",")]
    if not all(isinstance(lr, (int, float)) and not isinstance(lr, bool) and lr > 0 for lr in found):
        raise UsageError(f"--lr {text}: expected numbers > 0 with commas between them")
    return list(dict.fromkeys(map(float, found)))


def positive(text: str) -> int:
    """The integer >= 1 of an option. Raises ``argparse.ArgumentTypeError`` for other text."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {show(text)}")
    return int(text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# -- the display -------------------------------------------------------------------------------------------------------


class Display:
    """Prints events, as lines of text or JSON, and shows a progress bar on standard error if it is a terminal."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._bar: Any = None

    def __enter__(self) -> Display:
        if not self.as_json and not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.fields[stage]}loss {task.fields[loss]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
                console=console(sys.stderr),
                transient=True,
                redirect_stdout=False,
            )
            self._task = self._bar.add_task("", total=None, loss="-", speed="-", stage="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "tick":
            if self._bar is not None:
                speed, loss = f"{event['tokens_per_second']:,.0f}", _number(event["loss"])
                shown = {"loss": loss, "speed": speed, "stage": _stage(event)}
                self._bar.update(self._task, completed=event["step"], total=event["steps"], **shown)
        elif self.as_json:
            say_json(event, in_one_line=True)
            sys.stdout.flush()
        elif kind == "warning":
            complain(event["message"], "warning")
        elif (line := _line(event)) is not None:
            if self._bar is not None and sys.stdout.isatty():
                # above the bar: both are on the same terminal
                self._bar.console.print(Text(line), soft_wrap=True)
            else:
                print(line, flush=True)


def metrics_text(event: Event) -> str:
    """The metrics of a validation: ``loss 1.2345  accuracy 0.5000``."""
    return "  ".join(
        f"{key.replace('_', ' ')} {_number(value)}" for key, value in event.items() if key not in ("event", "step")
    )


def _line(event: Event) -> str | None:
    """An event as a line of text; ``None`` if it is shown otherwise or not at all."""
    step = f"step {event['step']:>7,}  "
    match event["event"]:
        case "start" if "packing" in event and not event["step"]:
            packing = event["packing"]
            cut = f" ({packing['documents_cut']:,} longer than a row are cut)" if packing["documents_cut"] else ""
            return (
                f"{packing['documents']:,} documents{cut} in {packing['rows']:,} rows of {packing['length']:,} tokens; "
                f"padding: {packing['padded']:,} tokens ({packing['padded_share']:.2%})"
            )
        case "start" if event["step"]:
            changes = ", ".join(f"{key} = {value}" for key, value in event.get("changes", {}).items())
            resumed = f"resuming after step {event['step']:,} of {event['steps']:,}"
            return f"{resumed}, with {changes}" if changes else resumed
        case "step":
            return (
                f"{step}{_stage(event)}loss {_number(event['loss'])}  {event['tokens_per_second']:,.0f} tokens/s  "
                f"lr {event['lr']:.2e}  gradient {_number(event['gradient'])}"
            )
        case "valid":
            return f"{step}validation: {metrics_text(event)}"
        case "surprise":
            means = (f"{path} {_number(memory['mean'])}" for path, memory in event["memories"].items())
            return f"{step}surprise: " + "  ".join(means)
        case "stage":
            changes = ", ".join(f"{path} = {show(value)}" for path, value in event.get("recipe", {}).items())
            trained = f"{event['steps']:,} steps of {', '.join(event['train'])}"
            return f"{step}stage {event['number'] + 1}: {trained}{f', with {changes}' if changes else ''}"
        case "skip":
            return f"{event['message']}; {event['why']}"
        case "end":
            best = event["best"]
            text = "" if best is None else f"; best validation: loss {_number(best['loss'])} at step {best['step']:,}"
            return f"done: {event['step']:,} steps; saved to {event['model']}{text}"
    return None


def _stage(event: Event) -> str:
    return f"stage {event['stage'] + 1}  " if "stage" in event else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def write_plots(make: Callable[[], dict[str, bytes]], folder: Path, name: str) -> list[str]:
    """Write the pictures that ``make`` returns by their endings, if Matplotlib is installed, and return their paths."""
    try:
        pictures = make()
    except UsageError as error:
        complain(str(error), "warning")
        return []
    for ending, content in pictures.items():
        write_file(folder / f"{name}.{ending}", content)
    return [str(folder / f"{name}.{ending}") for ending in pictures]

"""What ``titans-infer`` takes, and which of three things it does: answer a prompt, chat, measure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...blocks.generation import Sampler
from ...recipes.saved_state import expect_replaceable
from ..options import add_placement, whole_number
from ..plotting import need_matplotlib
from ..terminal import UsageError, complain
from .chat import DEFAULT_TEMPLATE, PLACEHOLDER, chat
from .generate import answer_prompt, answer_questions
from .measure import measure, parse_edges
from .session import (
    STANDARD_INPUT,
    Session,
    Text,
    check_state_file,
    check_writable,
    open_draft,
    open_model,
    usage_errors,
)

SUMMARY = "Let a saved model read a text of any length and continue it; keep what it learned for the next time."
EXAMPLES = (
    "titans-infer models/mine 'Once upon a time'                   continue a prompt",
    "titans-infer models/mine --file book.txt --state book.state   read a book, and keep what was learned",
    "titans-infer models/mine --state book.state 'Who was it?'     ask days later; this is learned, too",
    "titans-infer models/mine --state book.state --fork 'And if?'  ask, and leave the state as it was",
    "titans-infer models/mine --file book.txt --question 'Who?' --question 'Where?'   read once, answer each",
    "titans-infer models/mine --chat --state me.state              chat; /help lists the commands",
    "titans-infer models/mine --perplexity book.txt                how well it predicts, by position",
    "cat *.log | titans-infer runs/logs --max-new-tokens 0 --json  for machines",
)

MAX_NEW_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the text, the state, how to draw tokens, and what to do."""
    add = parser.add_argument
    several: Any = {"action": "append", "default": []}
    add("model", metavar="MODEL", help="the folder of a saved model, or of a titans-train run")
    add("prompt", nargs="*", default=[], metavar="PROMPT", help="text to read after the files; words joined by spaces")
    file = "read this file exactly as it is; may be repeated; - is standard input, which is the default without PROMPT"
    add("--file", **several, metavar="FILE", help=file)
    question = "answer this after the text; may be repeated: the text is read once, and each answer sees one question"
    add("--question", **several, metavar="TEXT", help=question)
    add("--tokenizer", metavar="FILE", help="bytes, ids (numbers), or a tokenizer.json (default: the run's, or bytes)")
    add(
        "--state",
        metavar="FILE",
        help="continue from the state in this file, if there is one, and save it back at the end",
    )
    add("--fork", action="store_true", help="leave the file of --state as it is")
    add("--save", metavar="FILE", help="save the state here at the end, and leave the file of --state as it is")
    add("--no-write", action="store_true", help="freeze the memory: it answers from what it has learned so far")
    length = f"length of an answer (default: {MAX_NEW_TOKENS}; 0: read only)"
    add("--max-new-tokens", type=whole_number, default=MAX_NEW_TOKENS, metavar="N", help=length)
    add("--stop", **several, metavar="TEXT", help="end an answer before this text; may be repeated")
    add("--temperature", type=float, default=0.0, metavar="T", help="of the draw; 0, the default, takes the likeliest")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach this probability together")
    add("--seed", type=whole_number, metavar="N", help="draw the same tokens every time")
    draft = "guess several tokens, which the model checks at once: prompt, as in the text before; or by a smaller model"
    add("--draft", metavar="prompt|DIR", help=draft)
    add("--chat", action="store_true", help="chat line by line; the default on a terminal without a prompt")
    template = f"text to read for a line: {PLACEHOLDER} is the line, \\n its end (default: {DEFAULT_TEMPLATE})"
    add("--template", default=DEFAULT_TEMPLATE, metavar="TEXT", help=template)
    add("--perplexity", metavar="FILE", help="measure how well a text is predicted, by position; saves no --state")
    add("--buckets", metavar="N,N,...", help="positions at which --perplexity splits the text (default: 128,256,...)")
    add("--compare-frozen", action="store_true", help="--perplexity: read once more with the memory frozen")
    add("--plot", metavar="FILE.svg", help="--perplexity: a plot of it, by position (needs the extra `analyze`)")
    add_placement(parser, dtype=None)


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked before the model is loaded, and then do it."""
    _check(arguments)
    state = None if arguments.state is None else Path(arguments.state)
    target = state if arguments.save is None else Path(arguments.save)
    if arguments.save is None and (arguments.fork or arguments.perplexity is not None):  # measuring saves no state
        target = None
    if target is not None:
        check_state_file(target, "--state" if arguments.save is None else "--save")
    files = [arguments.perplexity] if arguments.perplexity is not None else arguments.file
    chatting = arguments.chat
    if not files and not arguments.prompt and not arguments.question and not chatting:
        chatting = sys.stdin is not None and sys.stdin.isatty() and not arguments.json
        files = [] if chatting else [STANDARD_INPUT]
    text = Text(files, arguments.prompt, "--file" if arguments.perplexity is None else "--perplexity")
    if arguments.compare_frozen and text.size is None:
        raise UsageError("--compare-frozen reads the text twice, which standard input or another pipe cannot be")
    edges = parse_edges(arguments.buckets)
    model, tokenizer = open_model(arguments.model, arguments.tokenizer, arguments.device, arguments.dtype)
    if target is not None and target != state:  # a state that is read is checked then
        expect_replaceable(target, model)
    draft = None if arguments.draft is None else open_draft(arguments.draft, model)
    session = Session(model, tokenizer, target, draft)
    if state is not None and state.exists():
        session.load(state)
    elif state is not None and target != state:  # nothing would be saved there
        raise UsageError(f"--state {state}: no such file, so there is nothing to continue from")
    if model.grows:
        complain("attention without a window: the state, and the time of a token, grow with the text", "warning")
    if arguments.no_write:
        with usage_errors("--no-write"):
            frozen = model.freeze_memory()
        if not frozen.names:
            complain("--no-write: this model has no memory that could be frozen", "warning")
    if arguments.perplexity is not None:
        return measure(session, text, edges, arguments)
    try:
        sampler = Sampler(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed, device=session.device
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"--{str(error).replace('_', '-')}") from None
    if not arguments.temperature and (stray := _first_given(arguments, "--top-k", "--top-p", "--seed")):
        raise UsageError(f"{stray}: is for drawing tokens, which needs --temperature above 0, as in --temperature 0.8")
    if arguments.question:
        return answer_questions(session, text, sampler, arguments)
    if chatting:
        return chat(session, text, sampler, arguments)
    return answer_prompt(session, text, sampler, arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ``UsageError`` for options that do not go together."""
    if arguments.perplexity is not None:
        if stray := _first_given(arguments, "--chat", "PROMPT", "--file", "--question", "--stop", "--draft"):
            raise UsageError(f"--perplexity measures one file and generates nothing: it takes no {stray}")
        if arguments.compare_frozen and arguments.no_write:
            raise UsageError("--compare-frozen compares with --no-write: give one of them")
    elif stray := _first_given(arguments, "--buckets", "--compare-frozen", "--plot"):
        raise UsageError(f"{stray}: says how --perplexity FILE measures, and there is no --perplexity")
    if arguments.question and arguments.chat:
        raise UsageError("--question: answers and ends; in a --chat, questions are its lines")
    if arguments.question and not arguments.max_new_tokens:
        raise UsageError("--question: has no answer with --max-new-tokens 0")
    if "" in arguments.question:
        raise UsageError("--question: expected a text, got none")
    if arguments.chat and arguments.json:
        raise UsageError("--chat prints no JSON document: give a prompt for each answer, and --state to continue")
    if arguments.chat and STANDARD_INPUT in arguments.file:
        raise UsageError("--chat: its lines come from standard input, which cannot be a --file, too")
    if PLACEHOLDER not in arguments.template:
        raise UsageError(f"--template {arguments.template}: expected {PLACEHOLDER} in it, where the line goes")
    if "" in arguments.stop:
        raise UsageError("--stop: expected a text, got none")
    if arguments.plot is not None:
        if not arguments.plot.endswith(".svg"):
            raise UsageError(f"--plot {arguments.plot}: the picture is SVG; expected a name that ends in .svg")
        check_writable(Path(arguments.plot), "--plot")
        need_matplotlib("analyze", "--plot")
    for option, name in (("--state", arguments.state), ("--save", arguments.save)):
        if name == "":
            raise UsageError(f"{option}: expected the name of a file, got none")
    if arguments.fork and arguments.state is None:
        raise UsageError("--fork: leaves the file of --state as it is, and there is no --state")


def _first_given(arguments: argparse.Namespace, *options: str) -> str | None:
    """The first of ``options`` that has a value; 0 is one."""
    given = {option: getattr(arguments, option.removeprefix("--").replace("-", "_").lower()) for option in options}
    return next((option for option, value in given.items() if value not in (None, [], "") and value is not False), None)

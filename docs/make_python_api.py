"""Writes ``python.md``, the page of the Python API, from the code: ``python docs/make_python_api.py``."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("python.md")
WIDTH = 110
HEAD = """# Python API

<!-- written by `python docs/make_python_api.py` -->

The public names with their signatures, generated from the code. `tb` is `titans_build`. The errors that a program may
catch are under [Errors](#errors)."""

SECTIONS: dict[str, list[str]] = {
    "Recipes and models": [
        "tb.load_recipe",
        "tb.build",
        "tb.save",
        "tb.load",
        "tb.save_state",
        "tb.load_state",
    ],
    "A model": [
        "blocks.LanguageModel.forward",
        "blocks.LanguageModel.init_state",
        "blocks.LanguageModel.generate",
        "blocks.generation.generate",
        "blocks.language_model.ModelOutput.rewind",
        "tb.PrefixCache",
        "tb.PrefixCache.read",
        "blocks.LanguageModel.freeze_memory",
        "tb.parallelize",
    ],
    "States": [
        "tb.state.select",
        "tb.state.concatenate",
        "tb.state.reset",
        "tb.state.where",
        "tb.state.rewind",
        "tb.state.detach",
        "tb.state.trainable",
        "tb.state.to",
        "tb.state.batch_size",
        "tb.state.nbytes",
        "tb.state.named_tensors",
        "tb.state.map_state",
    ],
    "Blocks": [
        "tb.NeuralMemory",
        "tb.Block",
        "tb.register",
        "tb.create",
        "tb.build_block",
        "tb.check_block",
        "tb.list_blocks",
        "tb.describe",
        "tb.adapt",
    ],
    "Observing memories, and losses": ["tb.observe", "tb.memory_check", "tb.memory_loss", "tb.write_cost"],
    "Memory in other models": ["tb.swap", "tb.unswap", "tb.memory", "tb.save_swaps", "tb.load_swaps"],
    "transformers": [
        "huggingface.as_pretrained",
        "huggingface.from_pretrained",
        "huggingface.TitansBuildForSequenceClassification",
        "huggingface.parameter_groups",
        "huggingface.DecayMixin",
        "huggingface.tokenizer_of",
        "huggingface.byte_tokenizer",
    ],
    "Training and evaluation": [
        "tb.train",
        "tb.compare",
        "tb.search",
        "tb.perplexity",
        "tb.open_source",
        "tb.Task",
        "tb.register_task",
        "tb.list_tasks",
    ],
    "The memory operation": [
        "kernels.memory.titans_memory",
        "kernels.memory.learn",
        "kernels.memory.read_memory",
        "kernels.memory.MemoryState",
        "kernels.memory.LearnerState",
    ],
    "Parts of a learner": [
        "tb.register_network",
        "tb.register_objective",
        "tb.register_optimizer",
        "tb.register_retention",
        "tb.register_features",
        "kernels.memory.learner.Network",
        "kernels.memory.learner.Objective",
        "kernels.memory.learner.Optimizer",
        "kernels.memory.learner.Retention",
        "kernels.memory.learner.Features",
    ],
    "Errors": [
        "tb.RecipeError",
        "tb.Unavailable",
        "tb.StorageError",
        "tb.SwapError",
        "tb.LawError",
        "tb.BackendError",
    ],
}
"""Sections of the page with the names in them. A name that starts with ``tb`` is public in ``titans_build``."""
WITHOUT_SECTION = {"Spec", "__version__", "state"}
"""Public names that are no function or class."""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        for name in names:
            text = inspect.cleandoc(resolve(name).__doc__ or "")
            parts += [f"### {name.removeprefix('blocks.')}", f"```py\n{signature(name)}\n```", markdown(text)]
    return "\n\n".join(part for part in parts if part) + "\n"


def resolve(name: str) -> Any:
    """The object of a name in ``SECTIONS``."""
    first, *rest = name.split(".")
    found = importlib.import_module("titans_build" if first == "tb" else f"titans_build.{first}")
    for part in rest:
        if not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    return found


def signature(name: str) -> str:
    """``tb.build(recipe, *, device='cpu')``, over several lines where it is long."""
    thing = resolve(name)
    called = re.sub(r"^(blocks|kernels\.memory|huggingface)\.", "", name)
    if inspect.isclass(thing) and (issubclass(thing, Exception) or inspect.isabstract(thing)):
        return f"class {called}({thing.__mro__[1].__name__})"
    parts, star = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {plain_type(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {value(parameter.default)}"
        parts.append(f"{prefix}{parameter.name}{annotation}{default}")
    returned = inspect.signature(thing).return_annotation
    none = inspect.isclass(thing) or returned in (inspect.Signature.empty, "None")
    arrow = "" if none else f" -> {plain_type(returned)}"
    line = f"{called}({', '.join(parts)}){arrow}"
    if len(line) <= WIDTH:
        return line
    inner = textwrap.fill(", ".join(part.replace(" ", "\0") for part in parts) + ",", WIDTH - 4, break_long_words=False)
    return f"{called}(\n{textwrap.indent(inner.replace(chr(0), ' '), '    ')}\n){arrow}"


def plain_type(annotation: Any) -> str:
    """An annotation as it is written, without what ``Annotated`` adds to a type."""
    tree = ast.parse(annotation if isinstance(annotation, str) else inspect.formatannotation(annotation), mode="eval")

    class Strip(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            self.generic_visit(node)
            if isinstance(node.value, ast.Name) and node.value.id == "Annotated":
                assert isinstance(node.slice, ast.Tuple)
                return node.slice.elts[0]
            return node

    return ast.unparse(Strip().visit(tree))


def value(default: Any) -> str:
    """A default value, if it is short and the same in every process."""
    text = repr(default)
    return text if len(text) <= 40 and " at 0x" not in text else "..."


def markdown(text: str) -> str:
    """reStructuredText of docstrings as Markdown."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"``\1``", text)
    paragraphs, code = [], False
    for paragraph in re.split(r"\n\s*\n", text):
        if code and paragraph.startswith("    "):
            paragraphs.append(f"```py\n{textwrap.dedent(paragraph)}\n```")
            continue
        code = paragraph.endswith("::")
        paragraph = re.sub(r"^Example::$", "Example:", paragraph).removesuffix(":") if code else paragraph
        if paragraph.startswith("Args:"):
            paragraph = "\n".join(arguments(paragraph.splitlines()[1:]))
        paragraphs.append(paragraph.replace("``", "`"))
    return "\n\n".join(paragraphs).replace("\n```\n\n```py\n", "\n\n")


def arguments(lines: list[str]) -> list[str]:
    """The lines of a section ``Args:`` as a list."""
    text = textwrap.dedent("\n".join(lines))
    return [re.sub(r"^([\w*]+):", r"- `\1`:", line) for line in text.replace("\n    ", " ").splitlines()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

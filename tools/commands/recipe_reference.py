"""The reference of recipes: a Markdown page from the schemas that validate them, and the packaged recipes."""

from __future__ import annotations

import importlib.resources
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ... import recipes
from ...kernels.memory.learner import CATALOGUES
from ...registry import Catalogue, Description, describe, show
from ..terminal import plain

COMMAND = "titans-build schema --markdown"
HEAD = f"""# Recipes: the reference

<!-- written by `{COMMAND} > docs/recipes.md` -->

A recipe is a YAML or JSON file that describes a model. [concepts.md](concepts.md) explains the terms. `{COMMAND}`
generates this page from the schemas that validate recipes. `titans-build describe BLOCK` prints a part of it, and
`titans-build schema` prints a JSON Schema for editors.

A block can be written in three ways:

| written | meaning |
| --- | --- |
| `memory` | the block of that name, with its defaults |
| `{{type: memory, depth: 1}}` | a block with values for some fields |
| `[memory, ffn]` | a chain of blocks |

`dim` is the width of all blocks. Unknown fields and names are rejected; the message names the nearest valid one. All
errors of a file are reported at once, each with its path, such as `layers.mac.0.memory.depht`. The same paths change
values: `--set layers.mac.0.segment=256`, or `load_recipe(..., overrides={{...}})`.

Fields marked ∘ may change while the weights of a model are kept: by `tb.load(..., overrides={{...}})`, `--set` of a
saved model, and the [stages](train.md#stages) of a run. Other changes of a trained model are refused.
`Annotated[int, registry.SameWeights()]` marks a field of a custom block."""


def recipe_page(blocks: Sequence[str]) -> str:
    """The whole page, with these blocks in this order."""
    parts = [HEAD, "## The file", *_file(), "## Blocks", _contents(blocks)]
    for name in blocks:
        parts += block_section(name)
    parts += ["## Parts of a learner", PARTS]
    for kind, catalogue in CATALOGUES.items():
        parts += [f"### {kind}", *_parts(catalogue)]
    return "\n\n".join([*parts, "## Packaged recipes", _packaged()]) + "\n"


PARTS = """The fields `network`, `objective`, `optimizer`, `retention` and `features` of [`memory`](#memory) hold a
part: its name, or a mapping with its type and fields, such as `objective: {type: huber, delta: 0.5}`.
[Learners](learners.md) has the equations. `@tb.register_objective("name")`, and its like for each kind, add more."""


def _parts(catalogue: Catalogue) -> Iterator[str]:
    rows = []
    for name in catalogue.known_names():
        description = describe(name, catalogue)
        fields = [
            f"`{field.name}`: {field.type}, `{show(field.default)}`; {field.description}"
            for field in description.fields
        ]
        rows.append([f"`{name}`", _markdown(description.summary), "<br>".join(map(_markdown, fields))])
    yield _table(["name", "description", "fields"], rows)


def block_section(name: str) -> list[str]:
    """The paragraphs about one block. Raises ``RecipeError`` for an unknown name."""
    description = describe(name)
    parts = [f"### {name}", _markdown(description.doc)]
    if description.source != "titans_build":
        parts.append(f"From the package `{description.source}`.")
    if description.protocols:
        parts.append(f"Usable as: {', '.join(description.protocols)}.")
    if description.variant_of is None:
        return [*parts, _fields(description)]
    original = {field.name: field.default for field in describe(description.variant_of).fields}
    changed = [field for field in description.fields if field.default != original.get(field.name)]
    same = f"All other fields are those of [`{description.variant_of}`](#{description.variant_of})."
    if not changed:
        return [*parts, same]
    rows = [[f"`{field.name}`", f"`{show(field.default)}`"] for field in changed]
    return [*parts, _table(["field", "default"], rows), same]


def _file() -> Iterator[str]:
    schema = recipes.recipe_schema()
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema["required"] else f"`{show(field.get('default'))}`"
        rows.append([f"`{name}`", _kind(field), default, field.get("description", "")])
    yield _table(["key", "type", "default", "meaning"], rows)
    pattern = schema["properties"]["layers"]["propertyNames"]["pattern"]
    yield (
        "An item of `stack` is the name of a layer, or `{repeat: 2, of: [...]}` around further items.\n"
        f"Layers have names that match `{pattern}`, and each must occur in the stack."
    )


def _kind(field: dict[str, Any]) -> str:
    if "const" in field:
        return f"{field['const']}"
    kinds = field.get("type", "array")
    words = [_KINDS[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if "maximum" in field:
        words[0] += f" from {field['minimum']} to {field['maximum']}"
    return " or ".join(words)


_KINDS = {"array": "list", "object": "mapping", "string": "text", "boolean": "true or false",
          "integer": "integer", "null": "null"}  # fmt: skip


def _contents(blocks: Sequence[str]) -> str:
    rows = [[f"[`{name}`](#{name})", _markdown(describe(name).doc.partition("\n")[0])] for name in blocks]
    return _table(["block", "description"], rows)


def _fields(description: Description) -> str:
    if not description.fields:
        return "It has no fields."
    rows = []
    for field in description.fields:
        default = "required" if field.required else f"`{show(field.default)}`"
        meaning = _markdown(field.description) + " ∘" * field.keeps_weights
        rows.append([f"`{field.name}`", field.type, default, meaning])
    return _table(["field", "type", "default", "meaning"], rows)


def _packaged() -> str:
    rows = [
        [f"`{name}`", summary(name), " ".join(f"`{size}`" for size in sizes_of(name))]
        for name in recipes.packaged_names()
        if base_name(name) == name
    ]
    return _table(["recipe", "description", "sizes"], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _markdown(text: str) -> str:
    """A docstring's text: code in single quotes, and no roles."""
    marked = re.sub(r"``([^`]*)``", r"§\1§", re.sub(r":\w+:`~?([^`]*)`", r"``\1``", text))
    return plain(marked).replace("§", "`")


# -- packaged recipes --------------------------------------------------------------------------------------------------


def recipe_text(name: str) -> str | None:
    """The file of a packaged recipe; ``None`` for a size of one, and for any other name."""
    if name not in recipes.packaged_names() or base_name(name) != name:
        return None
    return importlib.resources.files(recipes).joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The first sentence of the comment at the head of a packaged recipe's file."""
    base = base_name(name)
    lines = itertools.takewhile(lambda line: line.startswith("#"), (recipe_text(base) or "").splitlines())
    comment = " ".join(line[1:].strip() for line in lines)
    sentence = re.split(r"\.(?: |$)", comment, maxsplit=1)[0]
    return sentence if base == name else f"{sentence}; size {name.removeprefix(base + '-')}"


def sizes_of(name: str) -> list[str]:
    """The packaged recipes that are sizes of one: ``mac-170m`` of ``mac``."""
    return [other for other in recipes.packaged_names() if other != name and base_name(other) == name]


def base_name(name: str) -> str:
    """``mac`` of ``mac-170m``; a recipe that is no size of another is its own base."""
    base = name.rpartition("-")[0]
    return base if base in recipes.packaged_names() else name

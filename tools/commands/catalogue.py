"""``titans-build list``, ``describe``, ``show``, ``schema`` and ``kernels``: the blocks, recipes and backends."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
from pathlib import Path

from rich.text import Text

from ... import recipes, registry
from ...kernels import dispatch
from ...kernels.memory.learner import CATALOGUES
from ...recipes.loading import nearest_recipe
from ...recipes.parse import is_recipe_file
from ...registry import nearest, show
from ..command_line import Command
from ..options import add_pattern, add_placement, add_recipe, load, placement
from ..terminal import (
    Columns,
    UsageError,
    complain,
    paragraphs,
    plain,
    say,
    say_columns,
    say_json,
    say_prose,
    terminal_width,
)
from .recipe_reference import base_name, block_section, recipe_page, recipe_text, sizes_of, summary

# -- list --------------------------------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    pattern: str = arguments.pattern
    rows = registry.list_rows(pattern)
    packaged = [name for name in recipes.packaged_names() if fnmatch.fnmatchcase(name, pattern)]
    parts = {
        kind: [row for row in catalogue.rows(pattern) if row.problem is None] for kind, catalogue in CATALOGUES.items()
    }
    if not rows and not packaged and not any(parts.values()):
        hint = nearest(pattern, registry.list_blocks()) or nearest_recipe(pattern.strip("*?"))
        raise UsageError(f"no block and no recipe is called {show(pattern)}{hint}")
    described = {row.name: registry.describe(row.name) for row in rows if row.problem is None}
    fields = {name: each.fields for name, each in described.items()}
    if arguments.json:
        blocks = [
            {
                "name": row.name,
                "summary": row.summary,
                "source": row.source,
                "problem": row.problem,
                "fields": {
                    field.name: {"type": field.type, "required": field.required, "default": field.default}
                    for field in fields.get(row.name, [])
                },
            }
            for row in rows
        ]
        shown = [{"name": name, "summary": summary(name)} for name in packaged]
        members = [
            {"field": kind, "name": row.name, "summary": row.summary, "source": row.source}
            for kind, found in parts.items()
            for row in found
        ]
        say_json({"blocks": blocks, "parts": members, "recipes": shown})
        return 0
    if rows:
        _say_blocks(rows, _changed_fields(described))
    if any(parts.values()):
        say("")
        _say_parts(parts)
    if rows and packaged:
        say("")
    if packaged:
        _say_recipes(packaged)
    return 0


def _say_blocks(rows: list[registry.Row], fields: dict[str, list[registry.FieldDescription]]) -> None:
    table = Columns("block", "description", "fields and defaults")
    for row in rows:
        if row.problem is not None:
            table.add(row.name, Text(f"{row.problem} (from {row.source})", style="yellow"), "")
            continue
        source = "" if row.source == "titans_build" else f" (from {row.source})"
        defaults = (f.name if f.required else f"{f.name}={show(f.default)}" for f in fields[row.name])
        table.add(Text(row.name, style="bold cyan"), plain(row.summary) + source, ", ".join(defaults))
    say_columns(table)


def _changed_fields(described: dict[str, registry.Description]) -> dict[str, list[registry.FieldDescription]]:
    """The fields of each block; of a variant of another, those with other defaults."""
    changed = {}
    for name, each in described.items():
        others = [] if each.variant_of is None else registry.describe(each.variant_of).fields
        original = {f.name: f.default for f in others}
        changed[name] = [f for f in each.fields if f.name not in original or original[f.name] != f.default]
    return changed


def _say_parts(parts: dict[str, list[registry.Row]]) -> None:
    table = Columns("field of memory", "part", "description")
    for kind, rows in parts.items():
        for row in rows:
            table.add(kind, Text(row.name, style="bold cyan"), plain(row.summary))
    say_columns(table)


def _say_recipes(packaged: list[str]) -> None:
    table = Columns("recipe", "description", "sizes")
    for name in packaged:
        base = base_name(name)
        if base == name or base not in packaged:
            sizes = [other.removeprefix(f"{name}-") for other in sizes_of(name) if other in packaged]
            table.add(Text(name, style="bold cyan"), summary(name), " ".join(sizes))
    say_columns(table)
    if any(base_name(name) != name for name in packaged):
        say_prose("", Text("a size is a suffix of the name: titans-build mac-170m", style="dim"))


LIST = Command(
    "List the blocks with their defaults, and the packaged recipes.",
    (
        "titans-build list",
        "titans-build list '*mem*'      names that match a wildcard",
        "titans-build list --json | jq -r '.blocks[].name'",
    ),
    add_pattern,
    _list,
)

# -- describe ----------------------------------------------------------------------------------------------------------


def _add_block(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("block", metavar="BLOCK", help="the name of a block (see `titans-build list`)")


def _describe(arguments: argparse.Namespace) -> int:
    _refuse_recipe(arguments.block)
    kinds = [] if arguments.block in registry.list_blocks() else CATALOGUES.values()
    part = next((catalogue for catalogue in kinds if arguments.block in catalogue.known_names()), None)
    description = registry.describe(arguments.block) if part is None else registry.describe(arguments.block, part)
    if arguments.json:
        say_json(dataclasses.asdict(description))
        return 0
    say_prose(Text.assemble((description.name, "bold cyan"), f"  ({description.source}, {description.place})"), "")
    doc = plain(description.doc)
    width = terminal_width()
    fits = width is None or all(len(line) <= width for line in doc.splitlines())
    say_prose(*(doc.splitlines() if fits else paragraphs(doc)), "")
    if part is not None:
        say_prose(f"Usable as: the field {part.kind} of memory", "")
    if description.protocols:
        say_prose(f"Usable as: {', '.join(description.protocols)}", "")
    if not description.fields:
        say("It has no fields.")
        return 0
    table = Columns("field", "type", "default", "meaning")
    for field in description.fields:
        default = Text("required", style="yellow") if field.required else Text(show(field.default))
        table.add(Text(field.name, style="bold"), field.type, default, plain(field.description))
    say_columns(table)
    return 0


def _refuse_recipe(name: str) -> None:
    """Raise ``UsageError`` if ``name`` is a recipe and not a block."""
    if name not in registry.list_blocks() and (name in recipes.packaged_names() or is_recipe_file(Path(name))):
        shown = show(name, 200)
        raise UsageError(
            f"{shown} is a recipe, not a block: `titans-build {name}` shows its parts, "
            f"`titans-build diagram {name}` draws it"
        )


DESCRIBE = Command(
    "Describe a block, or a part of a memory, and its fields: types, defaults and meaning.",
    ("titans-build describe memory", "titans-build describe huber", "titans-build describe context --json"),
    _add_block,
    _describe,
)

# -- show --------------------------------------------------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    recipe = load(arguments.recipe, arguments)
    if arguments.json:
        say_json(recipe.to_dict())
    else:
        text = None if arguments.set else recipe_text(arguments.recipe)
        say(*(recipe.to_yaml() if text is None else text).splitlines())
    return 0


SHOW = Command(
    "Print a recipe as YAML: the file of a packaged one, any other with all fields.",
    (
        "titans-build show mac",
        "titans-build show mac > my.yaml                        a recipe to start from",
        "titans-build show mag-170m --set layers.mag.1.hidden=1024",
    ),
    add_recipe,
    _show,
)

# -- schema ------------------------------------------------------------------------------------------------------------


def _add_schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("block", nargs="?", metavar="BLOCK", help="one block's schema instead of the whole recipe's")
    parser.add_argument("--markdown", action="store_true", help="print a page in Markdown instead of a JSON Schema")


def _schema(arguments: argparse.Namespace) -> int:
    if arguments.block is not None:
        _refuse_recipe(arguments.block)
    if not arguments.markdown:
        # a schema is JSON with or without --json
        say_json(recipes.recipe_schema() if arguments.block is None else registry.block_schema(arguments.block))
        return 0
    usable = [row.name for row in registry.list_rows() if row.problem is None]
    page = recipe_page(usable) if arguments.block is None else "\n\n".join(block_section(arguments.block)) + "\n"
    if arguments.json:
        say_json({"markdown": page})
    else:
        say(*page.splitlines())
    return 0


SCHEMA = Command(
    "Print the JSON Schema of recipe files, or of one block, for completion and checking in editors.",
    (
        "titans-build schema > titans-recipe.schema.json",
        "titans-build schema memory",
        "titans-build schema --markdown > recipes.md    the reference of all installed blocks",
        "put `# yaml-language-server: $schema=titans-recipe.schema.json` at the top of a recipe to use it",
    ),
    _add_schema,
    _schema,
)

# -- kernels -----------------------------------------------------------------------------------------------------------


def _kernels(arguments: argparse.Namespace) -> int:
    """2 if the environment names a backend that does not exist."""
    device, dtype = placement(arguments.device, arguments.dtype)
    rows = dispatch.table(device.type, dtype)
    # running these operations would fail with the same message
    problems = list(dict.fromkeys(row.error for row in rows if row.error))
    for problem in problems:
        complain(problem)
    if arguments.json:
        operations = [row._asdict() for row in rows]
        say_json({"device": str(device), "dtype": arguments.dtype, "operations": operations, "problems": problems})
        return 2 if problems else 0
    table = Columns("operation", "backend", "status", "why not")
    previous = ""
    for row in rows:
        state = ("taken", "bold green") if row.chosen else ("available", "") if row.available else ("refused", "yellow")
        table.add(row.operation if row.operation != previous else "", row.backend, Text(*state), row.reason)
        previous = row.operation
    setting = os.environ.get(dispatch.VARIABLE)
    say_prose(f"on {device} in {arguments.dtype}" + (f", with {dispatch.VARIABLE}={setting}" if setting else ""), "")
    say_columns(table)
    return 2 if problems else 0


KERNELS = Command(
    "Show the backends of every operation: which one is used, and why the others are not.",
    (
        "titans-build kernels",
        "titans-build kernels --device cuda --dtype bfloat16",
        f"{dispatch.VARIABLE}=attention=reference titans-build kernels",
    ),
    add_placement,
    _kernels,
)

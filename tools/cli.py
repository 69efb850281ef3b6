"""``titans-build``: the commands of the script."""

from __future__ import annotations

from . import build, check, describe, diagram, kernels, listing, new_block, schema
from .command import Command, Program

COMMANDS: dict[str, Command] = {
    "list": listing,
    "describe": describe,
    "check": check,
    "schema": schema,
    "kernels": kernels,
    "diagram": diagram,
    "new-block": new_block,
}
"""A first word that is none of these names a recipe to build."""

PROGRAM = Program(
    "titans-build",
    build,
    COMMANDS,
    saving_memory="try a smaller recipe, --dtype bfloat16, or fewer bytes to --try",
)
main, run = PROGRAM.main, PROGRAM.run

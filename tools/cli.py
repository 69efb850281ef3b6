"""``titans-build``: the console script."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from . import build, check, describe, diagram, kernels, listing, new_block, schema

    modules = {
        "": build,
        "list": listing,
        "describe": describe,
        "check": check,
        "schema": schema,
        "kernels": kernels,
        "diagram": diagram,
        "new-block": new_block,
    }
    return {name: Command.of(module) for name, module in modules.items()}


PROGRAM = Program(
    "titans-build", _commands, saving_memory="try a smaller recipe, --dtype bfloat16, or fewer bytes to --try"
)
main, run = PROGRAM.main, PROGRAM.run

"""``titans-build``: the console script."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from . import diagram
    from .commands import build, catalogue, new_block

    return {
        "": build.BUILD,
        "list": catalogue.LIST,
        "describe": catalogue.DESCRIBE,
        "show": catalogue.SHOW,
        "check": build.CHECK,
        "schema": catalogue.SCHEMA,
        "kernels": catalogue.KERNELS,
        "diagram": Command.of(diagram),
        "new-block": new_block.NEW_BLOCK,
    }


PROGRAM = Program(
    "titans-build",
    _commands,
    saving_memory="try a smaller recipe, --dtype bfloat16, or fewer bytes to --try",
    needs_reader=False,
)
main, run = PROGRAM.main, PROGRAM.run

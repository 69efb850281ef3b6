"""``titans-analyze``: the console script."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from .analysis import script

    return {"": Command.of(script)}


PROGRAM = Program(
    "titans-analyze",
    _commands,
    saving_memory="try fewer --tokens, fewer --pairs, or --device of another machine",
    needs_reader=False,
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

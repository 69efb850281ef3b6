"""``titans-infer``: the console script."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from .inference import script

    return {"": Command.of(script)}


PROGRAM = Program(
    "titans-infer", _commands, saving_memory="try --dtype bfloat16, or a model whose attention has a window"
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

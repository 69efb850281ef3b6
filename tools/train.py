"""``titans-train``: the console script. ``torchrun ... -m titans_build.tools.train`` runs it, too."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from .training import train_command
    from .training.commands import COMMANDS

    return {"": Command.of(train_command), **COMMANDS}


PROGRAM = Program(
    "titans-train",
    _commands,
    saving_memory="try a smaller --batch, -t accumulate=4, -t recompute=true or -t autocast=bfloat16",
    json_lines=True,
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

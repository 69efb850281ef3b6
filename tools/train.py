"""``titans-train``: the console script. ``torchrun ... -m titans_build.tools.train`` runs it, too."""

from __future__ import annotations

from .command_line import Command, Program


def _commands() -> dict[str, Command]:
    from .training import compare_command, search_command, tasks_command, train_command

    modules = {"": train_command, "compare": compare_command, "search": search_command, "tasks": tasks_command}
    return {name: Command.of(module) for name, module in modules.items()}


PROGRAM = Program(
    "titans-train",
    _commands,
    saving_memory="try a smaller --batch, -t accumulate=4, -t recompute=true or -t autocast=bfloat16",
    json_lines=True,
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

"""``titans-train``: the commands of the script. ``torchrun ... -m titans_build.tools.train`` runs it, too."""

from __future__ import annotations

from .command import Program
from .training import comparing_script, script, searching_script, task_listing

PROGRAM = Program(
    "titans-train",
    script,
    {"compare": comparing_script, "search": searching_script, "tasks": task_listing},
    saving_memory="try a smaller --batch, -t accumulate=4, -t recompute=true or -t autocast=bfloat16",
    json_lines=True,
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

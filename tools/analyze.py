"""``titans-analyze``: the commands of the script, which is one."""

from __future__ import annotations

from .analysis import script
from .command import Program

PROGRAM = Program(
    "titans-analyze", script, saving_memory="try fewer --tokens, fewer --pairs, or --device of another machine"
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

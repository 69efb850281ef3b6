"""``titans-infer``: the commands of the script, which is one."""

from __future__ import annotations

from .command import Program
from .inference import script

PROGRAM = Program(
    "titans-infer",
    script,
    saving_memory="try --dtype bfloat16, or a model whose attention has a window",
)
main, run = PROGRAM.main, PROGRAM.run

if __name__ == "__main__":
    run()

"""Runs commands in processes that need not import torch again: forks of this one, which has imported it.

Reads a line of JSON for each request, a list of processes ``[module, words, files, environment]``. Answers with their
numbers, and at their end with their exit statuses and the most memory that they held, in KiB. A process runs
``module.run()`` with its standard streams in ``files``: paths, or null for a stream that is closed.
"""

import importlib
import json
import os
import signal
import sys
import traceback

from titans_build import build, load_recipe, train  # noqa: F401 - importing them is most of what a command takes


def start(module: str, words: list[str], files: list[str | None], environment: dict[str, str]) -> None:
    signal.alarm(900)
    os.environ.update(environment)
    for number, (file, name) in enumerate(zip(files, ("stdin", "stdout", "stderr"))):
        if file is None:
            os.close(number)
            setattr(sys, name, None)
        else:
            same = number == 2 and file == files[1]
            opened = 1 if same else os.open(file, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
            os.dup2(opened, number)
            if not same:
                os.close(opened)
    sys.argv = [module.rpartition(".")[2], *words]
    status = 0
    try:
        importlib.import_module(module).run()
    except SystemExit as end:
        status = end.code
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(status)  # the end of an interpreter that has imported torch takes most of a second


for line in iter(sys.stdin.readline, ""):
    children = []
    for request in json.loads(line):
        child = os.fork()
        if not child:
            try:
                start(*request)
            finally:
                traceback.print_exc()
                os._exit(120)
        children.append(child)
    print(json.dumps(children), flush=True)
    ends = [os.wait4(child, 0) for child in children]
    print(json.dumps([(os.waitstatus_to_exitcode(end), usage.ru_maxrss) for _, end, usage in ends]), flush=True)

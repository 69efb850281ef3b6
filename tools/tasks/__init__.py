"""Generated tasks by name: rows made by a rule, without end, each a pure function of its index."""

from . import automaton, copying, forecasting, needle, recall, state_tracking  # noqa: F401 - they register the built-in tasks
from .task import ENTRY_POINT_GROUP, IGNORED, TASKS, Rows, Task, list_tasks, make_task, register_task, scratch

__all__ = [
    "ENTRY_POINT_GROUP",
    "IGNORED",
    "TASKS",
    "Rows",
    "Task",
    "list_tasks",
    "make_task",
    "register_task",
    "scratch",
]

"""Generated tasks by name: rows made by a rule, without end, each a pure function of its number."""

from . import copy, mqar, needle, needle_kv, recall, repeat, selective_copy
from .task import (
    ENTRY_POINT_GROUP,
    IGNORED,
    TASKS,
    Rows,
    Task,
    TaskRow,
    list_tasks,
    make_task,
    register_task,
    scratch,
    task_rows,
)

BUILT_IN = (copy, mqar, needle, needle_kv, recall, repeat, selective_copy)
"""The modules whose tasks come along."""

__all__ = [
    "BUILT_IN",
    "ENTRY_POINT_GROUP",
    "IGNORED",
    "TASKS",
    "Rows",
    "Task",
    "TaskRow",
    "list_tasks",
    "make_task",
    "register_task",
    "scratch",
    "task_rows",
]

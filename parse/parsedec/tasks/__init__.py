"""Tasks: problems, and programs that say whether an answer is right. Each has a YAML file in conf/task/."""

from parsedec.tasks.base import Problem, Score, Task, TaskDataError
from parsedec.tasks.choice import Choice
from parsedec.tasks.code import Code
from parsedec.tasks.hub import Hub
from parsedec.tasks.jsonl import JsonlTask
from parsedec.tasks.maths import Maths
from parsedec.tasks.open_ended import OpenEnded
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.tasks.zoo_lists import ZooLists

__all__ = [
    "Choice",
    "Code",
    "Hub",
    "JsonlTask",
    "Maths",
    "OpenEnded",
    "Problem",
    "Score",
    "Task",
    "TaskDataError",
    "ZooArithmetic",
    "ZooLists",
]

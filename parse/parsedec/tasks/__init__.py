"""Tasks: problems and the programs that say whether an answer is right. One class, one YAML in conf/task/."""

from parsedec.tasks.base import Problem, Score, Task
from parsedec.tasks.gsm8k import Gsm8k
from parsedec.tasks.humaneval import HumanEval
from parsedec.tasks.jsonl import JsonlTask
from parsedec.tasks.zoo_arithmetic import ZooArithmetic
from parsedec.tasks.zoo_lists import ZooLists

__all__ = ["Gsm8k", "HumanEval", "JsonlTask", "Problem", "Score", "Task", "ZooArithmetic", "ZooLists"]

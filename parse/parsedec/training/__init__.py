"""Training of models that solve and judge: packed examples, the loop, evaluation, recipes (`experiments/train.py`)."""

from parsedec.training.evaluation import evaluate
from parsedec.training.loop import Schedule, Trainer
from parsedec.training.packing import Answer, Packer, Row
from parsedec.training.recipe import run_recipe
from parsedec.training.solve_judge import Optimisation, SolveAndJudge

__all__ = [
    "Answer",
    "Optimisation",
    "Packer",
    "Row",
    "Schedule",
    "SolveAndJudge",
    "Trainer",
    "evaluate",
    "run_recipe",
]

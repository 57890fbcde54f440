"""Training of models that solve and judge: packed examples, the loop, evaluation, recipes (`experiments/train.py`)."""

from parsedec.training.evaluation import evaluate
from parsedec.training.loop import Optimisation, Trainer
from parsedec.training.packing import Answer, Packer, Row
from parsedec.training.recipe import run_recipe

__all__ = ["Answer", "Optimisation", "Packer", "Row", "Trainer", "evaluate", "run_recipe"]

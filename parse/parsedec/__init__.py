"""PARSE: parallel prefix verification for speculative generation (arXiv 2605.04263), as composable middleware."""

from parsedec.batch import BatchResult
from parsedec.drop_in import hf_generate
from parsedec.engine import Parse
from parsedec.errors import ParsedecError
from parsedec.experiment.trace import write_trace
from parsedec.judge import LabelJudge
from parsedec.model import LanguageModel, load
from parsedec.outer import PrefixVerification, TargetOnly
from parsedec.types import Delta, Limits, Result, Sampling, StopReason

__all__ = [
    "BatchResult",
    "Delta",
    "LabelJudge",
    "LanguageModel",
    "Limits",
    "Parse",
    "ParsedecError",
    "PrefixVerification",
    "Result",
    "Sampling",
    "StopReason",
    "TargetOnly",
    "hf_generate",
    "load",
    "write_trace",
]

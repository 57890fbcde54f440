"""PARSE: parallel prefix verification for speculative generation (arXiv 2605.04263), as composable middleware.

A name is imported when it is first used: torch and transformers take seconds, for which `--help` and a misspelt setting
should not have to wait.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parsedec.batch import BatchResult as BatchResult
    from parsedec.drop_in import hf_generate as hf_generate
    from parsedec.engine import Parse as Parse
    from parsedec.errors import ParsedecError as ParsedecError
    from parsedec.experiment.trace import write_trace as write_trace
    from parsedec.judge import LabelJudge as LabelJudge
    from parsedec.model import LanguageModel as LanguageModel
    from parsedec.model import load as load
    from parsedec.outer import PrefixVerification as PrefixVerification
    from parsedec.outer import TargetOnly as TargetOnly
    from parsedec.types import Delta as Delta
    from parsedec.types import Limits as Limits
    from parsedec.types import Result as Result
    from parsedec.types import Sampling as Sampling
    from parsedec.types import StopReason as StopReason

_HOMES = {
    "BatchResult": "batch",
    "Delta": "types",
    "LabelJudge": "judge",
    "LanguageModel": "model",
    "Limits": "types",
    "Parse": "engine",
    "ParsedecError": "errors",
    "PrefixVerification": "outer",
    "Result": "types",
    "Sampling": "types",
    "StopReason": "types",
    "TargetOnly": "outer",
    "hf_generate": "drop_in",
    "load": "model",
    "write_trace": "experiment.trace",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""PARSE: parallel prefix verification for speculative generation (arXiv 2605.04263), as composable middleware.

A name is imported when it is first used: torch and transformers take seconds, for which `--help` and a misspelt setting
should not have to wait.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parsedec.acceptance import Acceptance as Acceptance
    from parsedec.acceptance import Nucleus as Nucleus
    from parsedec.acceptance import Siblings as Siblings
    from parsedec.acceptance import Traversal as Traversal
    from parsedec.acceptance import Typical as Typical
    from parsedec.batching.batch import BatchResult as BatchResult
    from parsedec.boundary import BoundaryRule as BoundaryRule
    from parsedec.boundary import FirstFailure as FirstFailure
    from parsedec.boundary import LongestValid as LongestValid
    from parsedec.boundary import Smoothed as Smoothed
    from parsedec.drop_in import hf_generate as hf_generate
    from parsedec.engine import Parse as Parse
    from parsedec.errors import ParsedecError as ParsedecError
    from parsedec.experiment.trace import write_trace as write_trace
    from parsedec.gate import Adaptive as Adaptive
    from parsedec.gate import Always as Always
    from parsedec.gate import Gate as Gate
    from parsedec.gate import Never as Never
    from parsedec.inner import InnerSpeculator as InnerSpeculator
    from parsedec.inner import NoSpeculation as NoSpeculation
    from parsedec.judge import CombinedJudge as CombinedJudge
    from parsedec.judge import ConfidenceJudge as ConfidenceJudge
    from parsedec.judge import DigitJudge as DigitJudge
    from parsedec.judge import Judge as Judge
    from parsedec.judge import JudgeNeeds as JudgeNeeds
    from parsedec.judge import LabelJudge as LabelJudge
    from parsedec.judge import LogprobJudge as LogprobJudge
    from parsedec.judge import PassJudge as PassJudge
    from parsedec.judge import ProbeJudge as ProbeJudge
    from parsedec.judge import Reading as Reading
    from parsedec.judge import Scores as Scores
    from parsedec.loop import Loop as Loop
    from parsedec.loop import Once as Once
    from parsedec.loop import Rounds as Rounds
    from parsedec.models.language_model import LanguageModel as LanguageModel
    from parsedec.models.language_model import load as load
    from parsedec.outer import Outer as Outer
    from parsedec.outer import PrefixVerification as PrefixVerification
    from parsedec.outer import TargetOnly as TargetOnly
    from parsedec.segmenters import CodeStatements as CodeStatements
    from parsedec.segmenters import EveryTokens as EveryTokens
    from parsedec.segmenters import Lines as Lines
    from parsedec.segmenters import Paragraphs as Paragraphs
    from parsedec.segmenters import PatternSegmenter as PatternSegmenter
    from parsedec.segmenters import Segmenter as Segmenter
    from parsedec.segmenters import Sentences as Sentences
    from parsedec.streamed import StreamedVerification as StreamedVerification
    from parsedec.text.prompt import BareText as BareText
    from parsedec.text.prompt import NewTurn as NewTurn
    from parsedec.types import Delta as Delta
    from parsedec.types import Limits as Limits
    from parsedec.types import Needs as Needs
    from parsedec.types import Outcome as Outcome
    from parsedec.types import Result as Result
    from parsedec.types import Sampling as Sampling
    from parsedec.types import Seen as Seen
    from parsedec.types import StopReason as StopReason
    from parsedec.types import Tree as Tree

# What a stack is built of, and what it gives: module -> names
_MODULES = {
    "acceptance": "Acceptance Nucleus Siblings Traversal Typical",
    "batching.batch": "BatchResult",
    "boundary": "BoundaryRule FirstFailure LongestValid Smoothed",
    "drop_in": "hf_generate",
    "engine": "Parse",
    "errors": "ParsedecError",
    "experiment.trace": "write_trace",
    "gate": "Adaptive Always Gate Never",
    "inner": "InnerSpeculator NoSpeculation",
    "judge": "CombinedJudge ConfidenceJudge DigitJudge Judge JudgeNeeds "
    "LabelJudge LogprobJudge PassJudge ProbeJudge Reading Scores",
    "loop": "Loop Once Rounds",
    "models.language_model": "LanguageModel load",
    "outer": "Outer PrefixVerification TargetOnly",
    "segmenters": "CodeStatements EveryTokens Lines Paragraphs PatternSegmenter Segmenter Sentences",
    "streamed": "StreamedVerification",
    "text.prompt": "BareText NewTurn",
    "types": "Delta Limits Needs Outcome Result Sampling Seen StopReason Tree",
}
_HOMES = {name: home for home, names in _MODULES.items() for name in names.split()}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

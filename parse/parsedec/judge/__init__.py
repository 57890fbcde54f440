"""Judges: how likely is a draft free of errors up to each of its cuts? One interface, several sources of the answer.

    LabelJudge        the target says Correct or Incorrect after every prefix (PARSE, arXiv 2605.04263)
    DigitJudge        the target gives every prefix a digit from 0 to 9 (SpecReason, arXiv 2504.07891)
    LogprobJudge      how likely the target finds the draft's own tokens; costs no rows
    ConfidenceJudge   how likely the draft model found them; another judge decides on unsure segments (ConfSpec)
    ProbeJudge        a trained linear probe on a hidden state of the target, after a question or at the cut itself
    CombinedJudge     logistic regression over several of them, read off the same pass
    PassJudge         base of all but CombinedJudge, and of your own: `read` scores the pass, or the prefixes' texts

To use one directly:  bound = judge.bind(target);  session = judging_session(target, bound);  session.feed(prompt);
bound.score(session, draft, cuts, probes).
"""

from parsedec.judge.combined import CombinedJudge
from parsedec.judge.confidence import ConfidenceJudge
from parsedec.judge.digit import DigitJudge
from parsedec.judge.label import LABELS, QUESTION, LabelJudge, how_to_ask
from parsedec.judge.logprob import LogprobJudge
from parsedec.judge.probe import ProbeJudge
from parsedec.judge.seam import Judge, JudgeNeeds, PassJudge, Reading, Scores, judged, judging_session

__all__ = [
    "LABELS",
    "QUESTION",
    "CombinedJudge",
    "ConfidenceJudge",
    "DigitJudge",
    "Judge",
    "JudgeNeeds",
    "LabelJudge",
    "LogprobJudge",
    "PassJudge",
    "ProbeJudge",
    "Reading",
    "Scores",
    "how_to_ask",
    "judged",
    "judging_session",
]

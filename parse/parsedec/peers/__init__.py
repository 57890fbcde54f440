"""Other people's decoding loops as outer levels, so that they can be timed in the same process.

Each gets the same target, draft model, inner speculators, prompt, limits and sampling as PARSE, and its tokens are
counted by the same code. Each class says where it departs from the published method.
"""

from parsedec.peers.cascade import Cascade
from parsedec.peers.equivalence import EqualText, Equivalence, LabelEquivalence, SameNumber
from parsedec.peers.hf_generate import HfGenerate, clean_settings, seeded, settings
from parsedec.peers.lookahead import LookaheadReasoning
from parsedec.peers.specreason import SpecReason

__all__ = [
    "Cascade",
    "EqualText",
    "Equivalence",
    "HfGenerate",
    "LabelEquivalence",
    "LookaheadReasoning",
    "SameNumber",
    "SpecReason",
    "clean_settings",
    "seeded",
    "settings",
]

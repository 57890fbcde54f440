"""Other people's decoding loops as outer levels, so that a comparison can time them in the same process.

Each gets the same target, draft model, inner speculators, prompt, limits and sampling as PARSE, and its tokens are
counted by the same code. What each leaves out of the published method is said in its class.
"""

from parsedec.peers.cascade import Cascade
from parsedec.peers.equivalence import EqualText, Equivalence, LabelEquivalence, SameNumber
from parsedec.peers.hf_generate import GENERATING, HfGenerate, clean_settings, seeded, settings
from parsedec.peers.lookahead import LookaheadReasoning
from parsedec.peers.specreason import SpecReason

__all__ = [
    "GENERATING",
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

"""Medusa: extra heads on the target's own last hidden state guess a tree of tokens (Cai et al. 2024, arXiv 2401.10774).

heads        the network, and how it is written to disk
checkpoint   reads the public layouts, strictly
trees        which guesses are verified together: the reference's trees, your own lists, trees made from accuracies
calibration  how often each head's guesses are right, measured on the target's own answers
speculator   the inner speculator
"""

from parsedec_adapters.medusa.calibration import head_accuracies
from parsedec_adapters.medusa.checkpoint import load_heads
from parsedec_adapters.medusa.heads import MedusaHeads, save_heads
from parsedec_adapters.medusa.speculator import Medusa
from parsedec_adapters.medusa.trees import tree_from_accuracies

__all__ = ["Medusa", "MedusaHeads", "head_accuracies", "load_heads", "save_heads", "tree_from_accuracies"]

"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): a one-layer head drafts a tree of tokens from the target's hidden states.

Eagle3                  the inner speculator                                     speculator.py
load_head, save_head    every public weight layout -> head -> EAGLE's layout     checkpoint.py, config.py
EagleHead, HeadConfig   the network, usable for training as well                 head.py

tree.py grows a tree after the rows that a request has (rows.py), level by level or from one CUDA graph (graphed.py).
"""

from parsedec_adapters.eagle3.checkpoint import load_head, save_head
from parsedec_adapters.eagle3.config import HeadConfig
from parsedec_adapters.eagle3.head import EagleHead
from parsedec_adapters.eagle3.speculator import Eagle3, Eagle3State

__all__ = ["Eagle3", "Eagle3State", "EagleHead", "HeadConfig", "load_head", "save_head"]

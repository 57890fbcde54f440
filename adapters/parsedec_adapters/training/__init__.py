"""Heads in training: what their weights see and guess while they are distilled (`parsedec.training.heads`)."""

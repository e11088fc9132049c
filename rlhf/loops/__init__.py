"""Loops: online (reinforcement learning), offline (one objective over a data set) and label (feedback)."""

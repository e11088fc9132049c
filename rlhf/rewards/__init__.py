"""Rewards beside the reward model: rule functions, weighted mixtures, normalisation and shaping."""

"""Reinforcement learning algorithms, one file each: what it needs, its advantages, its objective, its source."""

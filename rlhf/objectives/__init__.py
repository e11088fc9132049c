"""Losses as pure functions of tensors, one file each; the learner that runs them is always the same."""

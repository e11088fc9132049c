"""How completions are drawn, and the seed of each one."""

from __future__ import annotations

import hashlib

from pydantic import Field, model_validator

from rlhf.config import StrictModel


class SamplingConfig(StrictModel):
    """The distribution that completions are drawn from."""

    max_tokens: int = Field(default=64, ge=1)
    """Longest completion, in tokens, end-of-text included."""
    min_tokens: int = Field(default=0, ge=0)
    """End-of-text cannot be drawn before this many tokens. The note on ``top_p`` holds here too."""
    temperature: float = Field(default=1.0, ge=0.0)
    """Divides the logits; 0 takes the most likely token. Reported log-probs are those at this temperature (at 1 where
    it is 0)."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the smallest set of tokens whose probability reaches this; 1 draws from all. Below 1, reported
    log-probs are of the cut and renormalised distribution, which the learner does not see: so an rl stage wants 1."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k most likely tokens; 0 draws from all. The note on ``top_p`` holds here too."""
    ignore_eos: bool = False
    """Go on after end-of-text up to ``max_tokens``; for benchmarks, where every completion has the same length."""

    @model_validator(mode="after")
    def _check_lengths(self) -> SamplingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens at most max_tokens ({self.max_tokens})")
        return self


def sampling_seed(run_seed: int, uid: str, sample: int, version: int) -> int:
    """The seed of one completion: the same on every machine, replica and Python version.

    Args:
        run_seed: Seed of the whole run.
        uid: The prompt's uid.
        sample: Index of the sibling, from 0.
        version: Weight version that the completion was asked from.

    Returns:
        An integer in [0, 2^63).
    """
    key = f"{run_seed}\x1f{uid}\x1f{sample}\x1f{version}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1

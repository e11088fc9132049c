"""Evaluation rows with known properties."""

from __future__ import annotations

import numpy as np

from rlhf.evaluation.completions import EvalCompletion

SUBJECTS = ("a heist", "a lighthouse", "a chess champion", "a storm")
PRAISE = "A {s} film that is {a} and {b}, I loved it."
SCORN = "A {s} film that is {a} and {b}, I hated it."
GOOD = ("brilliant", "lovely", "superb", "moving", "funny", "tender", "bold", "witty")
BAD = ("dull", "awful", "clumsy", "lifeless", "tired", "stale", "hollow", "noisy")


def eval_rows(num_prompts: int = 40, *, before: float = 0.5, after: float = 0.9, seed: int = 0) -> list[EvalCompletion]:
    """Two completions per prompt before and after, one best-of-n; ``before``, ``after``: how often they do as asked."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_prompts):
        request = ("enthusiastic", "scathing")[index % 2]
        subject = SUBJECTS[index % len(SUBJECTS)]
        for arm, rate, samples in [("before", before, 2), ("after", after, 2), ("best_of_n", (before + after) / 2, 1)]:
            for sample in range(samples):
                follows = bool(rng.random() < rate)
                praise = follows == (request == "enthusiastic")
                words = rng.choice(GOOD if praise else BAD, size=2, replace=False)
                text = (PRAISE if praise else SCORN).format(s=subject.split()[-1], a=words[0], b=words[1])
                rows.append(
                    EvalCompletion(
                        uid=f"test/{index:05}",
                        sample=sample,
                        arm=arm,
                        prompt=f"Write an {request} review of a film about {subject}.",
                        request=request,
                        subject=subject,
                        text=text,
                        num_tokens=int(rng.integers(30, 40)),
                        finish_reason="stop" if rng.random() < 0.8 else "length",
                        vader=float((1 if praise else -1) * rng.uniform(0.2, 0.9)),
                        judge_margin=float((1.0 if follows else -1.0) + rng.normal()),
                        reward_model=float((1.0 if follows else -1.0) + rng.normal()),
                        kl_per_token=0.0 if arm != "after" else float(rng.uniform(0.05, 0.1)),
                        nll_start=float(rng.uniform(1.0, 2.0)),
                    )
                )
    return rows

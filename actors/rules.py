"""Rule functions as a reward source: they read texts, so they run beside the object store and not in the driver."""

from __future__ import annotations

from collections.abc import Sequence

from actors.health import ProbedThread
from actors.store import Store, fetch_all, fetch_payload
from rlhf.rewards.rules import RuleConfig, score_group
from rlhf.types import GroupHandle, Score


class RulesWorker(ProbedThread):
    """Applies rules to rollout groups; stateless, so a call may be repeated.

    Args:
        rules: What to apply; their weighted values add up.
        store: Where groups live.
    """

    def __init__(self, rules: Sequence[RuleConfig], store: Store) -> None:
        self._rules = tuple(rules)
        self._store = store

    def start(self) -> None:
        """Answers when the worker is up."""

    def score(self, groups: Sequence[GroupHandle]) -> list[tuple[Score, ...]]:
        """Returns, per group, one score per sibling."""
        payloads = fetch_all(groups, self._store, fetch_payload, where="rules")
        return [score_group(self._rules, payload) for payload in payloads]

    def stop(self) -> None:
        """Nothing to give back."""

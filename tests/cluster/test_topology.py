"""The arithmetic of placement: what fits, and what an error says of what does not."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import NodeCapacity, RolePlan, assign
from rlhf.errors import PlacementError


def plan(role: str, count: int, cpus: float = 1.0, gpus: float = 0.0, strategy="PACK") -> RolePlan:
    return RolePlan(role, count, cpus, gpus, strategy)


def nodes(*sizes: tuple[float, float]) -> list[NodeCapacity]:
    return [NodeCapacity("abcdef"[i], cpus, gpus) for i, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("plans", "on", "expected"),
    [
        pytest.param([plan("judge", 2)], [(2, 0)], {"judge": "aa"}, id="one node"),
        pytest.param([plan("judge", 2, 0.25)], [(0.5, 0)], {"judge": "aa"}, id="fractions"),
        pytest.param(
            [plan("judge", 3, 0.1)], [(0.3, 0)], {"judge": "aaa"}, id="fractions that do not add up in binary"
        ),
        pytest.param([plan("judge", 2)], [(4, 0), (2, 0)], {"judge": "bb"}, id="fullest node first"),
        pytest.param([plan("judge", 1)], [(8, 4), (9, 0)], {"judge": "b"}, id="a node with GPUs is spared"),
        pytest.param([plan("judge", 3, strategy="SPREAD")], [(4, 0), (4, 0)], {"judge": "aba"}, id="spread"),
        pytest.param(
            [plan("judge", 2, strategy="STRICT_SPREAD")], [(4, 0), (4, 0)], {"judge": "ab"}, id="strict spread"
        ),
        pytest.param(
            [plan("learner", 4, 1, 1, "STRICT_PACK")],
            [(8, 2), (8, 8)],
            {"learner": "bbbb"},
            id="strict pack looks ahead",
        ),
        pytest.param(
            [plan("judge", 6, 1), plan("learner", 2, 3, strategy="STRICT_PACK")],
            [(6, 0), (6, 0)],
            {"learner": "aa", "judge": "bbbbbb"},
            id="what has to stay together goes first",
        ),
        pytest.param(
            [plan("judge", 1, 1, 0.5), plan("learner", 2, 4, 1), plan("recorder", 1, 0.1)],
            [(16, 2), (16, 1)],
            {"learner": "ba", "judge": "a", "recorder": "b"},
            id="largest bundles first",
        ),
        pytest.param([plan("judge", 0)], [], {"judge": ""}, id="nothing to place"),
    ],
)
def test_actors_go_where_they_fit(plans, on, expected) -> None:
    assert assign(plans, nodes(*on)) == {role: list(names) for role, names in expected.items()}


@pytest.mark.parametrize(
    ("plans", "on", "found", "needed", "action"),
    [
        pytest.param(
            [plan("generation", 4, 1, 1)],
            [(8, 2), (8, 1)],
            "room for 3 of 4 actors; the largest free node has 7 CPUs and 0 GPUs",
            "1 CPUs and 1 GPUs on one node for each actor (PACK)",
            "Set roles.generation.replicas=3, or add nodes.",
            id="replicas",
        ),
        pytest.param(
            [plan("learner", 8, 1, 1, "STRICT_PACK")],
            [(64, 4), (64, 4)],
            "room for 0 of 8 actors; the largest free node has 64 CPUs and 4 GPUs",
            "8 CPUs and 8 GPUs on one node for all 8 actors (STRICT_PACK)",
            "Lower what one actor takes (roles.learner.resources.cpus, .gpus), or add nodes.",
            id="ranks that stay together",
        ),
        pytest.param(
            [plan("critic", 3, strategy="STRICT_SPREAD")],
            [(8, 0), (8, 0)],
            "room for 2 of 3 actors; the largest free node has 7 CPUs",
            "1 CPUs on one node for each actor on a node of its own (STRICT_SPREAD)",
            "Set roles.critic.ranks=2, or add nodes.",
            id="too few nodes",
        ),
        pytest.param(
            [plan("recorder", 1, 2.0)],
            [(1, 0)],
            "room for 0 of 1 actors; the largest free node has 1 CPUs",
            "2 CPUs on one node for each actor (PACK)",
            "Lower what one actor takes (recorder.cpus, .gpus), or add nodes.",
            id="a section outside roles",
        ),
        pytest.param(
            [plan("scorer", 1, 4, 1)],
            [(64, 0), (2, 8)],
            "room for 0 of 1 actors; the largest free node has 2 CPUs and 8 GPUs",
            "4 CPUs and 1 GPUs on one node for each actor (PACK)",
            "Lower what one actor takes (roles.scorer.resources.cpus, .gpus), or add nodes.",
            id="devices on different nodes",
        ),
        pytest.param(
            [plan("scorer", 1)],
            [],
            "room for 0 of 1 actors; the largest free node has 0 CPUs",
            "1 CPUs on one node for each actor (PACK)",
            "Lower what one actor takes (roles.scorer.resources.cpus, .gpus), or add nodes.",
            id="no nodes",
        ),
    ],
)
def test_a_shortfall_says_role_found_needed_and_what_to_do(plans, on, found, needed, action) -> None:
    with pytest.raises(PlacementError) as caught:
        assign(plans, nodes(*on))
    error = caught.value
    assert (error.found, error.needed, error.action) == (found, needed, action)
    assert error.where == f"role {plans[0].role}"
    assert error.exit_code == 3


STRATEGIES = st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
PLANS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.5, 1.0]), STRATEGIES),
    max_size=4,
)
NODES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=5)


@given(PLANS, NODES)
def test_no_node_is_given_more_than_it_has_and_strategies_hold(sizes, on) -> None:
    plans = [plan(f"role{i}", *size) for i, size in enumerate(sizes)]
    try:
        placed = assign(plans, nodes(*on))
    except PlacementError:
        return
    for node in nodes(*on):
        here = [p for p in plans for name in placed[p.role] if name == node.name]
        assert sum(p.cpus for p in here) <= node.cpus + 1e-6
        assert sum(p.gpus for p in here) <= node.gpus + 1e-6
    for p in plans:
        counts = Counter(placed[p.role])
        assert counts.total() == p.count
        if p.strategy == "STRICT_PACK":
            assert len(counts) <= 1
        if p.strategy == "STRICT_SPREAD":
            assert all(count == 1 for count in counts.values())

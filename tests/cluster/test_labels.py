"""Labels: which nodes a selector allows, what is no selector, and what an error says of labels that no node has."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from cluster.labels import check_selector, matches, told
from cluster.topology import NodeCapacity, Resources, RolePlan, assign
from rlhf.errors import PlacementError

SPOT = {"market": "spot", "zone": "a"}


@pytest.mark.parametrize(
    ("condition", "spot", "bare"),
    [("spot", True, False), ("!spot", False, True), ("in(od, spot)", True, False), ("!in(od,spot)", False, True)],
)
def test_a_selector_allows_what_rays_rules_allow(condition: str, spot: bool, bare: bool) -> None:
    selector = {"market": condition}
    check_selector(selector)
    assert validate_label_selector(selector) is None, "Ray takes it, too"
    assert (matches(selector, SPOT), matches(selector, {"zone": "a"})) == (spot, bare)


def test_every_condition_counts_and_none_allows_every_node() -> None:
    assert matches({}, {}) and matches({"market": "spot", "zone": "!b"}, SPOT)
    assert not matches({"market": "spot", "zone": "b"}, SPOT)
    assert told({"market": "spot", "zone": "!b"}) == "market=spot, zone=!b"


@pytest.mark.parametrize("labels", [{"market": "in()"}, {"market": "a b"}, {"": "a"}, {"a/b/c": "x"}, {"m": "!!a"}])
def test_what_is_no_selector_is_refused_with_the_configuration(labels: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="label"):
        Resources(labels=labels)
    assert validate_label_selector(labels) is not None, "Ray refuses it, too"


def node(name: str, cpus: float, **labels: str) -> NodeCapacity:
    return NodeCapacity(name, cpus, 0.0, labels)


def plan(role: str, count: int, cpus: float, **labels: str) -> RolePlan:
    return RolePlan(role, count, cpus, 0.0, "PACK", labels)


def test_roles_go_where_their_labels_send_them() -> None:
    nodes = [node("a", 8.0, market="on-demand"), node("b", 8.0, market="spot"), node("c", 8.0)]
    placed = assign([plan("learner", 2, 4.0, market="on-demand"), plan("generation", 3, 2.0, market="spot")], nodes)
    assert placed == {"learner": ["a", "a"], "generation": ["b", "b", "b"]}


def test_an_error_names_the_label_that_no_node_has() -> None:
    nodes = [node("a", 8.0, market="on-demand", zone="x"), node("b", 8.0, market="spot")]
    with pytest.raises(PlacementError) as caught:
        assign([plan("generation", 1, 1.0, market="spot", zone="y")], nodes)
    assert caught.value.found == "no node labelled zone=y among 2 (values there: zone: x)"
    assert "roles.generation.resources.labels" in caught.value.action
    with pytest.raises(PlacementError, match="no node labelled market=spot, zone=x among 2"):
        assign([plan("generation", 1, 1.0, market="spot", zone="x")], nodes)


def test_an_error_tells_the_room_on_labelled_nodes_only() -> None:
    nodes = [node("a", 64.0), node("b", 4.0, market="spot")]
    with pytest.raises(PlacementError, match="largest free node has 0 CPUs; needed 4 CPUs .* labelled market=spot"):
        assign([plan("generation", 2, 4.0, market="spot")], nodes)

"""Errors: they survive pickling, read as one sentence, and carry the exit code."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from rlhf import errors
from rlhf.errors import ClusterError, ConfigError, DataError, PlacementError, RlhfError, RolloutsLostError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RlhfError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_pickling_and_copying(kind):
    error = kind("learner rank 1", found="4 GPUs", needed="8 GPUs on one node", action="Set learner.nodes=2.")
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.where, again.found, again.needed, again.action) == (
            "learner rank 1",
            "4 GPUs",
            "8 GPUs on one node",
            "Set learner.nodes=2.",
        )


def test_lost_rollouts_are_named_also_after_pickling():
    error = pickle.loads(pickle.dumps(RolloutsLostError.of("scorer", ["p0", "p3"], "a node went away")))
    assert error.uids == ("p0", "p3")
    assert str(error).startswith("scorer: found no rollouts of 'p0' and 1 more (a node went away); needed every group")


def test_the_message_says_where_found_needed_and_what_to_do():
    error = PlacementError("learner", found="4 free GPUs", needed="8", action="Set learner.nodes=2.")
    assert str(error) == "learner: found 4 free GPUs; needed 8. Set learner.nodes=2."


@pytest.mark.parametrize("kind", KINDS)
def test_the_exit_code_follows_the_boundary(kind):
    expected = {ConfigError: 2, DataError: 2, PlacementError: 3, ClusterError: 3}.get(kind, 1)
    assert kind.exit_code == expected


def test_a_note_and_a_cause_do_not_change_the_message():
    try:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise DataError("x.jsonl:3", found="'{'", needed="JSON", action="Mend the line.") from inner
    except DataError as error:
        error.add_note("seen while loading")
        again = pickle.loads(pickle.dumps(error))
    assert str(again) == "x.jsonl:3: found '{'; needed JSON. Mend the line."


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_in_its_docstring_what_it_means(kind):
    assert kind.__doc__ and kind.__doc__.strip()

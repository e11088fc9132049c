"""``rlhf doctor``: what this machine or a cluster can run, and what is wrong with it.

``facts`` and ``probe`` look; ``machine``, ``combinations``, ``access`` and ``nodes`` judge; ``survey`` asks every node;
``trial`` does one small run for real; ``findings`` shows. Without options nothing heavy is imported.
"""

from cluster.doctor.facts import Facts, gather_facts
from cluster.doctor.findings import Check, print_checks
from cluster.doctor.machine import run_doctor, unmet_requirements
from cluster.doctor.probe import list_gpus

__all__ = ["Check", "Facts", "gather_facts", "list_gpus", "print_checks", "run_doctor", "unmet_requirements"]

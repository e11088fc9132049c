"""Roles that share one GPU: who they are, what each phase needs in its memory, and how they are moved.

A role shares when its section asks for a fraction of a GPU; one with whole GPUs has them to itself and is left alone.
Ray gives a fraction the fullest GPU that still has room for it, so the checks here keep the sum at one GPU and every
role at one actor: a second one would be laid beside the first. Should two roles come to lie on different GPUs after all
(several nodes), they still take turns, and move for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from actors.parts import ENGINE_PARTS, LEARNER_PARTS, MODEL_PARTS
from rlhf.errors import PlacementError, PublicationError
from rlhf.loops.gate import BudgetGate
from rlhf.loops.shared_gate import Mover, Parts, SharedGate

if TYPE_CHECKING:
    from actors.fleet import Fleet
    from actors.gang import LearnerGang
    from cluster.config import RunConfig
    from cluster.roles import Roles
    from rlhf.runs.timings import Timings

PARTS: Parts = {
    "generation": ENGINE_PARTS,
    "judge": ENGINE_PARTS,
    "scorer": MODEL_PARTS,
    "reference": MODEL_PARTS,
    "learner": LEARNER_PARTS,
    "critic": LEARNER_PARTS,
}
"""What each role is made of, by the names that its workers' ``reside`` takes."""

PHASES: Mapping[str, Parts] = {
    **{role: {role: parts} for role, parts in PARTS.items()},
    "publish": {"learner": frozenset({"weights"}), "generation": frozenset({"weights"})},
}
"""What each phase needs. The engines' weights come in for a publication, their cache once the learner is gone."""


def sharing_roles(roles: Roles) -> frozenset[str]:
    """The roles that take a fraction of a GPU; a judge behind an endpoint has no memory here."""
    sharing = {role for role in PARTS if 0.0 < getattr(roles, role).resources.gpus < 1.0}
    return frozenset(sharing - ({"judge"} if roles.judge.endpoint is not None else set()))


def build_gate(config: RunConfig) -> BudgetGate | SharedGate:
    """The phase gate that the configuration asks for."""
    if config.gate == "open":
        return BudgetGate({})
    if config.gate == "exclusive":
        return BudgetGate(dict.fromkeys(PHASES, 1.0))
    sharing = sharing_roles(config.roles)
    return SharedGate({phase: needs for phase, needs in PHASES.items() if sharing & needs.keys()})


def check_sharing(roles: Roles, used: Collection[str]) -> None:
    """Raises ``ValueError`` where the roles that a run uses cannot take turns on one GPU."""
    sharing = {role: getattr(roles, role) for role in sorted(sharing_roles(roles) & set(used))}
    if len(sharing) < 2:
        raise ValueError("for gate: shared, two roles or more with a fraction of a GPU (resources.gpus, such as 0.2)")
    total = sum(section.resources.gpus for section in sharing.values())
    if total > 1.0 + 1e-9:
        raise ValueError(f"for gate: shared, fractions of one GPU: {', '.join(sharing)} ask for {total:g} together")
    for role, section in sharing.items():
        if roles.plan(role).count != 1:
            raise ValueError(
                f"for gate: shared, one actor of roles.{role}, not {roles.plan(role).count}: a second fraction lands "
                "on the same GPU. Give roles whole GPUs and set gate: open to use several"
            )
        if getattr(section, "autoscale", None) is not None:
            raise ValueError(f"for gate: shared, no roles.{role}.autoscale: a second actor lands on the same GPU")
        if PARTS[role] == ENGINE_PARTS and not section.engine.enable_sleep:
            raise ValueError(f"for gate: shared, roles.{role}.engine.enable_sleep: true, so that it can make room")


def refuse_scale(config: RunConfig, role: str, wanted: int) -> None:
    """Raises ``PlacementError`` where another actor of a role would land on the GPU that it shares already."""
    if config.gate == "shared" and wanted > 1 and role in sharing_roles(config.roles):
        raise PlacementError(
            f"role {role}",
            found=f"{wanted} replicas asked for",
            needed="1, as it shares its GPU with other roles (gate: shared)",
            action="Give roles whole GPUs and set gate: open to scale them.",
        )


def fleet_mover(fleet: Fleet, timings: Timings) -> Mover:
    """Moves a fleet's parts; a replica that fails to is lost, and replaced when the fleet is next wanted as a whole."""

    async def move(parts: frozenset[str]) -> None:
        with timings.phase(f"move/{fleet.role}"):
            with suppress(PublicationError):  # nobody is left, and so nothing of theirs is in memory
                await fleet.settled()  # a suspect takes no part, and would keep its memory
                if fleet.healthy:
                    await fleet.broadcast("reside", sorted(parts))
            if parts == PARTS[fleet.role] and fleet.num_missing:
                await fleet.repair()

    return move


def gang_mover(gang: LearnerGang, timings: Timings) -> Mover:
    """Moves a gang's parts; a rank that fails to ends the gang, as in any other call."""

    async def move(parts: frozenset[str]) -> None:
        with timings.phase(f"move/{gang.role}"):
            await gang.reside(parts)

    return move

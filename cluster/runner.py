"""The driver: runs the stages of a recipe, resumes them, and ends everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import RunConfig, Stage
from cluster.stages.evaluate import EvaluateStage, run_evaluate
from cluster.stages.feedback import FeedbackStage, run_feedback
from cluster.stages.offline import run_offline
from cluster.stages.online import OnlineStage, run_online
from rlhf.errors import ConfigError, RecordError

if TYPE_CHECKING:
    from cluster.context import RunContext
    from rlhf.runs.directory import RunDirectory
    from rlhf.types import Prompt


def run(config: RunConfig, *, only: str | None = None) -> int:
    """Runs all stages that are not complete, or one by name when its turn has come, and returns the exit code.

    What a run can be refused for is checked before its directory is made: devices, data, constitutions, model files. A
    refused recipe leaves nothing behind, so that a smaller one can take the same directory. Of a run that is complete
    nothing but the recipe is looked at: its data and models may have gone elsewhere.
    """
    from cluster.checkpoints import claim_target
    from cluster.checks import check_inputs
    from cluster.planning import check_devices, check_placement, private_node
    from rlhf.runs.directory import RunDirectory

    stages = _selected(config, only)
    before = RunDirectory(config.directory)
    left = _left(stages, before)
    if only is not None and left:
        _check_turn(config, left[0], before)
    if config.ray.address is None:
        check_placement(config, left, [private_node(config)])
        check_devices(config, left)
    data = check_inputs(config) if left else None
    with RunDirectory.open(config.directory, config, data=None if data is None else data.files) as directory:
        left = _left(stages, directory)  # another driver may have been at work until the lock was ours
        if data is None or not left:
            print(f"{directory.root}: every stage is complete")
            return _finish(config, directory.root)
        claim_target(config.checkpoints, directory)
        code = asyncio.run(_drive(config, directory, left, data.prompts))
        return code or _finish(config, directory.root)


def _left(stages: list[Stage], directory: RunDirectory) -> list[Stage]:
    return [stage for stage in stages if not directory.is_complete(stage.name)]


def _selected(config: RunConfig, only: str | None) -> list[Stage]:
    if only is None:
        return list(config.stages)
    chosen = [stage for stage in config.stages if stage.name == only]
    if not chosen:
        names = ", ".join(stage.name for stage in config.stages)
        raise ConfigError("--stage", found=repr(only), needed=f"one of {names}", action="Check the name.")
    return chosen


def _check_turn(config: RunConfig, stage: Stage, directory: RunDirectory) -> None:
    """A stage starts from what all stages before it left, and none after it may have learned or measured without it."""
    place = config.stages.index(stage)
    missing = [other.name for other in config.stages[:place] if not directory.is_complete(other.name)]
    if missing:
        raise ConfigError(
            f"--stage {stage.name}",
            found=f"stage {missing[0]} before it, which is not complete",
            needed="every stage before it complete",
            action=f"Run --stage {missing[0]} first, or all stages without --stage.",
        )
    done = [other.name for other in config.stages[place + 1 :] if directory.is_complete(other.name)]
    if done:
        raise ConfigError(
            f"--stage {stage.name}",
            found=f"stage {done[0]} after it, which is complete without it",
            needed="no complete stage after it",
            action="Set another run_dir to run the stages in order.",
        )


async def _drive(
    config: RunConfig, directory: RunDirectory, stages: Sequence[Stage], prompts: Mapping[str, list[Prompt]]
) -> int:
    """Connects, runs the stages, and closes everything whatever happens; returns the exit code."""
    from cluster.context import StopRequestedError, open_context

    received: list[int] = []
    done: list[bool] = []
    async with open_context(config, directory, prompts, stages) as context:
        main = asyncio.current_task()

        def on_signal(number: int) -> None:
            received.append(number)
            context.request_stop()
            if len(received) == 2 and main is not None and not done:
                main.cancel()  # a second signal does not wait for the step to end; closing is never interrupted

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        try:
            for stage in stages:
                await _run_stage(context, stage)
        except (StopRequestedError, asyncio.CancelledError):
            if not received:
                raise
            context.event("stopped", signal=signal.Signals(received[0]).name)
            print(f"stopped by {signal.Signals(received[0]).name}; run the same command to go on", file=sys.stderr)
            return 128 + received[0]
        finally:
            done.append(True)
    return 0


async def _run_stage(context: RunContext, stage: Stage) -> None:
    from cluster.context import Policy, StopRequestedError

    print(f"stage {stage.name}", file=sys.stderr, flush=True)
    context.event("stage_started", stage=stage.name)
    work = asyncio.ensure_future(_in_its_place(context, stage))
    stop = asyncio.ensure_future(context.stopping.wait())
    saves_itself = stage.kind in ("rl", "sft", "reward", "preference")
    waited = {work} if saves_itself else {work, stop}
    with context.timings.phase(f"{stage.name}/total"):
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise StopRequestedError(
                    f"stage {stage.name}", found="a signal", needed="time", action="Run the command again to go on."
                )
            results = await work
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)
            _record_failure(context, stage, work)
    context.timings.write()
    context.run.complete(stage.name, results)
    context.event("stage_completed", stage=stage.name)
    if "policy" in results:
        context.policy = Policy(context.run.root / results["policy"], results["version"])


def _record_failure(context: RunContext, stage: Stage, work: asyncio.Future[dict[str, Any]]) -> None:
    """Writes down what ended the stage, and so the run; a stop that was asked for has an event of its own."""
    from cluster.context import StopRequestedError

    error = None if work.cancelled() else work.exception()
    if error is None or isinstance(error, StopRequestedError):
        return
    with contextlib.suppress(RecordError):  # a full disk may be what ended it; the error itself goes on to the caller
        context.event("stage_failed", stage=stage.name, error=f"{type(error).__name__}: {error}")


async def _in_its_place(context: RunContext, stage: Stage) -> dict[str, Any]:
    await context.make_room(stage)
    return await _results_of(context, stage)


async def _results_of(context: RunContext, stage: Stage) -> dict[str, Any]:
    """Does one stage and returns what ``RunDirectory.complete`` keeps of it."""
    match stage:
        case FeedbackStage():
            return await run_feedback(context, stage)
        case OnlineStage():
            return await run_online(context, stage)
        case EvaluateStage():
            return await run_evaluate(context, stage)
        case _:
            return await run_offline(context, stage)


def _finish(config: RunConfig, root: Path) -> int:
    """Writes the summary when all stages are complete, and says where everything is."""
    from cluster.finish import summarise

    summarise(config, root)
    return 0

"""The command line. Imports are made where they are used: help and configuration errors come at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.plan.target import add_options
from rlhf.errors import RlhfError

EPILOG = (
    "exit codes: 0 finished, 1 training failed, 2 configuration or data, 3 placement or no cluster, "
    "130/143 stopped by a signal"
)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="rlhf", description="Turns a base language model into one that people prefer.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run all stages of a config, or resume where the run left off")
    _config_arguments(run)
    run.add_argument("--stage", help="run this stage only, by name")

    _submit_parser(commands.add_parser("submit", help="the same as run, as a job on a Ray cluster"))

    plan = commands.add_parser("plan", help="devices, memory, time and cost, and whether it fits, by arithmetic")
    _config_arguments(plan)
    add_options(plan)

    scale = commands.add_parser("scale", help="change the replicas of stateless roles while a run goes on")
    scale.add_argument("run", type=Path, metavar="RUN", help="run directory")
    scale.add_argument("roles", nargs="+", metavar="ROLE=N", help="for example generation=3 judge=2")

    status = commands.add_parser("status", help="show how a run stands, live on a terminal")
    status.add_argument("run", type=Path, metavar="RUN", help="run directory")
    status.add_argument("--once", action="store_true", help="print it once, as is done where there is no terminal")
    status.add_argument("--json", action="store_true", help="print it once, as JSON for programs")

    report = commands.add_parser("report", help="write RUN/report.html")
    report.add_argument("run", type=Path, metavar="RUN", help="run directory")

    judge = commands.add_parser("judge-eval", help="measure the judge of a config on hand-labelled texts")
    _config_arguments(judge)
    judge.add_argument("--data", type=Path, required=True, help="rows with text and label (positive, mixed, negative)")

    doctor = commands.add_parser("doctor", help="what this machine or a cluster can run, and what is wrong with it")
    doctor.add_argument("--address", help="a cluster to look at too, for example auto; unset: RAY_ADDRESS")
    doctor.add_argument("--run-dir", type=Path, help="folder for run directories that all its nodes share")
    doctor.add_argument("--full", action="store_true", help="one small run for real too: minutes")
    return parser


def _submit_parser(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--address", required=True, help="dashboard of the cluster's head, http://HOST:8265")
    parser.add_argument("--storage", type=Path, metavar="DIR", help="shared folder that run_dir counts from")
    mode = parser.add_mutually_exclusive_group()
    for flag, word, text in (
        ("--no-wait", "no-wait", "return as soon as the job is submitted"),
        ("--follow", "attach", "follow the run's newest job; start none"),
        ("--status", "status", "list the run's jobs"),
        ("--cancel", "cancel", "let the run save and end"),
    ):
        mode.add_argument(flag, dest="mode", action="store_const", const=word, default="follow", help=text)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML recipe, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example stages.3.loop.steps=4")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error of ours is one line on standard error, no traceback."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # overrides that stand behind an option
    try:
        return _dispatch(arguments)
    except RlhfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "doctor":
        from cluster.doctor.command import main as doctor

        return doctor(address=arguments.address, run_dir=arguments.run_dir, full=arguments.full)
    if arguments.command == "report":
        from rlhf.runs.report import write_report

        print(write_report(arguments.run))
        return 0
    if arguments.command == "status":
        from cluster.status import show_status

        return show_status(arguments.run, once=arguments.once, as_json=arguments.json)
    if arguments.command == "scale":
        from cluster.control import parse_scale, request_scale

        wanted = parse_scale(arguments.roles)
        request_scale(arguments.run, wanted)
        asked = ", ".join(f"{role}={count}" for role, count in wanted.items())
        print(f"{arguments.run}: asked the driver for {asked}; events.jsonl says what comes of it")
        return 0

    if arguments.command == "submit":
        from cluster.jobs import Request, submit

        asked_for = (arguments.config, arguments.overrides, arguments.address, arguments.storage, arguments.mode)
        return submit(Request(*asked_for))

    from cluster.config import load_run_config

    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.command == "plan":
        from cluster.plan.target import options_of
        from cluster.planning import print_plan

        return print_plan(config, options_of(arguments))
    if arguments.command == "judge-eval":
        from cluster.judge_eval import evaluate_judge

        return evaluate_judge(config, arguments.data)
    from cluster.runner import run

    return run(config, only=arguments.stage)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: quick to answer, strict about what it is given, and honest in its exit code."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from rlhf import errors
from rlhf.config import StrictModel

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0


def rlhf(*arguments: str) -> tuple[int, str, str, float]:
    """Exit code, output, errors and processor seconds of one run: other work on the machine does not lengthen these."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


def test_help_is_quick_and_names_every_command() -> None:
    code, out, _, seconds = rlhf("--help")
    assert code == 0
    assert all(command in out for command in ("run", "plan", "scale", "report", "judge-eval", "doctor"))
    assert "exit codes" in out
    assert seconds < SECONDS


def test_a_config_error_is_quick_one_line_and_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nstages: []\n")
    code, out, err, seconds = rlhf("run", str(recipe), "stages.0.steps=1")
    assert (code, out) == (2, "")
    assert err.startswith("ConfigError: ")
    assert "Traceback" not in err
    assert seconds < SECONDS


@pytest.mark.parametrize("command", ["run", "plan"])
def test_an_unknown_override_is_refused_with_the_key_that_was_meant(command: str, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nstages:\n  - kind: evaluate\n    name: eval\n")
    assert cli.main([command, str(recipe), "sampling.temprature=0.5"]) == 2
    err = capsys.readouterr().err
    assert "sampling.temprature" in err
    assert "Did you mean 'temperature'?" in err
    assert cli.main([command, str(recipe), "rolse.judge.replicas=2"]) == 2
    assert "Did you mean 'roles'?" in capsys.readouterr().err


def test_a_config_that_is_not_there(capsys) -> None:
    assert cli.main(["plan", "no/such.yaml"]) == 2
    assert "no/such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.PlacementError, 3),
        (errors.LearnerError, 1),
        (errors.EngineError, 1),
        (errors.MissingFeedbackError, 1),
        (errors.CheckpointError, 1),
        (errors.DeadlineError, 1),
    ],
)
def test_an_error_of_ours_is_one_line_and_its_exit_code(kind, code: int, monkeypatch, capsys) -> None:
    def fail(arguments) -> int:
        raise kind("stage rl", found="x", needed="y", action="Do z.")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"{kind.__name__}: stage rl: found x; needed y. Do z.\n"
    assert captured.out == ""


def test_an_interrupt_is_130(monkeypatch) -> None:
    def interrupt(arguments) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.main(["doctor"]) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["run"],
        ["run", "c.yaml", "--stag", "rl", "--nope"],
        ["run", "c.yaml", "--stage", "rl", "no-equals"],
        ["doctor", "a=b"],
        ["scale", "runs/x"],
        ["judge-eval", "c.yaml"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2_with_usage(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: rlhf" in capsys.readouterr().err


def test_overrides_may_stand_before_and_behind_options(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: seen.append(arguments) or 0)
    assert cli.main(["run", "c.yaml", "a=1", "--stage", "rl", "b.c=2"]) == 0
    assert seen[0].overrides == ["a=1", "b.c=2"]
    assert seen[0].stage == "rl"
    assert seen[0].config == Path("c.yaml")


def test_scale_leaves_its_request_in_the_run_and_says_so(tmp_path: Path, capsys) -> None:
    from cluster.control import read_scale
    from rlhf.runs.directory import RunDirectory

    assert cli.main(["scale", str(tmp_path), "generation=2"]) == 2, "no run directory"
    with RunDirectory.open(tmp_path / "run", StrictModel()) as run:
        root = str(run.root)
        capsys.readouterr()
        assert cli.main(["scale", root, "generation=2", "judge=3"]) == 0
        assert "generation=2, judge=3" in capsys.readouterr().out
        assert read_scale(run.root) == {"generation": 2, "judge": 3}
        assert cli.main(["scale", root, "learner=2"]) == 2
        assert "roles.learner.ranks" in capsys.readouterr().err
    assert cli.main(["scale", root, "generation=4"]) == 2
    assert "no driver at work" in capsys.readouterr().err

"""The quickstart with three seeds and a null arm (verdicts shuffled), as a table; goes on where it stopped.

``make seeds`` runs it; each arm takes as long as the quickstart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "quickstart": [],
    "quickstart-seed-18": ["seed=18"],
    "quickstart-seed-19": ["seed=19"],
    "quickstart-null": ["shuffle_verdicts=true"],
}
"""Run directory under ``runs/`` and the overrides of each arm. In the null arm the judge's verdicts are dealt
out at random among siblings, in the rankings and in the reward."""
METRICS = ("follows_request", "judge_margin", "distinct_2", "length", "on_topic", "kl_per_token")


def main() -> None:
    """Runs every arm, which goes on where it stopped and returns at once when complete, and prints one row each."""
    for name, overrides in ARMS.items():
        command = [sys.executable, "-m", "cluster.cli", "run", "configs/quickstart.yaml", f"run_dir=runs/{name}"]
        subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print("| run | " + " | ".join(METRICS) + " | change in follows_request | win rate |")
    print("| --- |" + " --- |" * (len(METRICS) + 2))
    for name in ARMS:
        summary = json.loads((ROOT / "runs" / name / "summary.json").read_text(encoding="utf-8"))
        before, after = summary["eval"]["before"], summary["eval"]["after"]
        cells = [f"{before[m]['mean']:.3f} -> {after[m]['mean']:.3f}" for m in METRICS]
        intervals = [summary["eval"]["delta"]["follows_request"], summary["eval"]["win_rate"]]
        cells += [f"{i['mean']:.3f} [{i['low']:.3f}, {i['high']:.3f}]" for i in intervals]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

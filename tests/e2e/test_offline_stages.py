"""Supervised training on people's records and preference training on their ratings: three stages of one run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.runs import checkpoint
from tests.e2e import recipes

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NUM_RECORDS = 16
ANSWERS = {"chats": "Dull.", "instructions": "I loved it."}


def write_records(folder: Path) -> None:
    """Chats of several turns, instruction records, and ratings of what the latter answer against what they do not."""
    chats: list[dict[str, Any]] = []
    instructions: list[dict[str, str]] = []
    ratings: list[dict[str, Any]] = []
    for number in range(NUM_RECORDS):
        question = f"Write a review of a film about the sea {number}."
        turns = [("system", "You review films."), ("user", "Hello."), ("assistant", "Yes?"), ("user", question)]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", ANSWERS["chats"])]]
        chats.append({"messages": messages})
        record = {"instruction": question, "input": "One sentence.", "output": ANSWERS["instructions"]}
        instructions.append(record)
        ratings += [
            {"prompt": question, "completion": text, "rating": stars}
            for text, stars in ((ANSWERS["instructions"], 5), ("Nothing new.", 2), (ANSWERS["chats"], 1))
        ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    for name, rows in (("instructions.csv", instructions), ("ratings.csv", ratings)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.timeout(1500)
def test_records_and_ratings_train_one_policy_after_another(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Chats with an adapter, then instruction records and DPO with every weight.

    Passes if each stage starts from what the one before left, its loss falls to less than half, and what leaves is a
    plain model, with the adapter beside it where there is one. Checkpoints go to a URL in the background.
    """
    recipes.write_data(tmp_path)
    write_records(tmp_path)
    adapted = recipes.learner()
    adapted["model"] |= {"adapter": {"rank": 8}}
    adapted["optim"] |= {"lr": 1e-2}
    loop = {"epochs": 8, "groups_per_step": 4}
    stages = [
        {"kind": "sft", "name": "chats", "data": {"path": "chats.jsonl"}, "learner": adapted, "loop": loop},
        {
            "kind": "sft",
            "name": "instructions",
            "data": {"path": "instructions.csv"},
            "learner": recipes.learner(),
            "loop": loop,
        },
        {"kind": "feedback", "source": "file", "data": {"path": "ratings.csv"}},
        {"kind": "preference", "learner": recipes.learner(), "loop": loop},
    ]
    store = f"file://{tmp_path}/store"
    settings = {"checkpoints": {"target": store, "in_background": True}}
    recipe = recipes.write_recipe(tmp_path, recipes.base(tmp_path, tiny_model_dir, stages) | settings)
    assert recipes.run(recipe) == 0, recipes.log_of(recipe)
    run = tmp_path / "run"

    for stage, loss in (("chats", "nll"), ("instructions", "nll"), ("preference", "preference_loss")):
        losses = [line[loss] for line in recipes.metrics(run, stage)]
        print(f"{loss} of {stage} by step:", " ".join(f"{value:.3f}" for value in losses))
        assert losses[-1] < 0.5 * losses[0], stage
        saved = checkpoint.load_latest(f"{store}/{stage}")
        assert saved is not None and saved.step == len(losses), "the stage's end waits for its last checkpoint"
        assert not (run / "checkpoints" / stage / "LATEST").exists()
    assert recipes.table(run, "rankings")[0]["ranks"] == [1, 2, 3]

    left = {stage: run / stage / "policy" for stage in ("chats", "instructions", "preference")}
    for name, folder in left.items():
        AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file() == (name == "chats")
    weights = [load_file(folder / "model.safetensors") for folder in (tiny_model_dir, *left.values())]
    for before, after in zip(weights, weights[1:], strict=False):
        assert before.keys() == after.keys()
        assert not all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    final = load_file(run / "policy" / "model.safetensors")
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights[-1].items())

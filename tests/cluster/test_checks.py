"""Bad input is refused with exit code 2 and one line that says where, before Ray or an engine is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from cluster import cli, runner
from rlhf.runs.directory import RunDirectory
from tests.actors.judging import write_constitution
from tests.e2e import recipes

Change = Callable[[dict[str, Any], Path], None]


class Started(BaseException):
    """Stands for the start of Ray: everything was found in order."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data for recipes; a run that passes its checks ends in ``Started``."""
    recipes.write_data(tmp_path)
    rows = [{"instruction": "Write a review.", "output": f"I loved it {i}."} for i in range(8)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def drive(coroutine: Any) -> int:
        coroutine.close()
        raise Started

    monkeypatch.setattr(runner.asyncio, "run", drive)
    return tmp_path


def good(folder: Path, model: Path) -> dict[str, Any]:
    """A recipe with every kind of stage; index 0 feedback, 1 reward, 2 sft, 3 preference, 4 rl, 5 evaluate."""
    loop = {"groups_per_step": 4}
    stages = [
        {"kind": "feedback", "loop": {"num_samples": 2}, "measure_agreement": True},
        {"kind": "reward", "learner": recipes.learner(), "loop": dict(loop)},
        {"kind": "sft", "data": {"path": "records.jsonl"}, "learner": recipes.learner(), "loop": dict(loop)},
        {"kind": "preference", "learner": recipes.learner(), "loop": dict(loop)},
        {
            "kind": "rl",
            "learner": recipes.learner(),
            "rewards": [{"source": "reward_model"}, {"source": "judge"}],
            "loop": {"steps": 2, "prompts_per_step": 4, "num_samples": 2},
        },
        {"kind": "evaluate", "num_samples": 1},
    ]
    return recipes.base(folder, model, stages)


def outcome(folder: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of ``rlhf run``; 0 where it went on to start Ray."""
    path = recipes.write_recipe(folder, recipe)
    capsys.readouterr()
    try:
        code = cli.main(["run", str(path)])
    except Started:
        code = 0
    return code, capsys.readouterr().err


def put(*keys: str | int, value: Any) -> Change:
    """Sets one value of the recipe."""

    def change(recipe: dict[str, Any], folder: Path) -> None:
        section: Any = recipe
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value

    return change


def write(name: str, text: str) -> Change:
    """Writes one file beside the recipe."""
    return lambda recipe, folder: (folder / name).write_text(text, encoding="utf-8") and None


def both(*changes: Change) -> Change:
    def change(recipe: dict[str, Any], folder: Path) -> None:
        for one in changes:
            one(recipe, folder)

    return change


def pairwise(recipe: dict[str, Any], folder: Path) -> None:
    name = write_constitution(folder, "pairwise").name
    recipe["constitutions"] = {"training": name, "evaluation": name}
    recipe["stages"][0]["measure_agreement"] = False


def drop_stage(index: int) -> Change:
    return lambda recipe, folder: recipe["stages"].pop(index) and None


def without(file: str) -> Change:
    """Starts from a copy of the model that lacks one file."""

    def change(recipe: dict[str, Any], folder: Path) -> None:
        copy = folder / "model"
        shutil.copytree(recipe["model"], copy, ignore=shutil.ignore_patterns(file))
        recipe["model"] = str(copy)

    return change


def remodelled(**settings: Any) -> Change:
    """Starts from a copy of the model with other settings in its config.json."""

    def change(recipe: dict[str, Any], folder: Path) -> None:
        without("nothing")(recipe, folder)
        path = Path(recipe["model"]) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings), encoding="utf-8")

    return change


def relabelled(recipe: dict[str, Any], folder: Path) -> None:
    constitution = folder / recipe["constitutions"]["training"]
    text = constitution.read_text(encoding="utf-8")
    constitution.write_text(text.replace('" yes"', '" positive"'), encoding="utf-8")


unmeasured = put("stages", 0, "measure_agreement", value=False)
ENDPOINT = {"base_url": "https://judge.example/v1", "model": "m", "api_key_variable": "NO_SUCH_KEY_IS_SET"}
ROW = json.dumps({"request": "scathing", "subject": "x", "prompt": "Write."})


def test_a_good_recipe_passes(folder: Path, tiny_model_dir: Path, capsys) -> None:
    assert outcome(folder, good(folder, tiny_model_dir), capsys) == (0, "")


@pytest.mark.parametrize(
    "keys",
    [
        ("model",),
        ("roles", "judge", "model"),
        *(("stages", index, "learner", "model", "path") for index in (1, 2, 3)),
    ],
    ids=lambda keys: ".".join(map(str, keys)),
)
def test_a_model_that_is_not_there_is_named_by_its_key(keys, folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    put(*keys, value=str(folder / "no_such_model"))(recipe, folder)
    code, error = outcome(folder, recipe, capsys)
    assert code == 2
    assert error.startswith(f"ConfigError: {'.'.join(map(str, keys))}: ")
    assert "no such folder" in error and "no_such_model" in error


def test_a_critics_model_is_looked_for_too(folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    recipe["stages"][4] |= {"critic": {"model": {"path": "./no_such"}}, "algorithm": {"name": "ppo"}}
    code, error = outcome(folder, recipe, capsys)
    assert (code, error.split(": ")[1]) == (2, "stages.4.critic.model.path")


def test_a_model_that_an_earlier_stage_writes_need_not_be_there_yet(folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    recipe["stages"][3]["learner"]["model"]["path"] = str(folder / "run" / "sft" / "policy")
    again = {**recipe["stages"][2], "name": "sft-2", "learner": recipes.learner()}
    again["learner"]["model"] = {"path": str(folder / "run" / "rl" / "policy"), "dtype": "float32"}
    recipe["stages"].append(again)
    assert outcome(folder, recipe, capsys) == (0, "")
    recipe["stages"][1]["learner"]["model"]["path"] = str(folder / "run" / "sft" / "policy")  # written after it
    code, error = outcome(folder, recipe, capsys)
    assert (code, error.split(": ")[1]) == (2, "stages.1.learner.model.path")


BAD: dict[str, tuple[Change, str]] = {
    "misspelt key": (put("sampling", "temprature", value=1.0), "Did you mean 'temperature'?"),
    "wrong type": (put("seed", value="many"), "seed"),
    "one sample to rank": (put("stages", 0, "loop", "num_samples", value=1), "stages.0.loop.num_samples"),
    "one sample to compare": (put("stages", 4, "loop", "num_samples", value=1), "loop.num_samples of at least 2"),
    "fewer prompts than ranks": (put("roles", "learner", "ranks", value=5), "roles.learner.ranks (5)"),
    "fewer prompts than mini-batches": (
        put("stages", 4, "algorithm", value={"name": "grpo", "num_mini_batches": 5}),
        "algorithm.num_mini_batches (5)",
    ),
    "fewer groups than ranks": (
        both(drop_stage(4), put("roles", "learner", "ranks", value=5)),
        "loop.groups_per_step of at least roles.learner.ranks (5)",
    ),
    "smallest batch of a file": (
        both(
            put("roles", "learner", "ranks", value=4),
            put("stages", 2, "held_out_fraction", value=0.3),  # 6 of 8 records are left, in batches of 3
        ),
        "batches of 3 groups for 4 ranks",
    ),
    "reward before feedback": (drop_stage(0), "stage reward needs a feedback stage before it"),
    "reward model without its stage": (drop_stage(1), "stage rl needs a reward stage before it"),
    "engine longer than its model": (
        put("roles", "judge", "engine", "max_model_len", value=4096),
        "roles.judge.engine.max_model_len: found 4096; needed at most 512",
    ),
    "missing file": (put("data", "train", "path", value="gone.jsonl"), "no file"),
    "missing constitution": (put("constitutions", "training", value="gone.yaml"), "gone.yaml"),
    "empty file": (write("prompts.jsonl", ""), "prompts.jsonl:1: found a file without rows"),
    "broken JSON line": (write("prompts.jsonl", ROW + "\n{broken"), "prompts.jsonl:2: found broken JSON"),
    "empty prompt": (
        write("prompts.jsonl", ROW + "\n" + ROW.replace("Write.", " ")),
        "prompts.jsonl:2: found an empty text",
    ),
    "prompt longer than the context": (
        write("prompts.jsonl", ROW.replace("Write.", "wonderful " * 300)),
        "needed at most 148",
    ),
    "a stage's file": (write("records.jsonl", '{"instruction": "x"}'), "records.jsonl:1: found no column 'output'"),
    "one record": (
        write("records.jsonl", '{"instruction": "x", "output": "y"}'),
        "records.jsonl: found 1 record; needed at least 2",
    ),
    "no chat template": (without("chat_template*"), "no chat template in the tokenizer"),
    "no tokenizer": (without("token*"), "no tokenizer that can be read"),
    "no weights": (without("*.safetensors"), "a folder without *.safetensors"),
    "a request that no constitution knows": (
        write("prompts.jsonl", ROW.replace("scathing", "lukewarm")),
        "request = 'lukewarm'",
    ),
    "a request that the independent scorer does not know": (
        both(unmeasured, put("stages", 5, "report_card", value={"slice_field": "genre"})),
        "stage evaluate: report_card.slice_field, prompt p/0: found no 'genre'",
    ),
    "a request that has no sign beside others that have": (
        both(unmeasured, put("stages", 5, "report_card", value={"independent": {"request_signs": {"scathing": -1}}})),
        "stage evaluate, prompt p/0: found request = 'enthusiastic'; needed request in ['scathing']",
    ),
    "no key of the judging service": (
        put("roles", "judge", "endpoint", value=ENDPOINT),
        "roles.judge.endpoint.api_key_variable: found no environment variable NO_SUCH_KEY_IS_SET",
    ),
    "a password in the judge's address": (
        put("roles", "judge", "endpoint", value=ENDPOINT | {"base_url": "https://me:hun@ter2@judge.example/v1"}),
        "roles.judge.endpoint.base_url: found 'https://***@judge.example/v1'; needed an address without user",
    ),
    "a password in an address of another kind": (
        put("roles", "judge", "endpoint", value=ENDPOINT | {"base_url": "ftp://me:hun@ter2@judge.example/v1"}),
        "found 'ftp://***@judge.example/v1'",
    ),
    "a label of two tokens": (relabelled, "labels: found ' positive', which is 2 tokens"),
    "labels that are the same word in a chat": (
        both(
            put("roles", "judge", "endpoint", value=ENDPOINT | {"api": "chat", "api_key_variable": None}),
            lambda recipe, folder: write(
                "pointwise.yaml", (folder / "pointwise.yaml").read_text().replace('" no"', '"Yes"')
            )(recipe, folder),
        ),
        "labels: found ' yes' and 'Yes'",
    ),
    "a cache without a size on a CPU": (
        put("roles", "generation", "engine", "kv_cache_gib", value=None),
        "roles.generation.engine.kv_cache_gib: found null",
    ),
    "another architecture": (
        remodelled(model_type="gpt2"),
        "a gpt2 model without embed_tokens",
    ),
    "an architecture that nobody knows": (
        remodelled(model_type="nonesuch"),
        "no model that transformers can build",
    ),
    "more last layers than there are": (
        put(
            *("stages", 4, "learner", "model"),
            value={"dtype": "float32", "trainable": "last_layers", "last_layers": 3},
        ),
        "stages.4.learner.model.last_layers: found 3; needed at most 2",
    ),
    "a head that is the embeddings": (
        put("stages", 2, "learner", "model", value={"dtype": "float32", "trainable": "head"}),
        "stages.2.learner.model.trainable: found 'head' for a model that shares it",
    ),
    "an adapter on layers that are not there": (
        put("stages", 1, "learner", "model", value={"adapter": {"targets": ["q_proj", "query"]}}),
        "stages.1.learner.model.adapter.targets: found 'query'; needed linear layers of the model: down_proj, ",
    ),
    "agreement of a pairwise judge": (
        both(pairwise, put("stages", 0, "measure_agreement", value=True)),
        "measure_agreement with a pairwise constitution",
    ),
    "an evaluation in pairs": (
        both(pairwise, put("stages", 5, "num_samples", value=2)),
        "stage evaluate: found constitutions.evaluation in mode pairwise",
    ),
    "validation in pairs": (
        both(pairwise, put("stages", 4, "loop", "evaluate_every", value=1)),
        "stage rl: found loop.evaluate_every",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_starts(case: str, folder: Path, tiny_model_dir: Path, capsys) -> None:
    change, said = BAD[case]
    recipe = good(folder, tiny_model_dir)
    change(recipe, folder)
    code, error = outcome(folder, recipe, capsys)
    assert code == 2
    assert said in error
    assert "ter2" not in error, "no password is shown"
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    assert not (folder / "run").exists(), "a refused recipe leaves no run directory"


def test_people_need_no_judge_and_their_prompts_no_request(folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    write("bare.jsonl", json.dumps({"prompt": "Write."}))(recipe, folder)
    recipe["data"] = {name: {"path": "bare.jsonl"} for name in ("train", "evaluation")}
    del recipe["constitutions"]
    recipe["stages"][0] = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
    recipe["stages"][4]["rewards"] = [{"source": "reward_model"}]
    assert outcome(folder, recipe, capsys) == (0, "")


@pytest.mark.parametrize(
    ("index", "part", "change", "code"),
    [
        *((index, "learner", "swapped", 2) for index in (1, 2, 3)),
        (4, "critic", "swapped", 2),
        (1, "learner", "more", 0),
        (3, "learner", "more", 2),
    ],
)
def test_a_model_of_another_vocabulary_is_refused_with_both_names(
    index: int, part: str, change: str, code: int, folder: Path, tiny_model_dir: Path, capsys
) -> None:
    recipe = good(folder, tiny_model_dir)
    other = folder / "other"
    shutil.copytree(tiny_model_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    if change == "more":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
        tokenizer.save_pretrained(other)
    else:
        path = other / "tokenizer.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        first, second = sorted(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        path.write_text(json.dumps(document), encoding="utf-8")
    if part == "critic":
        recipe["stages"][index] |= {"critic": recipes.learner(), "algorithm": {"name": "ppo"}}
    recipe["stages"][index][part]["model"]["path"] = str(other)
    found, error = outcome(folder, recipe, capsys)
    assert found == code, error
    if code:
        assert error.startswith(f"ConfigError: stages.{index}.{part}.model.path: ")
        assert str(other) in error and str(tiny_model_dir) in error


def test_the_context_of_what_is_trained_counts_where_no_engine_starts(folder: Path, tiny_model_dir, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    people = {"kind": "feedback", "source": "file", "data": {"path": "people.jsonl"}}
    recipe["stages"] = [people, *recipe["stages"][1:3]]
    recipe["max_sequence_tokens"] = 512  # above the generation engine's, which nobody uses
    assert outcome(folder, recipe, capsys) == (0, "")
    shutil.rmtree(folder / "run")
    recipe["max_sequence_tokens"] = 513
    code, error = outcome(folder, recipe, capsys)
    assert (code, "max_sequence_tokens: found 513; needed at most 512, the context of" in error) == (2, True), error
    assert "stage reward" in error


def test_agreement_needs_a_request_of_every_prompt(folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    write("bare.jsonl", json.dumps({"prompt": "Write."}))(recipe, folder)
    recipe["data"]["train"]["path"] = recipe["data"]["validation"]["path"] = "bare.jsonl"
    constitution = folder / recipe["constitutions"]["training"]
    text = constitution.read_text(encoding="utf-8")
    unsigned = "\n".join(line for line in text.splitlines() if not line.startswith("sign:"))
    (folder / "unsigned.yaml").write_text(unsigned, encoding="utf-8")
    recipe["constitutions"]["training"] = "unsigned.yaml"
    code, error = outcome(folder, recipe, capsys)
    assert (code, "stage feedback, prompt bare/00000: found no 'request'" in error) == (2, True), error
    recipe["stages"][0]["measure_agreement"] = False
    assert outcome(folder, recipe, capsys) == (0, "")


def test_agreement_is_measured_by_the_evaluations_own_columns_and_signs(folder: Path, tiny_model_dir, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    row = json.dumps({"prompt": "Write.", "request": "scathing", "mood": "glad"})
    write("prompts.jsonl", row)(recipe, folder)
    card = {"slice_field": "mood", "independent": {"request_signs": {"glad": 1}}}
    recipe["stages"][5]["report_card"] = card
    for data in recipe["data"].values():
        data["path"] = "prompts.jsonl"
    assert outcome(folder, recipe, capsys) == (0, "")
    card["independent"]["request_signs"] = {"gloomy": -1}
    recipe["data"]["evaluation"]["path"] = "gloomy.jsonl"
    write("gloomy.jsonl", row.replace("glad", "gloomy"))(recipe, folder)
    code, error = outcome(folder, recipe, capsys)
    assert (code, "stage feedback, prompt prompts/00000: found mood = 'glad'" in error) == (2, True), error


def test_the_tokenizer_of_a_stages_own_model_reads_its_file(folder: Path, tiny_model_dir: Path, capsys) -> None:
    recipe = good(folder, tiny_model_dir)
    other = folder / "other"
    shutil.copytree(tiny_model_dir, other, ignore=shutil.ignore_patterns("chat_template*"))
    recipe["stages"][2]["learner"]["model"]["path"] = str(other)
    code, error = outcome(folder, recipe, capsys)
    assert code == 2
    assert "records.jsonl: found chat data, and no chat template" in error


def test_a_run_directory_of_another_config_is_refused_with_the_difference(
    folder: Path, tiny_model_dir: Path, capsys
) -> None:
    recipe = good(folder, tiny_model_dir)
    assert outcome(folder, recipe, capsys)[0] == 0
    recipe["sampling"]["temperature"] = 0.5
    code, error = outcome(folder, recipe, capsys)
    assert code == 2
    assert "sampling.temperature" in error and "0.5" in error


@pytest.mark.parametrize("part", ["template", "include"])
def test_a_run_does_not_go_on_under_a_judge_that_is_told_something_else(
    part: str, folder: Path, tiny_model_dir: Path, capsys
) -> None:
    recipe = good(folder, tiny_model_dir)
    path = folder / recipe["constitutions"]["training"]
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    (folder / "more.yaml").write_text(yaml.safe_dump({"principles": document.pop("principles")}), encoding="utf-8")
    path.write_text(yaml.safe_dump(document | {"include": "more.yaml"}), encoding="utf-8")
    assert outcome(folder, recipe, capsys) == (0, "")
    path.write_text("# a remark\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert outcome(folder, recipe, capsys) == (0, "")
    changed = folder / {"template": document["template"], "include": "more.yaml"}[part]
    text = changed.read_text(encoding="utf-8")
    changed.write_text(text.replace("principles: ", "principles: Not so. ") if part == "include" else "Hm. " + text)
    code, error = outcome(folder, recipe, capsys)
    assert (code, "data.constitutions.training" in error) == (2, True), error


def test_too_few_devices_are_refused_by_arithmetic_and_leave_the_directory_to_a_smaller_recipe(
    folder: Path, tiny_model_dir: Path, capsys
) -> None:
    recipe = good(folder, tiny_model_dir)
    recipe["roles"]["learner"] = {"ranks": 4, "resources": {"cpus": 1.5}}
    code, error = outcome(folder, recipe, capsys)
    assert code == 3
    assert "room for 2 of 4 actors" in error and "Set roles.learner.ranks=2" in error
    assert not (folder / "run").exists()
    recipe["roles"]["learner"]["ranks"] = 2
    assert outcome(folder, recipe, capsys) == (0, "")
    assert (folder / "run" / "config.yaml").is_file()
    recipe["ray"]["num_cpus"] = 1  # fewer than the run was started with
    assert outcome(folder, recipe, capsys)[0] == 3


def test_a_stage_by_name_waits_for_its_turn(folder: Path, tiny_model_dir: Path, capsys) -> None:
    path = recipes.write_recipe(folder, good(folder, tiny_model_dir))
    run = RunDirectory(folder / "run")

    def chosen(name: str) -> tuple[int, str]:
        try:
            code = cli.main(["run", str(path), "--stage", name])
        except Started:
            code = 0
        return code, capsys.readouterr().err

    code, error = chosen("evaluate")
    assert (code, "stage feedback before it, which is not complete" in error) == (2, True), error
    assert not (folder / "run").exists()
    assert chosen("feedback") == (0, "")
    run.complete("feedback", {})
    code, error = chosen("rl")
    assert (code, "stage reward before it" in error) == (2, True), error
    for name in ("reward", "rl"):
        run.complete(name, {})
    code, error = chosen("sft")
    assert (code, "stage rl after it, which is complete without it" in error) == (2, True), error


def test_of_a_complete_run_nothing_but_the_recipe_is_looked_at(
    folder: Path, tiny_model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = good(folder, tiny_model_dir)
    without("nothing")(recipe, folder)
    assert outcome(folder, recipe, capsys) == (0, "")
    for stage in recipe["stages"]:
        RunDirectory(folder / "run").complete(stage["kind"], {})
    (folder / "prompts.jsonl").unlink()
    shutil.rmtree(folder / "model")
    recipe["seed"] += 1
    recipe["ray"]["num_cpus"] = 0.1  # neither devices nor data are of use any more
    finished: list[Path] = []
    monkeypatch.setattr(runner, "_finish", lambda config, root: finished.append(root) or 0)
    path = recipes.write_recipe(folder, recipe)
    assert cli.main(["run", str(path)]) == 2, "a key that may not change is refused all the same"
    recipe["seed"] -= 1
    recipes.write_recipe(folder, recipe)
    assert cli.main(["run", str(path)]) == 0
    assert "every stage is complete" in capsys.readouterr().out
    assert finished == [folder / "run"]

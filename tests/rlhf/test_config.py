"""Configuration: includes, overrides, strictness, and messages that name the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from rlhf.config import StrictModel, apply_overrides, dump, load_file, merge, parse_yaml, validate
from rlhf.errors import ConfigError


class Optimizer(StrictModel):
    lr: float = 1e-6
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the two moments."""


class Grpo(StrictModel):
    name: Literal["grpo"] = "grpo"
    """Which algorithm."""
    clip: float = 0.2
    """Width of the clip."""


class Ppo(StrictModel):
    name: Literal["ppo"] = "ppo"
    """Which algorithm."""
    gae_lambda: float = 0.95
    """Decay of the advantage."""


class Stage(StrictModel):
    kind: Literal["sft", "rl"]
    """Which loop."""
    steps: int = 1
    """How long."""
    algorithm: Annotated[Grpo | Ppo, Field(discriminator="name")] = Grpo()
    """How the policy learns."""


class Span(StrictModel):
    low: int = 0
    """Lower end."""
    high: int = 1
    """Upper end."""

    @model_validator(mode="after")
    def _ordered(self) -> Span:
        if self.low > self.high:
            raise ValueError(f"low at most high ({self.high})")
        return self


class Root(StrictModel):
    seed: int = 0
    """Of everything random."""
    model: Path | None = None
    """A folder."""
    fast: bool = False
    """Skips the slow parts."""
    optim: Optimizer = Optimizer()
    """The optimizer."""
    stages: tuple[Stage, ...] = ()
    """What runs, in order."""
    span: Span = Span()
    """Two keys that depend on each other."""
    fleets: dict[str, Stage] = {}
    """By role."""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def fault_of(text: str, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        validate(Root, apply_overrides(parse_yaml(text, "run.yaml"), overrides), "run.yaml")
    return error.value


class TestYaml:
    @pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-5", "1.0e-5", "0.00001", ".1e-4", "10e-6"])
    def test_numbers_with_exponents_are_numbers(self, text):
        assert parse_yaml(f"lr: {text}", "x") == {"lr": 1e-5}

    @pytest.mark.parametrize("text", ["e5", "1e", "v1e-5", "'1e-5'"])
    def test_words_stay_words(self, text):
        assert isinstance(parse_yaml(f"name: {text}", "x")["name"], str)

    def test_a_key_given_twice_is_refused_with_its_line(self):
        with pytest.raises(ConfigError, match=r"run.yaml:3: .*'seed' is given twice"):
            parse_yaml("seed: 1\nfast: true\nseed: 2\n", "run.yaml")

    def test_a_key_given_twice_below_is_refused(self):
        with pytest.raises(ConfigError, match="given twice"):
            parse_yaml("a:\n  b: [{c: 1, c: 2}]\n", "run.yaml")

    def test_merge_keys_are_no_repetition(self):
        text = "base: &base {lr: 1, eps: 2}\nmore: &more {<<: *base, lr: 3}\nlast: {<<: *more, eps: 4}\n"
        assert parse_yaml(text, "x")["last"] == {"lr": 3, "eps": 4}

    @pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\ta: 1", "{[1, 2]: 3}", "? [1]\n: 2"])
    def test_broken_yaml_names_file_and_line(self, text):
        with pytest.raises(ConfigError, match=r"run\.yaml:\d+"):
            parse_yaml(text, "run.yaml")

    @pytest.mark.parametrize("value", ["2024-13-45", "2024-01-01 25:00:00", "0b_", "a\x07b", "!!int many"])
    def test_a_value_that_cannot_be_read_names_file_and_line(self, value):
        with pytest.raises(ConfigError, match=r"run\.yaml:2: ") as caught:
            parse_yaml(f"seed: 1\nname: {value}\n", "run.yaml")
        assert caught.value.exit_code == 2

    def test_a_file_cannot_construct_objects(self):
        with pytest.raises(ConfigError, match="constructor"):
            parse_yaml("a: !!python/object/apply:os.system ['true']", "run.yaml")


class TestFiles:
    def test_later_includes_win_and_the_file_wins_over_them(self, tmp_path):
        write(tmp_path, "parts/one.yaml", "seed: 1\noptim: {lr: 0.1, betas: [0.5, 0.6]}\n")
        write(tmp_path, "parts/two.yaml", "seed: 2\noptim: {lr: 0.2}\n")
        root = write(tmp_path, "run.yaml", "include: [parts/one.yaml, parts/two.yaml]\noptim:\n  lr: 0.3\n")
        assert load_file(root) == {"seed": 2, "optim": {"lr": 0.3, "betas": [0.5, 0.6]}}

    def test_includes_are_relative_to_the_file_that_names_them(self, tmp_path):
        write(tmp_path, "a/b/leaf.yaml", "seed: 7\n")
        write(tmp_path, "a/branch.yaml", "include: b/leaf.yaml\n")
        assert load_file(write(tmp_path, "run.yaml", "include: a/branch.yaml\n")) == {"seed": 7}

    def test_one_file_may_be_included_twice(self, tmp_path):
        write(tmp_path, "leaf.yaml", "seed: 7\n")
        write(tmp_path, "left.yaml", "include: leaf.yaml\nfast: true\n")
        root = write(tmp_path, "run.yaml", "include: [leaf.yaml, left.yaml]\n")
        assert load_file(root) == {"seed": 7, "fast": True}

    def test_a_cycle_is_shown_as_a_chain(self, tmp_path):
        write(tmp_path, "a.yaml", "include: b.yaml\n")
        write(tmp_path, "b.yaml", "include: a.yaml\n")
        with pytest.raises(ConfigError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
            load_file(tmp_path / "a.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "an empty file"),
            ("# only a comment\n", "an empty file"),
            ("- 1\n", "a list"),
            ("include: {a: 1}\n", "include"),
            ("include: [1]\n", "include"),
            ("include: missing.yaml\n", "no file .*missing.yaml"),
        ],
    )
    def test_unusable_files_say_what_they_are(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message) as error:
            load_file(write(tmp_path, "run.yaml", text))
        assert "run.yaml" in error.value.where
        assert error.value.exit_code == 2

    def test_a_missing_file_and_a_folder_are_refused(self, tmp_path):
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(ConfigError, match="no file"):
                load_file(path)

    def test_a_file_that_is_not_text_is_refused(self, tmp_path):
        (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="UTF-8"):
            load_file(tmp_path / "run.yaml")

    def test_merge_leaves_its_arguments_alone(self):
        base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
        assert merge(base, over) == {"a": {"b": 1, "c": 2}}
        assert base == {"a": {"b": 1}} and over == {"a": {"c": 2}}


class TestOverrides:
    def test_values_are_yaml(self):
        document = apply_overrides({}, ["a=1", "b=1e-5", "c=[1, 2]", "d=text", "e=", "f=true", "g=x=y"])
        assert document == {"a": 1, "b": 1e-5, "c": [1, 2], "d": "text", "e": None, "f": True, "g": "x=y"}

    def test_sections_are_made_and_kept(self):
        assert apply_overrides({"a": {"b": 1}}, ["a.c=2", "d.e=3"]) == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}

    def test_list_items_go_by_index(self):
        document = {"stages": [{"steps": 1}, {"steps": 1}]}
        assert apply_overrides(document, ["stages.1.steps=5"]) == {"stages": [{"steps": 1}, {"steps": 5}]}
        assert document == {"stages": [{"steps": 1}, {"steps": 1}]}

    def test_the_last_one_wins(self):
        assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            ("seed", "no '='"),
            ("=3", "no '='"),
            ("stages.2.steps=1", "an index from 0 to 0"),
            ("stages.x=1", "an index from 0 to 0"),
            ("seed.x=1", "the value 3"),
            ("a=[1", "override a"),
        ],
    )
    def test_impossible_ones_say_why(self, item, message):
        with pytest.raises(ConfigError, match=message):
            apply_overrides({"seed": 3, "stages": [{}]}, [item])


class TestValidation:
    def test_yaml_lists_and_text_become_tuples_and_paths(self):
        root = validate(Root, {"model": "a/b", "optim": {"betas": [0.1, 0.2], "lr": 1}}, "x")
        assert root.model == Path("a/b")
        assert root.optim == Optimizer(lr=1.0, betas=(0.1, 0.2))

    @pytest.mark.parametrize(
        "text", ["seed: '3'", "seed: 3.0", "seed: true", "fast: 1", "fast: 'yes'", "optim: {lr: '1e-5'}", "model: 3"]
    )
    def test_nothing_is_converted_silently(self, text):
        fault = fault_of(text)
        assert fault.where.startswith("run.yaml: ")
        assert fault.exit_code == 2

    @pytest.mark.parametrize(
        ("text", "where", "action"),
        [
            ("sed: 1", "run.yaml: sed", "Did you mean 'seed'?"),
            ("optim: {learning: 1, rl: 2}", "run.yaml: optim.", "more below"),
            ("optim: {beta: 1}", "run.yaml: optim.beta", "Did you mean 'betas'?"),
            ("lr: 1e-6", "run.yaml: lr", "Did you mean 'optim.lr'?"),
            ("gae_lambda: 1", "run.yaml: gae_lambda", "Did you mean 'stages.algorithm.gae_lambda'?"),
            ("stages: [{kind: sft, step: 2}]", "run.yaml: stages.0.step", "Did you mean 'steps'?"),
            ("stages: [{kind: rl, algorithm: {name: grpo, clp: 1}}]", "run.yaml: stages.0.algorithm.clp", "'clip'"),
            ("fleets: {judge: {kind: rl, setps: 1}}", "run.yaml: fleets.judge.setps", "Did you mean 'steps'?"),
            ("qqqqqq: 1", "run.yaml: qqqqqq", "docs/config.md"),
        ],
    )
    def test_an_unknown_key_is_named_with_the_likely_one(self, text, where, action):
        fault = fault_of(text)
        assert fault.where.startswith(where)
        assert action in fault.action

    @pytest.mark.parametrize(
        ("text", "where", "found", "action"),
        [
            ("stages: [{steps: 2}]", "stages.0.kind", "nothing", "Add the key"),
            ("stages: [{kind: stf}]", "stages.0.kind", "'stf'", "Did you mean 'sft'?"),
            ("stages: [{kind: rl, algorithm: {name: pop}}]", "stages.0.algorithm.name", "'pop'", "Did you mean 'ppo'?"),
            ("stages: [{kind: rl, algorithm: {clip: 1}}]", "stages.0.algorithm.name", "nothing", "Add the key"),
            ("stages: [{kind: rl, algorithm: {name: grpo, clip: x}}]", "stages.0.algorithm.clip", "'x'", "Mend"),
            ("optim: {betas: [0.1]}", "optim.betas", "", ""),
            ("optim: 3", "optim", "3", "Mend"),
            ("span: {low: 4, high: 2}", "span", "do not go together", "Mend"),
        ],
    )
    def test_a_wrong_value_is_named_by_its_key_as_written(self, text, where, found, action):
        fault = fault_of(text)
        assert fault.where.startswith(f"run.yaml: {where}")
        assert found in fault.found
        assert action in fault.action

    def test_a_combination_that_cannot_work_says_what_would(self):
        assert fault_of("span: {low: 4, high: 2}").needed == "low at most high (2)"

    def test_a_fault_from_the_command_line_is_named_too(self):
        assert fault_of("seed: 1", ("optim.lrr=3",)).where == "run.yaml: optim.lrr"

    def test_sections_are_frozen(self):
        root = Root()
        with pytest.raises(ValidationError):
            root.seed = 3  # type: ignore[misc]

    def test_fields_are_documented_where_they_are_defined(self):
        assert Optimizer.model_fields["lr"].description == "Learning rate."


def test_the_precedence_is_default_include_file_command_line(tmp_path):
    write(tmp_path, "part.yaml", "seed: 1\nfast: true\noptim: {lr: 0.1}\n")
    document = load_file(write(tmp_path, "run.yaml", "include: part.yaml\nseed: 2\noptim: {lr: 0.2}\n"))
    root = validate(Root, apply_overrides(document, ["optim.lr=0.3"]), "run.yaml")
    assert (root.optim.betas, root.fast, root.seed, root.optim.lr) == ((0.9, 0.99), True, 2, 0.3)


finite = st.floats(allow_nan=False, allow_infinity=False)
stages = st.builds(
    Stage,
    kind=st.sampled_from(["sft", "rl"]),
    steps=st.integers(0, 10**6),
    algorithm=st.one_of(st.builds(Grpo, clip=finite), st.builds(Ppo, gae_lambda=finite)),
)
roots = st.builds(
    Root,
    seed=st.integers(-(2**62), 2**62),
    model=st.none() | st.sampled_from([Path("a b/c"), Path("/tmp/x: y"), Path("1e5"), Path("no")]),
    fast=st.booleans(),
    optim=st.builds(Optimizer, lr=finite, betas=st.tuples(finite, finite)),
    stages=st.lists(stages, max_size=3).map(tuple),
    fleets=st.dictionaries(st.sampled_from(["judge", "on", "1", "a.b", "ü"]), stages, max_size=2),
)


@given(roots)
def test_a_dumped_configuration_reloads_equal(root):
    assert validate(Root, parse_yaml(dump(root), "x"), "x") == root

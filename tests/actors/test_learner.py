from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.maths.packing import pack
from rlhf.models.forward import language_outputs
from tests.actors.engine_ranks import run_ranks
from tests.actors.resharding_work import CASES
from tests.rlhf.models.conftest import make_groups
from tests.tiny import build_tiny_model

pytestmark = pytest.mark.engine


def one_rank_cases(info: Any, model: Path, scratch: Path, meeting: Path) -> dict[str, Any]:
    from tests.actors import learner_work as work
    from tests.actors import resharding_work as resharding

    return {
        "stages": work.supervised_stages(info, model, scratch),
        "exports": work.export_checks(info, model, scratch),
        "online": work.online_cases(info, model, scratch),
        "three_skips": work.three_skips(info, model, scratch),
        "saves": resharding.same_ranks(info, model, scratch),
        "exchanged": resharding.exchanged(info, model, meeting),
    }


def two_rank_cases(info: Any, model: Path, scratch: Path, meeting: Path) -> dict[str, Any]:
    from tests.actors import learner_work as work
    from tests.actors import resharding_work as resharding

    return {
        "stages": work.supervised_stages(info, model, scratch),
        "exports": work.export_checks(info, model, scratch),
        "online": work.online_cases(info, model, scratch),
        "saves": resharding.same_ranks(info, model, scratch),
        "exchanged": resharding.exchanged(info, model, meeting),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("learner") / "model")


@pytest.fixture(scope="module")
def gangs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Future[list[dict[str, Any]]]]]:
    """One rank and, beside it, two; what takes time is how they start."""
    cases = {1: one_rank_cases, 2: two_rank_cases}
    meeting = tmp_path_factory.mktemp("meeting")

    def scratch(num_ranks: int) -> Path:
        return tmp_path_factory.mktemp(f"ranks{num_ranks}")

    with ThreadPoolExecutor(len(cases)) as pool:
        yield {
            num_ranks: pool.submit(
                run_ranks,
                num_ranks,
                work,
                model,
                tmp_path_factory.mktemp(f"ranks{num_ranks}"),
                meeting,
                timeout_s=500.0,
            )
            for num_ranks, work in cases.items()
        }


@pytest.fixture(scope="module")
def single(gangs: dict[int, Future[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return gangs[1].result()


@pytest.fixture(scope="module")
def pair(gangs: dict[int, Future[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return gangs[2].result()


@pytest.fixture(params=["single", "pair"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def oracle(model: Path) -> dict[str, Any]:
    """Two steps of plain torch: the whole batch at once, AdamW, clipping."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    groups = make_groups(8, 2)
    batch = pack(groups, pad_id=0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step in range(2):
        optimizer.zero_grad()
        log_probs = language_outputs(plain, batch).log_probs
        loss = -(log_probs * batch.mask).sum() / batch.mask.sum()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)))
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 3
        optimizer.step()
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: parameter.detach().numpy() for name, parameter in plain.named_parameters()},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_equal_plain_adamw(ranks: list[dict[str, Any]], oracle: dict[str, Any], stage: int) -> None:
    results = [rank["stages"][f"stage{stage}"] for rank in ranks]
    assert set(results[0]["weights"]) == set(oracle["weights"])
    for name, wanted in oracle["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], wanted, atol=5e-5, rtol=0, err_msg=name)
    for result in results:
        found = result["metrics"]
        assert [m["nll"] for m in found] == pytest.approx(oracle["losses"], rel=1e-5)
        assert [m["grad_norm"] for m in found] == pytest.approx(oracle["norms"], rel=1e-4)
        assert [m["lr"] for m in found] == pytest.approx([1e-2 / 3, 2e-2 / 3])
        assert found == results[0]["metrics"], "metrics are the same on every rank"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_number_that_is_not_finite_on_one_rank_skips_all(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        result = rank["stages"][f"stage{stage}"]
        assert [m["skipped"] for m in result["skipped"]] == [1.0, 1.0]
        assert [m["consecutive_skips"] for m in result["skipped"]] == [1.0, 2.0]
        assert result["unchanged"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_learner_goes_on_bit_equal(ranks: list[dict[str, Any]], stage: int) -> None:
    for rank in ranks:
        result = rank["stages"][f"stage{stage}"]
        assert result["resumes"]
        names = [f"rank_{i}.{kind}" for i in range(len(ranks)) for kind in ("json", "safetensors")]
        assert result["files"] == names, "each rank its own, and no pickle"


@pytest.mark.parametrize("case", CASES)
def test_what_one_number_of_ranks_saved_another_goes_on_with(ranks: list[dict[str, Any]], case: str) -> None:
    """Two ranks load what one saved, and one what two saved: the same state, bit for bit, and the same losses."""
    for rank in ranks:
        result = rank["exchanged"][case]
        assert result["same names"] and result["same state"] and result["means"] > 0
        assert result["same weights"]
        tolerance = 2e-2 if "bf16" in case else 1e-4
        assert result["losses"] == pytest.approx(result["expected"], rel=tolerance)
        assert result["losses"][-1] < result["losses"][0]
        assert result["different random states"]
    assert ranks[0]["exchanged"][case]["num weights"] > 10


def test_a_copy_that_is_written_while_training_goes_on_is_what_was_copied(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["saves"]
        assert result["same bytes"], "as if it had been written at once"
        assert result["goes on"], "from a URL as from a folder"
        assert len(result["files"]) == 2 * len(ranks)


def test_a_rank_finds_the_damage_in_what_it_reads(ranks: list[dict[str, Any]]) -> None:
    last = f"rank_{len(ranks) - 1}.safetensors with altered bytes"
    assert ranks[0]["saves"]["faults"] == [""] * (len(ranks) - 1) + [last]


def test_the_state_of_other_parts_of_the_model_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "Resume with the model, and the trained parts of it" in rank["saves"]["refused"]
        assert rank["saves"]["unchanged"]


def test_the_third_skip_in_a_row_ends_training(single: list[dict[str, Any]]) -> None:
    assert "not finite in 3 updates in a row" in single[0]["three_skips"]
    assert "set another run_dir" in single[0]["three_skips"], "a resume refuses another rate or dtype"


@pytest.mark.parametrize("name", ["full", "lora", "fp32"])
def test_buckets_equal_the_exported_folder(ranks: list[dict[str, Any]], model: Path, name: str) -> None:
    result = ranks[0]["exports"][name]
    assert result["same_names"] and result["equal"] and result["num_buckets"] > 1
    assert "lm_head.weight" not in result["names"]
    plain = AutoModelForCausalLM.from_pretrained(result["folder"])
    assert plain.dtype == (torch.float32 if name == "fp32" else torch.bfloat16)
    assert plain.lm_head.weight.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(result["folder"]).chat_template


def test_the_exported_adapter_gives_the_merged_model(single: list[dict[str, Any]], model: Path) -> None:
    from peft import PeftModel

    folder = single[0]["exports"]["lora"]["folder"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    batch = pack(make_groups(3), pad_id=0)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, theirs, start = (language_outputs(m, batch).log_probs for m in (merged, adapted, plain))
    assert (ours - theirs).abs().max() < 0.15
    assert (ours - start).abs().mean() > 3 * (ours - theirs).abs().mean()


@pytest.mark.parametrize("name", ["grpo", "grpo_lora_bf16"])
def test_grpo_raises_the_rewarded_completion(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        result = rank["online"][name]
        assert min(result["rewarded"]) > 0.5
        assert max(result["others"]) < min(result["rewarded"])
        metrics = result["metrics"]
        assert all(m["skipped"] == 0 and m["entropy"] > 0 for m in metrics)
        assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-3) and metrics[-1]["kl"] > metrics[0]["kl"]
        assert metrics == ranks[0]["online"][name]["metrics"]
        assert result["reference_off"] < 1e-5, "the reference stays where training started"


def test_one_and_two_ranks_learn_the_same(single: list[dict[str, Any]], pair: list[dict[str, Any]]) -> None:
    for one, two in zip(single[0]["online"]["grpo"]["metrics"], pair[0]["online"]["grpo"]["metrics"], strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    for one, two in zip(single[0]["online"]["ppo"]["critic"], pair[0]["online"]["ppo"]["critic"], strict=True):
        assert set(one) == set(two)


def test_a_group_that_one_rank_cannot_read_stops_all_before_they_begin(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["online"]["lost"]
        assert result["uids"] == result["expected"]
        assert result["unchanged"] and result["skipped"] == 0


def test_ppo_trains_policy_and_critic(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["online"]["ppo"]
        assert result["annotated"] == ["old_log_probs", "reference_log_probs", "values"]
        assert result["critic"][-1]["value_loss"] < 0.7 * result["critic"][0]["value_loss"]
        assert all(m["skipped"] == 0 for m in result["policy"] + result["critic"])
        assert result["policy"][0]["update_kl"] > 0


def test_ppo_s_policy_and_critic_learn_from_the_same_rewards(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["online"]["ppo"]["same_signals"] and rank["online"]["ppo"]["num_pairs"] == 6
        assert "old_log_probs" in rank["online"]["ppo"]["refused"]


def test_a_trained_reward_model_scores_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    result = ranks[0]["online"]["reward"]
    assert result["metrics"]["pair_accuracy"] == 1.0
    scores = np.array(result["scores"])
    assert result["evaluated"]["pair_accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())
    assert all(rank["online"]["reward"]["evaluated"] == result["evaluated"] for rank in ranks)
    np.testing.assert_allclose(result["raw"], result["scores"], atol=1e-4)
    scored = np.array(result["scored"])
    assert scored.mean() == pytest.approx(0.0, abs=1e-4) and scored.std() == pytest.approx(1.0, abs=1e-3)
    plain = AutoModelForSequenceClassification.from_pretrained(result["folder"], dtype=torch.float32)
    assert plain.config.num_labels == 1

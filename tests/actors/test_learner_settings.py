from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from pydantic import ValidationError

from actors.deepspeed.config import DeepSpeedConfig, OptimConfig, deepspeed_settings, learning_rate
from actors.learner import LearnerWorker
from actors.ranks import ProcessGroup, RankInfo
from actors.settings import LearnerConfig
from actors.store import LocalStore
from rlhf.errors import LearnerError
from rlhf.objectives.config import SupervisedConfig


def rates(config: OptimConfig, total: int) -> list[float]:
    return [learning_rate(config, step, total) for step in range(total)]


def test_the_rate_warms_up_and_then_follows_its_schedule() -> None:
    assert rates(OptimConfig(lr=1.0), 3) == [1.0, 1.0, 1.0]
    assert rates(OptimConfig(lr=1.0, warmup_steps=2), 4) == [0.5, 1.0, 1.0, 1.0]
    assert rates(OptimConfig(lr=1.0, schedule="linear"), 5) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    linear = OptimConfig(lr=2.0, warmup_steps=2, schedule="linear", final_lr_ratio=0.5)
    assert rates(linear, 5) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0])
    cosine = rates(OptimConfig(lr=1.0, schedule="cosine", final_lr_ratio=0.1), 5)
    assert cosine == pytest.approx([1.0, 0.8681980515, 0.55, 0.2318019485, 0.1])
    assert learning_rate(OptimConfig(lr=1.0, schedule="linear"), 9, 5) == 0.0, "steps beyond the last stay there"
    assert learning_rate(OptimConfig(lr=1.0, schedule="cosine"), 0, 1) == 1.0


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="offload_optimizer"):
        DeepSpeedConfig(offload_optimizer=True)
    with pytest.raises(ValidationError, match="offload_parameters"):
        DeepSpeedConfig(zero_stage=2, offload_parameters=True)
    with pytest.raises(ValidationError, match="betas"):
        OptimConfig(betas=(0.9, 1.0))


@pytest.mark.parametrize(
    ("stage", "dtype", "clip", "accumulation"),
    [(0, "float32", 0.0, None), (0, "bfloat16", 0.5, None), (2, "float32", 0.5, None), (2, "bfloat16", 0.5, "fp32")],
)
def test_gradients_are_summed_in_fp32_and_clipped_once(
    stage: int, dtype: str, clip: float, accumulation: str | None
) -> None:
    settings = deepspeed_settings(DeepSpeedConfig(zero_stage=stage), dtype=dtype, max_grad_norm=0.5)
    assert settings["gradient_clipping"] == clip
    assert settings["communication_data_type"] == "fp32"
    assert settings.get("data_types", {}).get("grad_accum_dtype") == accumulation
    assert settings["bf16"]["enabled"] == (dtype == "bfloat16")


def test_offloading_is_passed_on() -> None:
    config = DeepSpeedConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    zero = deepspeed_settings(config, dtype="bfloat16", max_grad_norm=1.0)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"} and zero["offload_param"] == {"device": "cpu"}


def test_ranks_without_a_rendezvous_are_refused() -> None:
    with pytest.raises(LearnerError, match=r"join\(address, port\)"):
        ProcessGroup(RankInfo(rank=1, world_size=2), timeout_s=1)


@pytest.mark.parametrize(("threads", "taken"), [(0, [48]), (3, [3]), (None, [])])
def test_a_rank_counts_the_cores_of_its_own_node(threads: int | None, taken: list[int], monkeypatch) -> None:
    found: list[int] = []
    monkeypatch.setattr("actors.learner.os.cpu_count", lambda: 48)
    monkeypatch.setattr("torch.set_num_threads", found.append)
    info = RankInfo(world_size=2, threads=threads)
    worker = LearnerWorker(LearnerConfig(), LocalStore(), info, objective=SupervisedConfig(), total_steps=1)
    with pytest.raises(LearnerError, match="rendezvous"):  # the threads are set by then
        worker.start()
    assert found == taken


def test_the_gang_meets_at_its_node_s_address_and_not_at_that_of_the_host_s_name(monkeypatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    worker = LearnerWorker(LearnerConfig(), LocalStore(), RankInfo(), objective=SupervisedConfig(), total_steps=1)
    address, port = worker.rendezvous()
    assert address == "10.0.0.7" and port > 0


def test_settings_import_no_torch() -> None:
    code = "import sys, actors.settings; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

"""On a machine with a GPU: set-up chose the CUDA packages, and PyTorch computes on the device."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_the_doctor_finds_a_cuda_build_for_the_gpu():
    from cluster.doctor import run_doctor

    checks = {check.name: check for check in run_doctor()}
    assert checks["torch"].ok, checks["torch"].action
    assert checks["vllm"].ok, checks["vllm"].action


@pytest.mark.timeout(1500)
def test_the_doctors_small_run_goes_through_on_the_gpu(tmp_path):
    from cluster.doctor import gather_facts
    from cluster.doctor.command import visible_gpus
    from cluster.doctor.trial import check_trial

    num_gpus = visible_gpus(gather_facts())
    assert num_gpus
    assert [check.found for check in check_trial(num_gpus, None, tmp_path) if not check.ok] == []


def test_a_matrix_product_on_the_gpu_agrees_with_the_cpu():
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((left.cuda() @ right.cuda()).cpu(), left @ right)

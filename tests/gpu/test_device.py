"""On a machine with a GPU: set-up chose the CUDA packages, and PyTorch computes on the device."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_the_doctor_finds_a_cuda_build_for_the_gpu():
    from cluster.doctor import run_doctor

    checks = {check.name: check for check in run_doctor()}
    assert checks["torch"].ok, checks["torch"].action
    assert checks["vllm"].ok, checks["vllm"].action


def test_a_matrix_product_on_the_gpu_agrees_with_the_cpu():
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    torch.testing.assert_close((left.cuda() @ right.cuda()).cpu(), left @ right)

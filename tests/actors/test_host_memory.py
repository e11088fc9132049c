"""Device memory on loan, on a CPU that plays the device: bytes go and come back below every view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from actors.host_memory import HostMemory, module_tensors, storage_id, tensors_within


def test_bytes_go_and_come_back_below_views_and_shared_tensors() -> None:
    whole = torch.arange(12.0)
    view, tied = whole.view(3, 4)[1:], whole.detach()
    memory = HostMemory("cpu")
    assert memory.park([view, whole, tied]) == 48
    assert whole.untyped_storage().nbytes() == view.untyped_storage().nbytes() == 0
    assert view.shape == (2, 4)
    assert memory.park([whole]) == 48, "what is parked already is not parked again"
    memory.restore()
    memory.restore()
    torch.testing.assert_close(whole, torch.arange(12.0), rtol=0, atol=0)
    assert view[0].tolist() == [4.0, 5.0, 6.0, 7.0]
    view[0, 0] = -1.0
    assert whole[4] == tied[4] == -1.0, "the views still share memory"


def test_what_cannot_be_resized_and_what_lies_elsewhere_stays() -> None:
    mapped = torch.frombuffer(bytearray(16), dtype=torch.uint8)
    elsewhere = torch.empty(3, device="meta")
    assert HostMemory("cpu").park([mapped, elsewhere]) == 0
    assert mapped.untyped_storage().nbytes() == 16


def test_an_optimizer_goes_on_bit_for_bit() -> None:
    def train(put_aside: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        batch = torch.randn(8, 5)
        memories = {"weights": HostMemory("cpu"), "state": HostMemory("cpu")}
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
            if put_aside:
                weights = {storage_id(tensor) for tensor in module_tensors(model)}
                memories["weights"].park(module_tensors(model))
                memories["state"].park(t for t in tensors_within(optimizer) if storage_id(t) not in weights)
                assert not any(t.untyped_storage().nbytes() for t in tensors_within(optimizer))
                for memory in memories.values():
                    memory.restore()
        return [tensor.clone() for tensor in (*module_tensors(model), *tensors_within(optimizer))]

    for straight, interrupted in zip(train(False), train(True), strict=True):
        assert torch.equal(straight, interrupted)


def test_tensors_are_found_in_containers_dataclasses_and_wrapped_optimizers() -> None:
    @dataclass
    class Bucket:
        buffer: list[torch.Tensor]

    class Wrapper:
        def __init__(self) -> None:
            self.module = nn.Linear(1, 1)
            self.optimizer = torch.optim.SGD([torch.full((1,), 1.0)], lr=0.1)
            self.buckets = {"float32": Bucket([torch.full((1,), 2.0)])}
            self.flat = ([torch.full((1,), 3.0)],)
            self.cycle = self.flat
            self.name = "text"

    found = sorted(float(tensor) for tensor in tensors_within(Wrapper()))
    assert found == [1.0, 2.0, 3.0], "a module is somebody else's"

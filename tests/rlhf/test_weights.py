import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import PublicationError
from rlhf.weights import Bucket, bucket_tensors, combine_digests, make_bucket, plan_buckets, verify_bucket


def _tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5).to(dtype),
        "b.bias": torch.randn(7).to(dtype),
        "c.scalar": torch.randn(()).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_back_bit_equal(dtype):
    sent = _tensors(dtype)
    bucket = make_bucket(0, 1, sent)
    verify_bucket(bucket)
    received = bucket_tensors(bucket)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == dtype
        assert torch.equal(received[name], tensor)


def test_a_view_that_is_not_contiguous_is_copied_by_value():
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).T
    assert torch.equal(bucket_tensors(make_bucket(0, 1, {"t": tensor}))["t"], tensor)


def test_read_only_bytes_are_viewed_without_a_copy_or_warning(recwarn):
    bucket = make_bucket(0, 1, _tensors(torch.float32))
    bucket.data.flags.writeable = False
    tensors = bucket_tensors(bucket)
    assert tensors["a.weight"].data_ptr() == bucket.data.ctypes.data
    assert not recwarn.list


def _altered(bucket: Bucket, change: str) -> Bucket:
    if change == "data":
        data = bucket.data.copy()
        data[11] ^= 1
        return dataclasses.replace(bucket, data=data)
    changes = {
        "names": {"names": ("a.weight", "b.weight", "c.scalar")},
        "shapes": {"shapes": ((5, 3), (7,), ())},
        "short": {"data": bucket.data[:-4]},
        "index": {"index": 1},
        "beyond": {"index": 2},
        "dtype": {"dtype": "int8"},
    }
    return dataclasses.replace(bucket, **changes[change])


@pytest.mark.parametrize("change", ["data", "names", "shapes", "short", "index", "beyond", "dtype"])
def test_any_change_is_found(change):
    with pytest.raises(PublicationError, match="weight bucket"):
        verify_bucket(_altered(make_bucket(0, 2, _tensors(torch.float32)), change))


def test_each_tensor_has_the_digest_of_its_own_bytes():
    sent = _tensors(torch.float32)
    digests = verify_bucket(make_bucket(0, 1, sent))
    assert digests == {
        name: hashlib.blake2b(tensor.numpy().tobytes(), digest_size=32).hexdigest() for name, tensor in sent.items()
    }


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match="one dtype"):
        make_bucket(0, 1, {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)})


def test_combined_digest_depends_on_order():
    assert combine_digests(["a", "b"]) != combine_digests(["b", "a"])


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_plan_keeps_order_and_bound(sizes, bucket_bytes):
    by_name = {f"p{i}": size for i, size in enumerate(sizes)}
    plan = plan_buckets(by_name, bucket_bytes)
    assert [name for bucket in plan for name in bucket] == list(by_name)
    for bucket in plan:
        assert bucket
        assert len(bucket) == 1 or sum(by_name[name] for name in bucket) <= bucket_bytes


def test_plan_refuses_an_empty_bucket_size():
    with pytest.raises(ValueError, match="positive"):
        plan_buckets({"a": 1}, 0)


def test_bytes_are_the_plain_row_major_bytes():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert make_bucket(0, 1, {"t": tensor}).data.tobytes() == np.arange(6, dtype=np.float32).tobytes()

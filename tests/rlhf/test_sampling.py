import pytest

from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.sampling import SamplingConfig, sampling_seed


def test_seed_is_stable_and_fits_63_bits():
    assert sampling_seed(7, "train/00012", 3, 2) == sampling_seed(7, "train/00012", 3, 2)
    seeds = [sampling_seed(7, f"train/{i}", k, v) for i in range(50) for k in range(4) for v in range(3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_is_the_same_in_every_release():
    # A changed hash would make every finished run unrepeatable.
    assert sampling_seed(0, "a", 0, 0) == 1294935783422926369


def test_seed_parts_do_not_run_together():
    assert sampling_seed(1, "2", 3, 4) != sampling_seed(1, "23", 4, 4)
    assert sampling_seed(12, "a", 1, 0) != sampling_seed(1, "2a", 1, 0)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(ConfigError, match="min_tokens at most max_tokens"):
        validate(SamplingConfig, {"min_tokens": 9, "max_tokens": 8}, "sampling")

"""Sampling: the share of each data set, and an order in which no image is forgotten and none comes twice too often."""

from collections import Counter

import numpy as np
import pytest

from visionmtl.data.loader import Data
from visionmtl.data.sampler import MixtureSampler, Sampling


def indices(mixture: MixtureSampler, epoch: int) -> list[int]:
    return [key.index for key in mixture.keys(epoch)]


def test_by_size_the_shares_are_those_of_the_images():
    assert Sampling().shares([60, 30, 10], [1, 1, 1], [{"a"}] * 3).tolist() == pytest.approx([0.6, 0.3, 0.1])


def test_a_weight_of_two_draws_twice_as_often_as_the_rule_alone():
    assert Sampling().shares([30, 30], [2, 1], [{"a"}] * 2).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_by_task_every_task_sees_equally_many_images():
    # depth: 10 of the only 10; boxes: 90 and 10 of 100. Amounts: 1 + 0.1 and 0.9
    shares = Sampling(by="task").shares([10, 90], [1, 1], [{"depth", "boxes"}, {"boxes"}])
    assert shares.tolist() == pytest.approx([1.1 / 2, 0.9 / 2])


def test_equal_shares_whatever_the_size():
    assert Sampling(by="equal").shares([1000, 10], [1, 1], [{"a"}, {"b"}]).tolist() == pytest.approx([0.5, 0.5])


def test_temperature_moves_the_shares_towards_equal_ones():
    # sqrt(100) : sqrt(1) = 10 : 1
    assert Sampling(temperature=2).shares([100, 1], [1, 1], [{"a"}] * 2).tolist() == pytest.approx([10 / 11, 1 / 11])


def test_by_size_every_image_is_drawn_once_an_epoch():
    draws = MixtureSampler([7, 5, 1], Sampling().shares([7, 5, 1], [1, 1, 1], [{"a"}] * 3), None, seed=3)
    for epoch in range(3):
        keys = draws.keys(epoch)
        assert sorted(key.index for key in keys) == list(range(13)) and not any(key.repeat for key in keys)
    assert indices(draws, 0) != indices(draws, 1)


def test_over_epochs_no_image_is_drawn_more_than_once_oftener_than_another_of_its_data_set():
    draws = MixtureSampler([9, 4], [0.2, 0.8], 20, seed=0)
    assert draws.counts == [4, 16]
    seen: Counter[int] = Counter()
    for epoch in range(7):
        assert len(set(draws.keys(epoch))) == 20, "each key is its own"
        seen.update(indices(draws, epoch))
        for few in (range(9), range(9, 13)):
            assert max(seen[i] for i in few) - min(seen[i] for i in few) <= 1


def test_every_stretch_of_an_epoch_holds_each_data_sets_share_to_a_rounding():
    images = np.array(indices(MixtureSampler([1000, 100], [0.75, 0.25], 400, seed=1), 2))
    for first in range(0, 400, 8):
        assert abs(np.count_nonzero(images[first : first + 8] >= 1000) - 2) <= 1


def test_what_rounding_leaves_goes_to_the_largest_remainders():
    assert MixtureSampler([10, 10, 10], [0.5, 0.26, 0.24], 9, seed=0).counts == [5, 2, 2]  # 4.5, 2.34, 2.16


def test_an_epoch_depends_on_seed_and_number_alone():
    one, two = (MixtureSampler([50, 20], [0.5, 0.5], 30, seed=4) for _ in range(2))
    one.keys(0)
    assert one.keys(5) == two.keys(5)
    assert indices(one, 5) != indices(MixtureSampler([50, 20], [0.5, 0.5], 30, seed=5), 5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train": [{"type": "scenes", "weight": 2}]}, "data.train.0.weight"),
        ({"sampling": {"by": "task"}}, "data.sampling.by"),
        ({"val": [{"type": "scenes", "weight": 2}]}, "data.val.0.weight"),
        ({"train": ["scenes", "scenes"], "sampling": {"by": "equal", "temperature": 2}}, "data.sampling.temperature"),
    ],
)
def test_what_would_have_no_effect_is_an_error(settings, named):
    with pytest.raises(ValueError, match=f"{named} would have no effect"):
        Data.model_validate({"train": ["scenes"], "val": ["scenes"], "size": (64, 64), **settings})

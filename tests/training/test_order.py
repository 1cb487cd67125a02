import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasgd.training.order import AUGMENTATION, ORDER, indices, permutation, seed_of


def test_every_pass_shows_each_image_once_and_in_a_new_order():
    first, second = indices(50, 3, 0, 0, 50), indices(50, 3, 0, 50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_each_rank_and_each_seed_has_its_own_permutation_of_the_whole_data_set():
    orders = {tuple(indices(30, seed, rank, 0, 30)) for seed in range(3) for rank in range(4)}
    assert len(orders) == 12
    assert all(sorted(drawn) == list(range(30)) for drawn in orders)


@given(n=st.integers(1, 20), begin=st.integers(0, 60), count=st.integers(0, 60), rank=st.integers(0, 3))
def test_what_is_drawn_at_a_position_does_not_depend_on_where_one_began(n, begin, count, rank):
    assert indices(n, 7, rank, begin, count) == indices(n, 7, rank, 0, begin + count)[begin:]


def test_a_batch_larger_than_the_data_set_goes_on_with_the_next_passes():
    assert indices(3, 0, 0, 2, 8) == [index for at in range(2, 10) for index in indices(3, 0, 0, at, 1)]


def test_the_order_is_the_same_on_every_machine_and_with_every_numpy():
    assert indices(10, 0, 0, 0, 10) == [9, 2, 4, 7, 5, 0, 8, 6, 3, 1]
    assert seed_of(AUGMENTATION, 0, 0, 0) == 4825892087074085057


def test_positions_beyond_32_bits_are_told_apart():
    assert indices(5, 0, 0, 5 * 2**33, 5) != indices(5, 0, 0, 5 * 2**34, 5)
    assert seed_of(AUGMENTATION, 0, 0, 1) != seed_of(AUGMENTATION, 0, 0, 1 + 2**32)


def test_uses_of_the_same_numbers_do_not_share_random_bits():
    assert seed_of(ORDER, 1, 2, 3) != seed_of(AUGMENTATION, 1, 2, 3)


def test_all_permutations_are_about_equally_likely():
    counts = np.zeros((3, 3))
    for key in range(600):
        counts[np.arange(3), permutation(3, key)] += 1
    assert np.abs(counts - 200).max() < 60  # 200 expected, standard deviation 11.5


@pytest.mark.parametrize(("n", "begin", "count"), [(0, 0, 1), (5, -1, 1), (5, 0, -1)])
def test_impossible_requests_are_refused(n, begin, count):
    with pytest.raises(ValueError, match="need n >= 1"):
        indices(n, 0, 0, begin, count)
